"""A model's head: what it multiplies its logits by, and why it can't be used."""

import pytest
from tdpo import CausalLM

from helpers.model_families import make_model


@pytest.mark.parametrize(
    ("name", "value", "scale"),
    [
        ("logit_scale", 0.25, 0.25),  # Cohere
        ("lm_head_multiplier", 0.25, 0.25),  # Falcon-H1
        ("logits_scaling", 4.0, 0.25),  # Granite
        ("something_else", 4.0, 1.0),
    ],
)
@pytest.mark.parametrize("obeyed", [True, False])
def test_the_scale_of_logits_is_read_and_tried(name, value, scale, obeyed):
    """A configuration that says what its model does not do is noticed."""
    model = make_model("llama")
    setattr(model.config, name, value)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = scale * output.logits
        return output

    if obeyed:
        model.forward = scaled
    causal_lm = CausalLM.of(model)
    if obeyed or scale == 1:
        assert causal_lm.fallback_reason is None
        assert causal_lm.logit_scale == scale
    else:
        assert "not a linear" in causal_lm.fallback_reason


def test_scaled_logits_are_noticed():
    model = make_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    model.forward = scaled
    assert "not a linear" in CausalLM.of(model).fallback_reason


def test_why_a_model_cannot_be_tried_is_said():
    model = make_model("llama")

    def broken(*args, **kwargs):
        raise RuntimeError("shape '[32, 0]' is invalid")

    model.forward = broken
    reason = CausalLM.of(model).fallback_reason
    assert reason == "its backbone or its logits can't be tried on two tokens: shape '[32, 0]' is invalid"
