"""Objectives that need no reference: none is loaded, run or reported, unless one is given."""

import json
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from tdpo.cli.main import main
from tdpo.loss.preference_loss import FusedLoss, LogitsLoss

from helpers.model_families import make_model
from helpers.trainer_cases import losses, make_preferences, make_trainer, write_home
from tdpo_ext import reference_free

OF_REFERENCES = ("kl/", "rewards_with_kl/")


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_simpo_trains_as_beside_a_reference(fused, adapters, tmp_path, monkeypatch, capsys):
    if not fused:
        monkeypatch.setattr("tdpo.loss.preference_loss.why_not_fused", lambda *models: "a test wants logits")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapters else None
    options = {"variant": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "max_steps": 3, "peft_config": config}
    with pytest.warns(UserWarning, match="logits are materialised") if not fused else nullcontext():
        alone = make_trainer(tmp_path / "alone", model=make_model("llama"), **options)
        beside = make_trainer(tmp_path / "beside", model=make_model("llama"), ref_model=make_model("llama"), **options)
    assert alone.reference is alone.ref_model is None
    assert beside.reference is not None
    assert isinstance(alone.loss, FusedLoss if fused else LogitsLoss)
    for trainer in (alone, beside):
        torch.manual_seed(0)
        trainer.train()
    assert losses(alone) == pytest.approx(losses(beside), rel=1e-6)
    assert "there is no reference" in capsys.readouterr().err  # the audit's word
    for ours, theirs in zip(logged(alone), logged(beside), strict=True):
        assert not [name for name in ours if name.startswith(OF_REFERENCES)]
        assert [name for name in theirs if name.startswith(OF_REFERENCES)]
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=1e-6)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-6)


def test_rewards_are_those_of_simpo(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llama"), variant="simpo", beta=2.0, max_steps=1)
    evaluated = trainer.evaluate()
    means = []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            output = trainer.loss(trainer._prepare_inputs(trainer.data_collator([row])))
        means.append([2.0 * (side.logps / side.tokens).item() for side in (output.chosen, output.rejected)])
    chosen, rejected = torch.tensor(means).unbind(1)
    assert evaluated["eval_rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert evaluated["eval_rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4, abs=1e-6)
    assert evaluated["eval_rewards/accuracies"] == (chosen > rejected).float().mean().item()
    assert all(value == value for value in evaluated.values())  # no NaN


def test_samples_are_the_policys_alone(tmp_path):
    options = {"eval_samples": 2, "eval_sample_tokens": 3, "eval_dataset": make_preferences(4)}
    make_trainer(tmp_path, model=make_model("llama"), variant="simpo", **options).evaluate()
    samples = json.loads((tmp_path / "samples" / "eval-step-0.json").read_text())
    assert [set(sample) for sample in samples] == [{"prompt", "policy"}] * 2


@reference_free
def likelihood(chosen, rejected):
    return (0.1 * (rejected.logps - chosen.logps)).exp()


@reference_free
def not_so_free(chosen, rejected):
    return 0.1 * (rejected.logratio - chosen.logratio)


def test_an_objective_of_ones_own(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llama"), objective=likelihood, max_steps=2)
    assert trainer.reference is None
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer))


def test_an_objective_that_reads_a_reference_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llama"), objective=not_so_free, max_steps=2)
    with pytest.raises(ValueError, match="objective reads ref_logps or kl, but there is no reference"):
        trainer.train()


def test_a_cached_reference_is_used(tmp_path):
    options = {"precompute_reference": True, "max_steps": 1}
    trainer = make_trainer(tmp_path, model=make_model("llama"), variant="simpo", **options)
    trainer.train()
    assert "kl/chosen" in logged(trainer)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_direction": "reverse"}, "kl_direction is reverse, but the objective needs no reference"),
        ({"kl_warning": 0.1}, "kl_warning is 0.1, but the objective needs no reference"),
        ({"metric_for_best_model": "eval_kl/chosen"}, "metric_for_best_model is eval_kl/chosen, but"),
    ],
)
def test_options_that_need_a_reference_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "alone", model=make_model("llama"), variant="simpo", **options)
    make_trainer(
        tmp_path / "beside", model=make_model("llama"), ref_model=make_model("llama"), variant="simpo", **options
    )


def test_from_the_shell(tmp_path, capsys, monkeypatch):
    """Trained and evaluated without a reference; card and audit speak of none."""
    write_home(tmp_path, variant="simpo", output_dir=str(tmp_path / "out"), max_steps=1, eval_strategy="no")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "config.yaml"]) == 0
    assert "KL" not in capsys.readouterr().err
    assert "KL" not in (tmp_path / "out" / "README.md").read_text()
    assert main(["evaluate", "config.yaml", "--eval_dataset", "data.jsonl"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "eval_rewards/margins" in metrics
    assert "eval_kl/chosen" not in metrics
