"""Heads with adapters stay fused: the loss and every gradient are those of the model's own logits, in float64."""

import warnings

import peft
import pytest
import tdpo
import torch
from tdpo.loss import preference_loss
from tdpo.loss.preference_loss import FusedLoss, LogitsLoss
from tdpo.models.causal_lm import CausalLM
from tdpo.models.heads import head_parts

import tdpo_ext
from helpers.model_families import make_model
from helpers.trainer_cases import change_what_trains, losses, make_trainer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}


def adapted(family="llama", **options):
    """With adapters that were trained before."""
    torch.manual_seed(1)
    return randomised(peft.get_peft_model(make_model(family), peft.LoraConfig(**{**LORA, **options})))


def randomised(model):
    change_what_trains(model)
    return model


def with_two_adapters():
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(**{**LORA, "r": 2}, target_modules=["q_proj", "lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    return randomised(model)


HEADS = {
    "LoRA": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "LoRA alone": lambda: adapted(target_modules=["lm_head"]),
    "LoRA of a tied head": lambda: adapted("qwen2", target_modules=["lm_head"]),
    "LoRA of a head with a bias": lambda: adapted("phi", target_modules=["lm_head"]),
    "LoRA under a cap": lambda: adapted("gemma2", target_modules=["q_proj", "lm_head"]),
    "LoRA and a scale": lambda: adapted("granite", target_modules=["lm_head"]),
    "rank-stabilised LoRA": lambda: adapted(target_modules=["lm_head"], use_rslora=True),
    "PiSSA": lambda: adapted(target_modules=["lm_head"], init_lora_weights="pissa"),
    "two adapters": with_two_adapters,
    "a copy that is saved": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "LoRA over trained tokens": lambda: adapted(
        "qwen2", target_modules=["q_proj", "lm_head"], trainable_token_indices=[5, 7]
    ),
    "trained tokens of a tied head": lambda: adapted(
        "qwen2", target_modules=["q_proj"], trainable_token_indices=[5, 7, 280]
    ),
}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_the_logits(head, tmp_path):
    model = HEADS[head]().double()
    trainer = make_trainer(tmp_path, model, make_model(model.config.model_type, 1).double())
    assert isinstance(trainer.loss, FusedLoss)
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = []
    for loss in (trainer.loss, LogitsLoss(trainer.loss.policy, trainer.reference, trainer.loss.objective)):
        output = loss(batch)
        output.loss.backward()
        outputs.append((output, gradients(trainer.model)))
    (fused, found), (plain, expected) = outputs
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-10, atol=0)
    for name in ("logps", "kl", "entropy", "correct"):
        torch.testing.assert_close(getattr(fused.chosen, name), getattr(plain.chosen, name), rtol=1e-8, atol=1e-10)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained & set(expected) == trained & set(found)
    assert any("lm_head" in name or "token_adapter" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("head", HEADS)
def test_training_begins_at_its_reference(head, tmp_path):
    trainer = make_trainer(tmp_path, HEADS[head](), max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses(trainer)[-1] < 0.693


@pytest.mark.parametrize("head", ["LoRA", "a copy that is saved", "trained tokens of a tied head"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_cached_reference(head, tmp_path):
    """What is stored are hidden states; the inputs of the head's adapters are formed from them."""
    results = []
    for cached in (False, True):
        trainer = make_trainer(
            tmp_path / str(cached),
            HEADS[head](),
            max_steps=3,
            learning_rate=1e-2,
            precompute_reference=cached,
            reference_dtype="float32" if cached else "bfloat16",
        )
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_weights_are_not_copied(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, HEADS["LoRA"](), make_model("llama", 1))
    given = {}
    real = preference_loss.linear_preference_loss

    def seen(*arguments, **options):
        given.update(options)
        return real(*arguments, **options)

    monkeypatch.setattr(preference_loss, "linear_preference_loss", seen)
    trainer.model(preference=next(iter(trainer.get_train_dataloader())))
    layer = trainer.model.get_base_model().lm_head
    pointers = [weight.data_ptr() for weight in given["weight"]]
    assert pointers == [layer.base_layer.weight.data_ptr(), layer.lora_B["default"].weight.data_ptr()]
    assert given["hidden"].shape[1] == layer.in_features + 4


def test_dropout_of_an_adapter_of_the_head(tmp_path):
    """Drawn anew at every call while the policy trains, and never for its reference."""
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    trainer = make_trainer(tmp_path, model, disable_dropout=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    first, second = (trainer.model(preference=batch).chosen for _ in range(2))
    assert not torch.equal(first.logps, second.logps)
    assert torch.equal(first.ref_logps, second.ref_logps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loop_of_one_s_own(dtype):
    """peft keeps adapters in float32 beside bfloat16 weights; what comes back has one dtype, as the losses want it."""
    model = HEADS["LoRA"]()
    model.get_base_model().to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    tokens = torch.randint(300, (2, 7))
    hidden, head = tdpo.hidden_and_head(model, {"input_ids": tokens})
    expected = model(input_ids=tokens).logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = tdpo_ext.linear_logps(hidden, head.weight, tokens)
    tolerance = 1e-10 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)
    found.sum().backward()
    assert model.get_base_model().lm_head.lora_B["default"].weight.grad.abs().sum() > 0


REFUSED = {
    "DoRA": (lambda: adapted(target_modules=["lm_head"], use_dora=True), "an adapter of LoRA's variant Dora"),
    "a bias": (lambda: adapted("phi", target_modules=["lm_head"], lora_bias=True), "a LoRA adapter with a bias"),
    "LoHa": (
        lambda: peft.get_peft_model(
            make_model("llama"), peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
        ),
        "adapters of the kind loha",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_why_others_are_not_fused_is_said(kind, tmp_path):
    build, message = REFUSED[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, build(), max_steps=2)
    assert any("logits are materialised" in str(w.message) and message in str(w.message) for w in caught), caught
    trainer.train()


def test_heads_that_are_spread_are_not_fused(monkeypatch):
    model = HEADS["LoRA"]()
    assert "spread over processes" in CausalLM.of(model, will_be_spread=True).fallback_reason
    monkeypatch.setattr("tdpo.models.causal_lm.is_tensor_parallel", lambda model: True)
    assert "spread over processes" in CausalLM.of(model).fallback_reason


def test_adapters_that_are_off_are_no_part():
    model = HEADS["LoRA"]()
    head = model.get_base_model().lm_head
    assert len(head_parts(head).weights) == 2
    with model.disable_adapter():
        assert len(head_parts(head).weights) == 1
