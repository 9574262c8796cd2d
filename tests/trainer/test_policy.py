"""The policy: its dropout, adapters and default learning rate."""

import pytest
import torch
from peft import LoraConfig, PeftModel

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


def test_the_seed_covers_new_adapters(tmp_path):
    weights = []
    for seed in (1, 1, 2):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trainer = make_trainer(tmp_path, model=make_model("llama", len(weights)), peft_config=config, seed=seed)
        weights.append(next(p for name, p in trainer.model.named_parameters() if "lora_A" in name))
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize("adapters", [False, True])
def test_default_learning_rates(adapters, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapters else None
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, learning_rate=None)
    trainer.create_optimizer()
    assert trainer.args.learning_rate == (1e-5 if adapters else 1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.args.learning_rate


def test_adapters_train_and_are_saved(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, **options)
    parameters = dict(trainer.model.named_parameters())
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    trainer.train()
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in parameters if "lora_" in name}
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-4")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], msg=name)
