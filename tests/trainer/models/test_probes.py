"""Layouts that change a model's numbers are not chosen, or are refused: windows, chunks, recurrence, rope."""

import pytest
import torch
import transformers
from datasets import Dataset
from tdpo import CausalLM
from tdpo.data.collator import PreferenceCollator
from tdpo.data.tokenize import tokenize_preferences
from tdpo.models.probes import LAYOUTS, agrees_with_padding, choose_layout, depends_on_the_batch, probe_model
from tdpo.reference.cache import cache_reference

from helpers import families
from helpers.families_tried import make_trainer as make_family_trainer
from helpers.families_tried import try_family
from helpers.model_families import SMALL, make_model
from helpers.trainer_cases import make_trainer

EVERYWHERE = ["padded", "packed", "shared", "shared, packed"]


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("mistral", EVERYWHERE),  # a sliding window
        ("gemma3_text", EVERYWHERE),  # layers with a window and layers without
        ("gpt_neo", ["padded", "packed"]),  # a window by the index in the row
        ("llama4_text", ["padded"]),  # chunks
        ("lfm2", ["padded"]),  # short convolutions
        ("recurrent_gemma", ["padded"]),  # recurrent states, and a cap of logits
        ("bloom", ["padded"]),  # ALiBi
        ("granitemoehybrid, dense", ["padded", "shared"]),
    ],
)
def test_every_layout_gives_the_values_of_plain_arithmetic(family, layouts):
    outcome = try_family(family)
    assert not outcome.wrong
    assert outcome.layouts == layouts
    assert not outcome.row_by_row


@pytest.mark.parametrize(
    "family", ["deepseek_v32", "phi3, longrope"]
)  # selected keys, rope that follows the longest row
def test_rows_that_change_each_other_are_read_one_by_one(family):
    outcome = try_family(family)
    assert outcome.layouts == ["padded"]
    assert outcome.row_by_row
    assert not outcome.wrong


def windowed(window):
    """Layers that attend within a window of indices in the row, whatever the positions are."""
    return transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=window, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("window", [5, 40, 256, 1000])
def test_windows_are_probed_whatever_their_length(window):
    model = CausalLM.of(families.make_family("gpt_neo", config=windowed(window)))
    assert probe_model(model, 1024).layouts == {"padded", "packed"}


def rope(kind, beyond):
    options = {"factor": 4.0, "rope_theta": 1e4, "rope_type": kind}
    if kind == "longrope":
        options |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": beyond}
        positions = 4096
    else:
        positions = beyond
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": positions}, rope_parameters=options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_rope_that_scales_with_the_longest_row():
    long = CausalLM.of(rope("longrope", 100))
    assert depends_on_the_batch(long, 100) is None
    assert "other rows" in depends_on_the_batch(long, 101)
    assert probe_model(long, 100).layouts == set(LAYOUTS)
    dynamic = CausalLM.of(rope("dynamic", 100))
    assert depends_on_the_batch(dynamic, 100) is None
    with pytest.raises(ValueError, match=r"the sequences that it has read before.*: set max_length, 101"):
        depends_on_the_batch(dynamic, 101)
    assert depends_on_the_batch(CausalLM.of(rope("linear", 100)), 1000) is None


def test_what_the_options_ask_for_is_refused_or_done():
    collator, models = PreferenceCollator(0), {"model": CausalLM.of(rope("longrope", 100))}
    options = {"padding_free": False, "routed": False, "shared_prompts": "auto"}
    assert choose_layout(collator, models, max_length=100, **options).shared_prompts
    chosen = choose_layout(collator, models, max_length=101, **options)
    assert chosen.row_by_row
    assert not chosen.shared_prompts
    for wrong, match in (
        ({"padding_free": True}, "padding_free is True"),
        ({"shared_prompts": "always"}, "is 'always'"),
    ):
        with pytest.raises(ValueError, match=match):
            choose_layout(collator, models, max_length=101, **{**options, **wrong})


def test_the_cache_of_such_a_reference_holds_each_sequences_own_states(tmp_path):
    model = rope("longrope", 16)
    families.enliven(model)
    rows = Dataset.from_list(families.make_rows())
    tokens = tokenize_preferences(rows, families.make_tokenizer(), max_length=256, max_prompt_length=128)
    cache = cache_reference(tmp_path / "cache", model, tokens, 0, "float32")
    for number, row in enumerate(tokens):
        for side in ("chosen", "rejected"):
            ids, first = torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]), max(len(row["prompt_ids"]), 1)
            with torch.no_grad():
                alone = model.model(input_ids=ids[None]).last_hidden_state[0, first - 1 : -1]
            torch.testing.assert_close(cache.hidden(number, side), alone, rtol=1e-4, atol=1e-4)


def test_rows_one_by_one_have_the_routers_loss_of_a_batch(tmp_path):
    """Their router logits are put together as those of the padded batch are."""
    model = families.make_family("mixtral")
    losses = []
    for row_by_row in (False, True):
        trainer = make_family_trainer(
            families.copied(model), families.perturbed(model), str(tmp_path), router_aux_loss_coef=0.5
        )
        trainer.data_collator.row_by_row = row_by_row
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.loss(batch))
    torch.testing.assert_close(losses[0].router_loss, losses[1].router_loss)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)


def test_a_stand_in_leaves_the_random_numbers_alone():
    model = CausalLM.of(make_model("llama"))
    state = torch.get_rng_state()
    probe_model(model, 1024)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_without_a_stand_in_are_not_trusted(monkeypatch):
    def fails(*args, **options):
        raise ValueError("this configuration can't be made small")

    model = CausalLM.of(make_model("llama"))
    monkeypatch.setattr("tdpo.models.probes.scaled_down", fails)
    assert probe_model(model, 1025).layouts == {"padded"}  # of a length that no other test has asked for


# ---- a model that does otherwise than its class ----


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
    assert agrees_with_padding(CausalLM.of(model), "shared")
    for attribute, value in {"_attn_implementation": "flash_attention_2", "layer_types": ["linear_attention"]}.items():
        before = getattr(model.config, attribute, None)
        setattr(model.config, attribute, value)
        assert not agrees_with_padding(CausalLM(model, None, 1.0, None), "shared")
        setattr(model.config, attribute, before)
