"""Evaluation and logs: losses and rewards by hand, no gradients, means between logs, and samples."""

import json

import pytest
import torch
from peft import LoraConfig

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import change_what_trains, make_preferences, make_trainer


def test_prediction_on_data_without_a_cache_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, precompute_reference=True)
    others = trainer.eval_dataset.select(range(2))
    with pytest.raises(ValueError, match="this dataset was not given to the trainer, so it has no cache"):
        trainer.predict(others)


def two_models(path, **options):
    return make_trainer(path, model=make_model("gpt2", 0), ref_model=make_model("gpt2", 1), **options)


@pytest.mark.parametrize("batch", [8, 3, 1])
def test_evaluation_by_hand(batch, tmp_path):
    """Every pair weighs the same, whatever the batches; rewards have the beta of the options."""
    trainer = two_models(tmp_path, beta=0.3, alpha=0.7, per_device_eval_batch_size=batch)
    evaluated = trainer.evaluate()
    chosen, rejected = [], []
    for row in trainer.eval_dataset:  # one at a time, so that nothing is padded
        output = trainer.loss(trainer._prepare_inputs(trainer.data_collator([row])))
        chosen.append(torch.stack(output.chosen)[:, 0])
        rejected.append(torch.stack(output.rejected)[:, 0])
    logps, ref_logps, kl, entropy, correct, tokens = torch.stack(chosen, 1).double()
    other_logps, other_ref_logps, other_kl, other_entropy, _, other_tokens = torch.stack(rejected, 1).double()
    rewards, other_rewards = 0.3 * (logps - ref_logps), 0.3 * (other_logps - other_ref_logps)
    margins = logps - ref_logps - other_logps + other_ref_logps - 0.7 * (other_kl - kl)
    expected = {
        "eval_loss": torch.log1p(torch.exp(-0.3 * margins)).mean(),
        "eval_rewards/chosen": rewards.mean(),
        "eval_rewards/rejected": other_rewards.mean(),
        "eval_rewards/margins": (rewards - other_rewards).mean(),
        "eval_rewards/accuracies": (rewards > other_rewards).double().mean(),
        "eval_rewards_with_kl/chosen": (rewards + 0.3 * kl).mean(),
        "eval_rewards_with_kl/margins": (rewards + 0.3 * kl - other_rewards - 0.3 * other_kl).mean(),
        "eval_kl/rejected": other_kl.mean(),
        "eval_entropy": (entropy + other_entropy).sum() / (tokens + other_tokens).sum(),
        "eval_mean_token_accuracy": correct.sum() / tokens.sum(),
    }
    for name, value in expected.items():
        assert evaluated[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert torch.log1p(torch.exp(-0.3 * margins)).std() > 0.01  # pairs differ, so that weights show


def test_evaluation_takes_no_gradients(tmp_path):
    trainer = two_models(tmp_path)
    compute_loss, seen = trainer.compute_loss, []

    def record(*arguments, **options):
        seen.append(torch.is_grad_enabled())
        return compute_loss(*arguments, **options)

    trainer.compute_loss = record
    trainer.evaluate()
    assert seen == [False]
    assert not trainer.model.training


@pytest.mark.parametrize("batch", [4, 3])
def test_an_interrupted_evaluation_leaves_nothing_behind(batch, tmp_path):
    """What it found, of other weights, must not stand for the rows that it saw."""
    trainer = two_models(tmp_path, per_device_eval_batch_size=batch)
    compute_loss, calls = trainer.compute_loss, []

    def interrupted(*arguments, **options):
        calls.append(True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute_loss(*arguments, **options)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    other = make_model("gpt2", 2)
    trainer.model.load_state_dict(other.state_dict())
    found, expected = (
        {name: value for name, value in one.evaluate().items() if "/" in name or name == "eval_loss"}
        for one in (trainer, make_trainer(tmp_path, model=other, ref_model=make_model("gpt2", 1)))
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_evaluation_that_is_not_finite_stops(tmp_path):
    trainer = two_models(tmp_path, per_device_eval_batch_size=3)
    with torch.no_grad():
        trainer.model.transformer.ln_f.bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1, on rows \[0, 1, 2\]"):
        trainer.evaluate()


def test_evaluations_between_logs_do_not_disturb_the_means(tmp_path):
    logs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = two_models(tmp_path, logging_steps=3, max_steps=6, **evaluation)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    each = two_models(tmp_path, logging_steps=1, max_steps=6)
    each.train()
    values = [entry["kl/rejected"] for entry in each.state.log_history if "loss" in entry]
    for log in logs:
        assert [entry["step"] for entry in log] == [3, 6]
        means = [sum(values[:3]) / 3, sum(values[3:]) / 3]
        assert [entry["kl/rejected"] for entry in log] == pytest.approx(means, rel=1e-6)


def continuation(model, prompt, tokenizer):
    """Five greedy tokens, as text."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(5):
            ids.append(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("adapters", [False, True])
def test_samples(adapters, tmp_path, capsys):
    options = {"eval_samples": 2, "eval_sample_tokens": 5, "eval_dataset": make_preferences(4)}
    if adapters:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, **options)
        change_what_trains(trainer.model)
        frozen = make_model("llama").to(trainer.args.device)
    else:
        trainer = make_trainer(tmp_path, model=make_model("llama"), ref_model=make_model("llama", 1), **options)
        frozen = trainer.ref_model
    trainer.evaluate()
    samples = json.loads((tmp_path / "samples" / "eval-step-0.json").read_text())
    tokenizer = make_tokenizer()
    for sample, row in zip(samples, trainer.eval_dataset.select(range(2)), strict=True):
        prompt = row["prompt_ids"]
        assert sample == {
            "prompt": tokenizer.decode(prompt),
            "policy": continuation(trainer.model, prompt, tokenizer),
            "reference": continuation(frozen, prompt, tokenizer),
        }
        assert sample["policy"] != sample["reference"]
    assert "policy:" in capsys.readouterr().err
