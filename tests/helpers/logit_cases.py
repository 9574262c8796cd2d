"""Rows of logits, and the bound that errors are held to."""

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One size per regime: a single entry, below one vector, unaligned, aligned, GPT-2's and Qwen's vocabulary.
VOCABULARIES = [1, 7, 507, 1024, 50257, 151936]
# What a ValueError of an operator in C++ is in Python (csrc/stable.h).
REFUSED = ValueError if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15) else RuntimeError


def random_rows(rows, vocab, dtype=torch.float32, perturbation=0.5, ignored=()):
    """Logits, reference logits near them, and labels."""
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    ref_logits = (logits.double() + perturbation * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocab, (rows,))
    labels[list(ignored)] = -100
    return logits, ref_logits, labels


def assert_as_good_as_eager(ours, eager, truth, what, factor=2.0):
    """Our largest error is within `factor` of same-dtype eager torch's own, plus one rounding of the largest value.

    A value that both have to round may fall to the other side of the truth by luck. Numbers below 1 are given two
    roundings of 1; in float64 eager is the truth itself, so a few more are allowed.
    """
    error, eager_error = ((value.double() - truth).abs().max().item() for value in (ours, eager))
    largest = truth.abs().max().item() if truth.isfinite().all() else 1.0
    scale = 2.0 ** math.floor(math.log2(max(1.0, largest)))
    floor = 64 * scale * torch.finfo(torch.float64).eps if ours.dtype == torch.float64 else 0.0
    floor = floor or torch.finfo(torch.float32).eps * max(2.0, scale)
    assert error <= factor * eager_error + floor, f"{what}: error {error:.3g}, eager's {eager_error:.3g}"
