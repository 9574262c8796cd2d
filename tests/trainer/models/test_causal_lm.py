"""How a model makes logits of hidden states: scales and caps under any name, tried at large logits too."""

import pytest
import torch
import transformers
from tdpo import CausalLM
from tdpo.models.stand_ins import stand_in

from helpers.model_families import SMALL, make_model


def patched(change, family="llama", dtype=torch.float32, **options):
    """A model whose logits are changed, with options in its configuration that may tell how."""
    model = make_model(family).to(dtype)
    for name, value in options.items():
        setattr(model.config, name, value)
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "value", "scale"),
    [
        ("logit_scale", 0.25, 0.25),  # Cohere
        ("lm_head_multiplier", 0.25, 0.25),  # Falcon-H1
        ("logits_scaling", 4.0, 0.25),  # Granite
        ("logits_scaling", 0.25, 0.25),  # HyperCLOVA X
        ("something_else", 4.0, None),
    ],
)
def test_the_scale_of_logits_is_read_and_tried(name, value, scale, dtype):
    """A name is no more than a hint: the scale is what the model does."""
    obeyed = CausalLM.of(patched(lambda logits: (scale or 0.25) * logits, dtype=dtype, **{name: value}))
    if scale is None:
        assert "not a linear" in obeyed.fallback_reason
    else:
        assert (obeyed.fallback_reason, obeyed.logit_scale) == (None, scale)
    ignored = CausalLM.of(patched(lambda logits: logits, dtype=dtype, **{name: value}))
    assert (ignored.fallback_reason, ignored.logit_scale) == (None, 1.0)


def test_why_a_model_cannot_be_tried_is_said():
    model = make_model("llama")

    def broken(*args, **kwargs):
        raise RuntimeError("shape '[32, 0]' is invalid")

    model.forward = broken
    reason = CausalLM.of(model).fallback_reason
    assert reason == "its backbone or its logits can't be tried on two tokens: shape '[32, 0]' is invalid"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"])
def test_a_cap_is_noticed_at_small_logits(name, dtype):
    """The model's own logits are far below its cap, which would change them by 1e-6."""

    def cap(logits):
        return 500 * torch.tanh(logits / 500)

    model = patched(cap, dtype=dtype, **{name: 500.0})
    assert model(input_ids=torch.tensor([[1, 2]])).logits.abs().max() < 10
    assert CausalLM.of(model).softcap == 500
    unknown = CausalLM.of(patched(cap, dtype=dtype))
    assert "not a linear" in unknown.fallback_reason


def test_a_small_difference_is_noticed():
    """A thousandth, where the probe used to forgive a twentieth of the spread."""
    model = patched(lambda logits: 1.001 * logits)
    assert "not a linear" in CausalLM.of(model).fallback_reason


def test_recurrent_gemma_caps_under_a_name_of_its_own():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, attention_window_size=8, logits_soft_cap=30.0,
    )  # fmt: skip
    model = CausalLM.of(transformers.AutoModelForCausalLM.from_config(config))
    assert (model.fallback_reason, model.softcap) == (None, 30.0)


def test_a_bias_and_a_scale():
    model = make_model("phi")
    assert CausalLM.of(model).fallback_reason is None
    config = transformers.CohereConfig(**SMALL, logit_scale=0.5)
    assert CausalLM.of(transformers.AutoModelForCausalLM.from_config(config)).logit_scale == 0.5


def test_a_sharded_model_is_tried_on_a_stand_in(monkeypatch):
    """In the precision of the model, which this process can't run."""
    monkeypatch.setattr("tdpo.models.causal_lm.is_sharded", lambda model: True)
    model = make_model("gemma2").to(torch.bfloat16)
    monkeypatch.setattr(model, "forward", None)
    state = torch.get_rng_state()
    found = CausalLM.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.model, found.softcap, found.fallback_reason) == (model, 5.0, None)
    probed = found.probe.model
    assert probed is not model
    assert (type(probed), probed.dtype) == (type(model), torch.bfloat16)
    assert found.probe.low_precision


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_stand_in_has_the_attention_of_its_model(attention):
    model = make_model("llama")
    model.set_attn_implementation(attention)
    assert stand_in(model).config._attn_implementation == attention
