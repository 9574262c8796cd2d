"""TRL's DPOTrainer with the TDPO loss, where the pinned TRL is installed."""

import functools

import pytest
import torch
from model_families import make_model, make_tokenizer
from peft import LoraConfig
from trainer_cases import make_preferences

from tdpo_ext import eager, tdpo_loss

trl = pytest.importorskip("trl", reason="TRL is not installed")
from tdpo.trl import TDPOTrainer, _preference_batch  # noqa: E402

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "beta": 0.2,
}


def make(tmp_path, *, model=None, ref_model=None, peft_config=None, options=None, **config):
    """TRL's trainer with `options` of the TDPO loss; `config` is that of DPOConfig."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return TDPOTrainer(
        model or make_model("llama", 0),
        ref_model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **config}),
        train_dataset=make_preferences(),
        eval_dataset=make_preferences(8),
        processing_class=tokenizer,
        peft_config=peft_config,
        **(options or {}),
    )


def test_equals_the_oracle(tmp_path):
    policy, frozen = make_model("llama", 0), make_model("llama", 1)
    trainer = make(tmp_path, model=policy, ref_model=frozen, options={"alpha": 0.3})
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits, ref_logits = policy(**inputs).logits[:, :-1].double(), frozen(**inputs).logits[:, :-1].double()
    divergence = eager.token_divergence(logits, ref_logits, labels[:, 1:])
    objective = functools.partial(tdpo_loss, beta=0.2, alpha=0.3)
    expected = objective(*divergence.per_sequence().chunk(2)).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_trains_and_logs(adapters, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapters else None
    frozen = None if adapters else make_model("llama", 0)
    trainer = make(tmp_path, ref_model=frozen, peft_config=config, max_steps=8)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert {"kl/chosen", "kl/rejected", "kl/margin"} <= set(log[0])
    assert trainer.evaluate()["eval_kl/chosen"] > 0


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"variant": "ipo"}, {}, "variant"),
        ({"alpha": -1.0}, {}, "alpha"),
        ({}, {"loss_type": "ipo"}, "loss_type"),
        ({}, {"use_weighting": True}, "use_weighting"),
        ({}, {"ld_alpha": 0.5}, "ld_alpha"),
    ],
)
def test_bad_options(options, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, ref_model=make_model("llama", 1), options=options, **config)


def test_a_completion_may_begin_a_sequence():
    """Nothing predicts the first token of a sequence, not the last position of the row before it either."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 9], [8, 3, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
    }
    batch = _preference_batch(inputs)
    assert batch["rows"].tolist() == [1, 2, 4, 5]
    assert batch["targets"].tolist() == [7, 9, 3, 9]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4]
