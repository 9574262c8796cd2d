"""Inputs and bounds shared by the tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One size per regime: a single entry, below one vector, unaligned, aligned, GPT-2's and Qwen's vocabulary.
VOCABULARIES = [1, 7, 507, 1024, 50257, 151936]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_rows(rows, vocab, dtype=torch.float32, perturbation=0.5, ignored=()):
    """Logits, reference logits near them, and labels."""
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    ref_logits = (logits.double() + perturbation * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocab, (rows,))
    labels[list(ignored)] = -100
    return logits, ref_logits, labels


def assert_as_good_as_eager(ours, eager, truth, what, factor=2.0):
    """Our largest error is within `factor` of same-dtype eager torch's own, or two roundings of a number near 1.

    In float64 eager is the truth itself, so a few more roundings are allowed.
    """
    error, eager_error = ((value.double() - truth).abs().max().item() for value in (ours, eager))
    floor = 64 * 2.2e-16 if ours.dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    assert error <= factor * eager_error + floor, f"{what}: error {error:.3g}, eager's {eager_error:.3g}"
