"""Scratch memory: what lies between the rows of a buffer reaches no product."""

import pytest
import torch

from tdpo_ext.ops import memory
from tdpo_ext.ops.memory import Buffer

ROWS, COLUMNS, PITCH = 231, 1100, 1152


def poisoned(shape, dtype, device):
    return torch.full(shape, 255, dtype=dtype, device=device)  # bytes of NaN in every precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_padded_rows_is_free_of_what_the_memory_held(dtype, monkeypatch):
    """Where a processor multiplies in tiles, torch reads beyond the columns of a view."""
    monkeypatch.setattr(memory, "empty", poisoned)
    buffers = {"dz": Buffer((ROWS, COLUMNS), dtype, PITCH)}
    padded = memory.allocate(torch.device("cpu"), buffers, budget=1 << 30)["dz"]
    assert padded.isnan().all()  # what callers write, before they do
    assert padded.stride() == (PITCH, 1)
    assert torch.equal(padded.as_strided((ROWS, PITCH), (PITCH, 1))[:, COLUMNS:], torch.zeros(ROWS, PITCH - COLUMNS))
    padded.copy_(torch.randn(ROWS, COLUMNS))
    weight = torch.randn(COLUMNS, 32, dtype=dtype)
    assert torch.mm(padded, weight).isfinite().all()
