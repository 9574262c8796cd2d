"""Models as the options name them: what reaches `from_pretrained`."""

import pytest
import torch
import transformers
from tdpo.models.loading import load_policy, load_reference
from tdpo.options import ModelOptions

from helpers.model_families import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_precision_are_those_of_the_options(attention, folder):
    options = ModelOptions(model=folder, ref_model=folder, attn_implementation=attention, dtype="bfloat16")
    for model in (load_policy(options), load_reference(options)):
        assert model.config._attn_implementation == attention
        assert model.dtype == torch.bfloat16


GIVEN = {"attn_implementation": "eager", "tp_plan": "auto", "trust_remote_code": True, "dtype": "float16"}


@pytest.mark.parametrize("load", [load_policy, load_reference])
@pytest.mark.parametrize("given", [{}, GIVEN])
def test_every_option_reaches_the_loader_and_no_other(load, given, monkeypatch):
    calls = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: calls.append((name, options))
    )
    load(ModelOptions(model="owner/policy", ref_model="owner/reference", **given))
    name = "owner/policy" if load is load_policy else "owner/reference"
    assert calls == [(name, {"dtype": "float32", "trust_remote_code": False, **given})]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_full_memory_is_not_called_a_damaged_model(error, monkeypatch):
    def fail(name, **options):
        raise error("full")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(error, match="full"):
        load_policy(ModelOptions(model="owner/policy"))


def test_no_reference_is_loaded_where_none_is_named(folder):
    assert load_reference(ModelOptions(model=folder)) is None
