"""Scratch memory: what lies between the rows of a buffer reaches no product."""

import pytest
import torch

import tdpo_ext
from tdpo_ext.fused import gradients, heads, weight_gradient
from tdpo_ext.ops import matmul, memory
from tdpo_ext.ops.memory import Buffer

ROWS, COLUMNS, PITCH, WIDTH = 231, 1100, 1152, 32


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


@pytest.mark.parametrize("budget", [1 << 30, 100 * 1152 * 8])  # at once, and slices of the vocabulary
def test_dz_over_wider_logits_is_followed_by_zeros(budget, monkeypatch):
    seen = []

    def checked(a, b, out, *, accumulate=False):
        dz = a if a.shape[0] == len(hidden) else a.t()
        if dz.shape[0] == len(hidden) and dz.stride(0) != dz.shape[1] != WIDTH:
            behind = -dz.shape[1] % 64
            after = dz.as_strided((len(dz), behind), dz.stride(), dz.storage_offset() + dz.shape[1])
            assert torch.equal(after, torch.zeros_like(after))
            seen.append(behind)
        return matmul.product(a, b, out, accumulate=accumulate)

    for module in (gradients, heads, weight_gradient):
        monkeypatch.setattr(module, "product", checked)
    hidden = torch.randn(2 * ROWS, WIDTH).bfloat16().requires_grad_()
    weight = torch.randn(COLUMNS, WIDTH).bfloat16().requires_grad_()
    labels = torch.randint(COLUMNS, (2 * ROWS,))
    lengths = {"row_lengths": [ROWS, ROWS], "logits_budget": budget}
    loss, _ = tdpo_ext.linear_token_loss(
        lambda sums: sums.kl.log1p(), hidden, weight, hidden.detach() * 0.9, weight.detach(), labels, **lengths
    )
    loss.backward()
    assert any(seen)
    assert hidden.grad.isfinite().all()
