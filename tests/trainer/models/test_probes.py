"""Models that mix packed sequences, or responses to one prompt, are found out."""

import pytest
from tdpo import CausalLM
from tdpo.models.probes import keeps_branches_apart

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer


def test_models_that_mix_packed_sequences_are_refused(tmp_path):
    model = make_model("llama")
    backbone = model.model.forward

    def ignores_positions(*args, position_ids=None, **kwargs):  # takes the packed row for one sequence
        return backbone(*args, **kwargs)

    model.model.forward = ignores_positions
    with pytest.raises(ValueError, match="padding_free"):
        make_trainer(tmp_path, model=model, padding_free=True)


def without_masks(model):
    """A model that takes no notice of masks, and so mixes branches."""
    backbone = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: backbone(*args, **kwargs)
    return model


@pytest.mark.parametrize("mixes", ["model", "ref_model"])
def test_models_that_mix_branches_get_separate_sequences(mixes, tmp_path):
    models = {"model": make_model("llama"), "ref_model": make_model("llama", 1)}
    without_masks(models[mixes])
    trainer = make_trainer(tmp_path, **models)
    assert not trainer.data_collator.shared_prompts
    with pytest.raises(ValueError, match=f"shared_prompts is 'always', but {mixes} mixes responses to one prompt"):
        make_trainer(tmp_path, **models, shared_prompts="always")


def test_what_takes_no_mask_is_not_tried():
    model = make_model("llama")
    assert keeps_branches_apart(CausalLM.of(model))
    for attribute, value in {"_attn_implementation": "flash_attention_2", "layer_types": ["linear_attention"]}.items():
        before = getattr(model.config, attribute, None)
        setattr(model.config, attribute, value)
        assert not keeps_branches_apart(CausalLM(model, None, 1.0, None))
        setattr(model.config, attribute, before)
