"""Batches of tokenized preferences: what is counted in them, and where their tokens stand."""

import pytest
import torch
from tdpo import PreferenceCollator
from tdpo.data.collator import predicted_responses

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


PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4, 5, 9]},
    {"prompt_ids": [], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
]


def test_collator_puts_chosen_first():
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 0], [7, 9, 0, 0, 0], [1, 2, 4, 5, 9], [8, 9, 0, 0, 0]]
    assert batch["attention_mask"].sum(-1).tolist() == [4, 2, 5, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 6, 7]
    assert batch["rows"].tolist() == [1, 2, 5, 11, 12, 13, 15]
    assert batch["targets"].tolist() == [3, 9, 9, 4, 5, 9, 9]
    packed = PreferenceCollator(pad_token_id=0, padding_free=True)(PAIRS)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 9, 7, 9, 1, 2, 4, 5, 9, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0, 1]]
    assert packed["targets"].tolist() == batch["targets"].tolist()
    assert packed["rows"].tolist() == [1, 2, 4, 7, 8, 9, 11]


def test_layouts():
    plain = PreferenceCollator(0)(PAIRS)
    padded = PreferenceCollator(0, shared_prompts=True)(PAIRS)
    assert padded["input_ids"].tolist() == [[1, 2, 3, 9, 4, 5, 9], [7, 9, 8, 9, 0, 0, 0]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 0, 1, 0, 0, 0]]
    assert padded["segments"].tolist() == [[0, 0, 1, 1, 2, 2, 2], [4, 4, 5, 5, -1, -1, -1]]
    assert padded["rows"].tolist() == [1, 2, 7, 1, 4, 5, 9]
    packed = PreferenceCollator(0, padding_free=True, shared_prompts=True)(PAIRS)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 9, 4, 5, 9, 7, 9, 8, 9]]
    assert packed["segments"].tolist() == [[0, 0, 1, 1, 2, 2, 2, 4, 4, 5, 5]]
    assert packed["rows"].tolist() == [1, 2, 7, 1, 4, 5, 9]
    for batch in (padded, packed):
        assert "attention_mask" not in batch
        for name in ("targets", "cu_seqlens", "row_lengths", "num_tokens"):
            assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(plain[name])), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_and_stored_states_of_predicted_tokens(layout):
    """A response without a prompt loses its first token; states are those of the rows that the cache knows."""
    weights = (
        {"chosen_w": [0.5, 0.25], "rejected_w": [1.0, 2.0, 4.0]},
        {"chosen_w": [8.0, 16.0], "rejected_w": [32, 64]},
    )
    rows = [{**row, **columns, "token_row": at} for row, columns, at in zip(PAIRS, weights, (5, 3))]

    def stored(row, side):
        return torch.full((2, 3), float(row + (0.5 if side == "rejected" else 0)))

    batch = PreferenceCollator(0, stored_hidden=stored, token_columns=("w",), **layout)(rows)
    assert {name: column.dtype for name, column in batch["token_columns"].items()} == {"w": torch.float32}
    assert batch["token_columns"]["w"].tolist() == [0.5, 0.25, 16, 1, 2, 4, 64]
    assert batch["ref_hidden"].shape == (8, 3)
    assert batch["ref_hidden"][:, 0].tolist() == [5, 5, 3, 3, 5.5, 5.5, 3.5, 3.5]
    assert batch["dataset_row"].tolist() == [-1, -1]  # of no dataset
    plain = PreferenceCollator(0, **layout)(rows)
    assert "ref_hidden" not in plain
    assert "token_columns" not in plain


@pytest.mark.parametrize("packed", [False, True])
def test_response_tokens_that_a_hidden_state_predicts(packed):
    """All but a sequence's very first token; the last sequence has none at all."""
    ids = torch.tensor([[1, 2, 3, 9], [7, 9, 0, 0], [5, 6, 8, 0]])
    is_response = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    starts = torch.tensor([0, 4, 8])
    if packed:
        ids, is_response = ids[ids > 0][None], is_response[ids > 0][None]
        starts = torch.tensor([0, 4, 6])
    found = predicted_responses(ids, is_response, starts)
    assert found["rows"].tolist() == [1, 2, 4]
    assert found["targets"].tolist() == [3, 9, 9]
    assert found["cu_seqlens"].tolist() == [0, 2, 3, 3]
    assert is_response.sum() == 4  # the mask that was given stays as it was


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
