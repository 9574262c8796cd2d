"""Hidden states and heads for a loop of one's own: the model's logits, and the trainer's loss."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tdpo import PreferenceCollator, hidden_and_head, tokenize_preferences
from torch import nn

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import make_preferences, make_trainer
from tdpo_ext import linear_preference_loss, tdpo_loss


def make_batch(padding_free=False):
    tokens = tokenize_preferences(make_preferences(4), make_tokenizer(), 40, 16)
    return PreferenceCollator(0, padding_free=padding_free)(list(tokens))


def formed_logits(hidden, head):
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "cohere", "granite"])
def test_they_form_the_logits_of_the_model(family):
    """With a bias (Phi), a cap (Gemma 2) and scales."""
    model, batch = make_model(family).eval(), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    torch.testing.assert_close(formed_logits(*hidden_and_head(model, inputs)), logits, rtol=1e-4, atol=1e-4)
    rows = logits.flatten(0, 1)[batch["rows"]]
    torch.testing.assert_close(formed_logits(*hidden_and_head(model, batch)), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "padding_free"),
    [("llama", False), ("llama", True), ("phi", False), ("gemma2", False), ("cohere", False)],
)
def test_a_loop_of_six_lines_has_the_loss_of_the_trainer(family, padding_free, tmp_path):
    policy, reference, batch = make_model(family), make_model(family, seed=1), make_batch(padding_free)
    policy.eval()  # the trainer disables dropout
    hidden, head = hidden_and_head(policy, batch)
    with torch.no_grad():
        ref_hidden, ref_head = hidden_and_head(reference.eval(), batch)
    loss, chosen, _ = linear_preference_loss(
        functools.partial(tdpo_loss, beta=0.1, alpha=0.5),
        hidden,
        head.weight,
        ref_hidden,
        ref_head.weight,
        batch["targets"],
        row_lengths=batch["row_lengths"],
        **head.options(ref_head),
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    trainer = make_trainer(tmp_path, make_model(family), make_model(family, seed=1))
    output = trainer.loss(batch)
    torch.testing.assert_close(loss, output.loss)
    torch.testing.assert_close(chosen.kl, output.chosen.kl)


def test_adapters_are_used_as_they_are():
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    batch = make_batch()
    adapted, head = hidden_and_head(model, batch)
    with torch.no_grad(), model.disable_adapter():
        plain, _ = hidden_and_head(model, batch)
    torch.testing.assert_close(plain, hidden_and_head(make_model("llama"), batch)[0].detach())
    assert (adapted - plain).abs().max() > 1e-3
    assert adapted.requires_grad
    assert head.weight.shape == (300, 32)


def test_a_model_is_tried_once(monkeypatch):
    model, batch = make_model("llama"), make_batch()
    hidden_and_head(model, batch)
    monkeypatch.setattr("tdpo.models.causal_lm._how_logits_are_made", None)
    hidden_and_head(model, batch)


def test_caps_that_differ_are_refused():
    _, head = hidden_and_head(make_model("llama"), make_batch())
    _, capped = hidden_and_head(make_model("gemma2"), make_batch())
    with pytest.raises(ValueError, match=r"^the policy's softcap is None, but the reference's is 5.0$"):
        head.options(capped)


def test_what_cannot_be_used_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"^model is a DataParallel; a model of transformers or peft is needed"):
        hidden_and_head(nn.DataParallel(make_model("llama")), batch)
    changed = make_model("llama")
    forward = changed.forward
    changed.forward = lambda **inputs: type(output := forward(**inputs))(logits=output.logits + output.logits**2)
    with pytest.raises(ValueError, match=r"^model can't be used: its logits are not a linear"):
        hidden_and_head(changed, batch)
