"""Batches of tokenized preferences: what is counted in them, and where their tokens stand."""

import pytest
import torch
from tdpo import PreferenceCollator

from helpers.model_families import make_model
from helpers.trainer_cases import make_trainer

ROWS = [
    {"dataset_row": 7, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 9], "rejected_ids": [5, 6, 7, 9]},
    {"dataset_row": 2, "prompt_ids": [], "chosen_ids": [4, 5, 9], "rejected_ids": [8, 9]},
]
LAYOUTS = [{"padding_free": packed, "shared_prompts": shared} for packed in (False, True) for shared in (False, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_prompts_and_responses(layout):
    """A prompt counts with each of its responses, however the batch is laid out."""
    batch = PreferenceCollator(pad_token_id=0, **layout)(ROWS)
    assert batch["num_tokens"] == (3 + 2) + (3 + 4) + (0 + 3) + (0 + 2)
    assert batch["row_lengths"] == [2, 2, 4, 1]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 8, 9]
    assert batch["dataset_row"].tolist() == [7, 2]
    assert next(iter(batch)) == "dataset_row"  # whose length transformers takes for the batch's


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hidden_state_predicts_the_token_behind_it(layout):
    """At every row stands the token before its target: the response's own, or the prompt's last."""
    batch = PreferenceCollator(pad_token_id=0, **layout)(ROWS)
    assert batch["targets"].tolist() == [4, 9, 5, 9, 5, 6, 7, 9, 9]
    assert batch["input_ids"].flatten()[batch["rows"]].tolist() == [3, 4, 4, 5, 3, 5, 6, 7, 8]


def test_padding_stands_behind_and_is_masked():
    batch = PreferenceCollator(pad_token_id=11)(ROWS)
    assert batch["input_ids"].shape == (4, 7)
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 11)
    shared = PreferenceCollator(pad_token_id=11, shared_prompts=True)(ROWS)
    assert shared["input_ids"].shape == (2, 9)
    assert torch.equal(shared["segments"] == -1, shared["input_ids"] == 11)


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
