"""Adapters, packing, options of transformers, softcaps, the budget and the model card."""

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from tdpo.loss import preference_loss as loss
from tdpo.loss.preference_loss import FusedLoss

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer
from tdpo_ext import linear_preference_loss


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adapters_off_are_the_reference(family, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(tmp_path, model=make_model(family), peft_config=config, shared_prompts="never")
    assert isinstance(trainer.loss, FusedLoss)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    assert output.chosen.kl.min() > 1e-4  # the adapters are not at zero
    with trainer.model.disable_adapter():
        assert trainer.model(preference=batch).chosen.kl.abs().max() < 1e-6
    plain = make_trainer(tmp_path, model=make_model(family))
    expected = plain.ref_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected.log_softmax(-1).flatten(0, 1)[batch["rows"]].gather(-1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(output.chosen.ref_logps.sum() + output.rejected.ref_logps.sum(), expected.sum())


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padding_free_equals_padded(family, tmp_path):
    results = []
    for padding_free in (False, True):
        models = {"model": make_model(family, 0), "ref_model": make_model(family, 1)}
        trainer = make_trainer(tmp_path, **models, padding_free=padding_free, shared_prompts="never")
        batch = next(iter(trainer.get_train_dataloader()))
        output = trainer.model(preference=batch)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in trainer.model.named_parameters()}, batch))
    (padded, grads, batch), (packed, packed_grads, packed_batch) = results
    assert packed_batch["input_ids"].numel() == batch["attention_mask"].sum()
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.chosen.kl, padded.chosen.kl, rtol=1e-4, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_models_that_mix_packed_sequences_are_refused(tmp_path):
    model = make_model("llama")
    backbone = model.model.forward

    def ignores_positions(*args, position_ids=None, **kwargs):  # takes the packed row for one sequence
        return backbone(*args, **kwargs)

    model.model.forward = ignores_positions
    with pytest.raises(ValueError, match="padding_free"):
        make_trainer(tmp_path, model=model, padding_free=True)


def test_adapters_are_off_while_the_reference_is_cached(tmp_path):
    divergences = []
    for cached in (False, True):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        options = {"precompute_reference": cached, "reference_dtype": "float32"}
        trainer = make_trainer(tmp_path / str(cached), model=make_model("llama"), peft_config=config, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        divergences.append(trainer.model(preference=batch).chosen)
    assert divergences[0].kl.min() > 1e-3
    for cached, live in zip(divergences[1], divergences[0]):
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)


SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 3, "learning_rate": 3e-4, "max_steps": 12}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), model=make_model("llama"), **SCHEDULE)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("options", [{"bf16": True}, {"optim": "rmsprop"}, {"gradient_checkpointing": True}])
def test_training_options(options, tmp_path, plain_run):
    trainer = make_trainer(tmp_path, model=make_model("llama"), **SCHEDULE, **options)
    seen = []

    def record(module, arguments, output):
        seen.append(output.dtype)

    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(record)
    trainer.train()
    log = trainer.state.log_history
    assert log[11]["rewards/margins"] > log[0]["rewards/margins"] + 0.02
    assert [entry["learning_rate"] for entry in log[:4]] == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    losses, plain = ([entry["loss"] for entry in entries[:12]] for entries in (log, plain_run))
    if "bf16" in options:
        assert seen == 12 * [torch.bfloat16]
        assert losses == pytest.approx(plain, rel=0.05)
        assert losses != plain
    elif "optim" in options:
        assert type(trainer.optimizer.optimizer).__name__ == "RMSprop"
        assert losses[:2] == plain[:2]  # the first update has a learning rate of zero
        assert losses[2:] != plain[2:]
    else:
        assert seen == 24 * [torch.float32]  # once more for the backward of every step
        assert losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("ref_softcap", [None, 9.0])
def test_other_softcaps_need_the_logits(ref_softcap, tmp_path):
    policy, frozen = make_model("gemma2", 0), make_model("gemma2", 1)
    frozen.config.final_logit_softcapping = ref_softcap
    with pytest.warns(UserWarning, match="cap their logits differently"):
        trainer = make_trainer(tmp_path, model=policy, ref_model=frozen, shared_prompts="never")
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(preference=batch)
    logits = frozen(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    expected = logits.flatten(0, 1)[batch["rows"]].gather(-1, batch["targets"][:, None]).sum()
    torch.testing.assert_close(output.chosen.ref_logps.sum() + output.rejected.ref_logps.sum(), expected)


def test_the_budget_reaches_the_fused_loss(tmp_path, monkeypatch):
    budgets = []

    def record(*arguments, **options):
        budgets.append(options["logits_budget"])
        return linear_preference_loss(*arguments, **options)

    monkeypatch.setattr(loss, "linear_preference_loss", record)
    for budget in (None, 123_456):
        trainer = make_trainer(tmp_path, logits_budget=budget)
        trainer.model(preference=next(iter(trainer.get_train_dataloader())))
    assert budgets == [None, 123_456]


def test_model_cards(tmp_path):
    for variant, own in {"tdpo2": {"alpha": 0.7}, "tdpo1": {}, "dpo": {}}.items():
        trainer = make_trainer(tmp_path, variant=variant, beta=0.2, warmup_steps=3, **own)
        trainer.save_model()
        card = (tmp_path / "README.md").read_text()
        assert f"variant: {variant}\nbeta: 0.2\n" in card
        options = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
        lengths = {"max_length": 40, "max_prompt_length": 16, "max_steps": 6, "per_device_train_batch_size": 4}
        schedule = {"learning_rate": 0.001, "warmup_steps": 3, "optim": "adamw_torch_fused"}
        # Others, such as weight_decay, are at their defaults.
        assert options == {"variant": variant, "beta": 0.2, **own, **schedule, **lengths}
        assert "2404.11999" in card
        assert "base_model" not in card
        assert "given in memory` on `preference pairs given in memory` (24 pairs)" in card
    trainer.model.config._name_or_path, trainer.data_name = "some/base", "some/data"
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/base" in card
    assert "from `some/base` on `some/data`" in card


def rows_of_table(markdown):
    """The cells of every row but the head."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_model_cards_show_results(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, model=make_model("llama"), peft_config=config, **options)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    names = ["loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected"]
    assert card.count(f"| step | {' | '.join(names)} |") == 2
    for step in (2, 4):
        entry = next(e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e)
        assert f"| {step} | " + " | ".join(f"{entry['eval_' + name]:.4g}" for name in names) in card
    trained, evaluated = (rows_of_table(part) for part in card.split("Evaluations ("))
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert trained == [["4", *(f"{last[name]:.4g}" for name in names)]]
    assert [row[0] for row in evaluated] == ["2", "4"]
    assert trained[0][1:] != evaluated[1][1:]
    assert "library_name: peft" in card
    assert "adapters: LoraConfig\nrank: 4" in card
