"""Adapters, packing, options of transformers, samples and the model card."""

import json

import pytest
import torch
from model_families import make_model
from peft import LoraConfig, PeftModel
from trainer_cases import make_trainer


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adapters_off_are_the_reference(family, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(tmp_path, model=make_model(family), peft_config=config)
    assert trainer.loss.fallback_reason is None
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
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-4")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padding_free_equals_padded(family, tmp_path):
    results = []
    for padding_free in (False, True):
        models = {"model": make_model(family, 0), "ref_model": make_model(family, 1)}
        trainer = make_trainer(tmp_path, **models, padding_free=padding_free)
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


@pytest.mark.parametrize("options", [{"bf16": True}, {"optim": "rmsprop"}, {"gradient_checkpointing": True}])
def test_training_options(options, tmp_path):
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 3, "learning_rate": 3e-4}
    trainer = make_trainer(tmp_path, model=make_model("llama"), max_steps=12, **schedule, **options)
    trainer.train()
    log = trainer.state.log_history
    assert log[11]["rewards/margins"] > log[0]["rewards/margins"] + 0.02
    assert log[0]["learning_rate"] < log[2]["learning_rate"]
    assert 0 <= log[0]["mean_token_accuracy"] <= 1


def test_evaluation_loss_weighs_pairs(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("gpt2", 0), ref_model=make_model("gpt2", 1))
    several = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 3  # a last batch of two
    uneven = trainer.evaluate()
    for name in ("eval_loss", "eval_kl/rejected", "eval_entropy", "eval_mean_token_accuracy"):
        assert uneven[name] == pytest.approx(several[name], rel=1e-5), name


def test_samples_and_model_card(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path,
        model=make_model("llama", 0),
        ref_model=make_model("llama", 1),
        eval_samples=2,
        eval_sample_tokens=5,
    )
    trainer.evaluate()
    samples = json.loads((tmp_path / "samples" / "eval-step-0.json").read_text())
    assert [set(sample) for sample in samples] == [{"prompt", "policy", "reference"}] * 2
    assert samples[0]["policy"] != samples[0]["reference"]
    assert "policy:" in capsys.readouterr().out
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "2404.11999" in card
    assert "TDPO2, beta 0.1, alpha 0.5" in card
