"""Adapters on disk: what resumes and what others load is all that was trained."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tdpo.models.adapter_files import load_adapters

from helpers.model_families import make_model
from helpers.trainer_cases import FOUR_STEPS, change_what_trains, losses, make_trainer

TOKENS = torch.arange(100, 200)[None]


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def with_adapters(name="default", **options):
    """Those of an SFT."""
    torch.manual_seed(1)
    policy = get_peft_model(make_model("llama"), lora(**options), adapter_name=name)
    change_what_trains(policy)
    return policy


def unfrozen(part, **options):
    policy = with_adapters(**options)
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.requires_grad = True
    return policy


def with_a_second(active):
    policy = with_adapters()
    policy.add_adapter("second", lora(r=2))
    policy.base_model.set_adapter(active)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = ".second." in name
    return policy


POLICIES = {
    "norms": lambda: unfrozen("norm"),
    "norms beside another name": lambda: unfrozen("norm", name="sft"),
    "head": lambda: unfrozen("lm_head"),
    "embeddings": lambda: unfrozen("embed_tokens"),
    "an adapted layer": lambda: unfrozen("q_proj.base_layer"),
    "another name": lambda: with_adapters("sft"),
    "the second of two": lambda: with_a_second("second"),
    "the second beside the first": lambda: with_a_second(["default", "second"]),
}


def parameters(trainer):
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_equals_an_uninterrupted_one_in_every_bit(name, tmp_path):
    policy = POLICIES[name]()
    options = {**FOUR_STEPS, "learning_rate": 1e-2}
    whole = make_trainer(tmp_path, copy.deepcopy(policy), **options)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, policy, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert resumed.model.active_adapters == whole.model.active_adapters
    trained = parameters(whole)
    for key, value in parameters(resumed).items():
        assert torch.equal(value, trained[key]), key
        assert value.requires_grad == trained[key].requires_grad, key


@pytest.mark.parametrize("name", POLICIES)
def test_the_best_model_is_loaded_whole(name, tmp_path):
    """The first checkpoint, as the greatest loss is called the best here."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, POLICIES[name](), learning_rate=1e-2, **steps, **best)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"] != last["eval_loss"]


@pytest.mark.parametrize("part", ["norm", "lm_head", "q_proj.base_layer"])
def test_peft_loads_what_trained_beside_adapters(part, tmp_path):
    trainer = make_trainer(tmp_path, unfrozen(part), max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    with torch.no_grad():
        logits, trained = (model.eval()(input_ids=TOKENS).logits for model in (loaded, trainer.model))
    assert torch.equal(logits, trained)


def test_a_folder_that_lacks_an_adapter_is_refused(tmp_path):
    with_adapters().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the adapter 'second', is missing"):
        load_adapters(with_a_second("second"), tmp_path)
