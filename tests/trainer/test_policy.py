"""The policy before it is trained: its dropout, and adapters below checkpointed layers."""

import pytest
import torch
from peft import LoraConfig

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer


def dropouts(model):
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def losses_while_training(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return [trainer.model(preference=batch).loss.item() for _ in range(2)]


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout_is_disabled_unless_it_is_wanted(disabled, tmp_path):
    model = make_model("gpt2")
    assert dropouts(model) == {0.1}
    trainer = make_trainer(tmp_path, model=model, disable_dropout=disabled)
    assert dropouts(trainer.model) == ({0.0} if disabled else {0.1})
    first, second = losses_while_training(trainer)
    assert (first == second) == disabled


@pytest.mark.parametrize("disabled", [True, False])
def test_the_dropout_of_adapters_is_left_alone(disabled, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules="all-linear")
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, disable_dropout=disabled)
    assert dropouts(trainer.model) == {0.3}


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_train_through_checkpointed_layers(reentrant, tmp_path):
    """Inputs that need no gradient would leave the layers of a reentrant checkpoint without one."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, max_steps=1, **options)
    trainer.train()
    changed = [p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(changed) == 14
    assert all(changed)


def test_dropout_is_disabled_by_default(tmp_path):
    first, second = losses_while_training(make_trainer(tmp_path))
    assert first == second


def test_the_reference_never_drops(tmp_path):
    trainer = make_trainer(tmp_path, ref_model=make_model("gpt2", 1), disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    first, second = (trainer.model(preference=batch).chosen for _ in range(2))
    assert torch.equal(first.ref_logps, second.ref_logps)
    assert not torch.equal(first.logps, second.logps)
