"""Rows with peaks: no worse than eager float32, in whatever order and slices the vocabulary comes."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.logit_cases import REFUSED
from tdpo_ext import eager, token_divergence
from tdpo_ext.ops import operators
from tdpo_ext.ops.operators import RowOptions

EPS = torch.finfo(torch.float32).eps


def peaked_rows(vocab, rows, spikes, seed, perturbation=0.0):
    """Logits and reference logits that agree but for spikes: (policy's height, reference's height) each."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator)
    r = z + perturbation * torch.randn(rows, vocab, generator=generator)
    for z_height, r_height in spikes:
        at = torch.randint(vocab, (rows, 1), generator=generator)
        z.scatter_(1, at, z_height)
        r.scatter_(1, at, r_height)
    return z, r


def kl_errors(function, z, r):
    labels = torch.zeros(len(z), dtype=torch.int64)
    truth = eager.token_divergence(z.double(), r.double(), labels).kl
    return ((function(z, r, labels).kl.double() - truth).abs() / truth).max().item()


def in_slices(cuts):
    """token_divergence from merged states of slices."""

    def divergence(z, r, labels):
        vocab = z.shape[1]
        bounds = sorted({0, vocab, *(round(cut * vocab) for cut in cuts)})
        states = [
            operators.row_states(z[:, a:b], r[:, a:b], labels, RowOptions(vocab_start=a, vocab_size=vocab))
            for a, b in itertools.pairwise(bounds)
        ]
        merged = operators.merge_row_states(torch.stack(states), reverse_kl=False)
        values = operators.finalize_row_states(merged, labels, RowOptions(vocab_start=0, vocab_size=vocab))
        return token_divergence(z, r, labels)._make(values)

    return divergence


def test_one_maximum_that_rises_alone():
    """A spike of the policy alone, before the one that both share: the sums are moved out and back."""
    vocab = 151_936
    z = torch.randn(8, vocab)
    r = z.clone()
    z[:, vocab // 3], r[:, vocab // 3] = 15, 0
    z[:, -7] = r[:, -7] = 20
    assert kl_errors(token_divergence, z, r) < 2e-6
    assert kl_errors(token_divergence, z.flip(1), r.flip(1)) < 2e-6
    assert kl_errors(in_slices([0.1, 0.3, 0.34, 0.9]), z, r) < 2e-6


def test_no_mass_is_left_below_a_peak_of_the_policy():
    """The second of the policy's two equal peaks is the reference's only one: half its mass, so the KL is ln 2."""
    z, r = torch.randn(1, 9000), torch.randn(1, 9000)
    z[0, 100] = z[0, 5000] = r[0, 5000] = 300
    for labels in (torch.tensor([100]), torch.tensor([5000])):
        forward, reverse = token_divergence(z, r, labels), token_divergence(r, z, labels, kl_direction="reverse")
        assert forward.kl.item() == pytest.approx(math.log(2), rel=1e-6)
        assert reverse.kl.item() == pytest.approx(math.log(2), rel=1e-6)
        assert forward.logps.item() == pytest.approx(-math.log(2), rel=1e-6)


@pytest.mark.parametrize("whose", ["policy", "reference"])
@pytest.mark.parametrize("height", [20.0, 200.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_one_maximum_alone_rises_in_a_later_block(whose, height, direction):
    rows = [torch.randn(2, 9000), torch.randn(2, 9000)]
    rows[whose == "reference"][:, 7000] = height
    labels = torch.tensor([7000, 10])
    ours = token_divergence(*rows, labels, kl_direction=direction)
    truth = eager.token_divergence(*(row.double() for row in rows), labels, kl_direction=direction)
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.correct.tolist() == [float(whose == "policy"), 0.0]


def test_the_kl_is_never_negative():
    """One entry of two million differs by 0.1: a KL of 2.5e-9, beside which the sums' roundings are large."""
    z, r = torch.zeros(1, 2_000_000), torch.zeros(1, 2_000_000)
    z[0, 0] = 0.1
    for direction in ("forward", "reverse"):
        assert token_divergence(z, r, torch.tensor([0]), kl_direction=direction).kl.item() >= 0
        assert token_divergence(r, z, torch.tensor([0]), kl_direction=direction).kl.item() >= 0


@given(
    vocab=st.sampled_from([500, 5_000, 40_000]),
    spikes=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=4),
    shared=st.floats(0, 30),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    perturbation=st.sampled_from([0.0, 1e-3, 1e-1]),
    seed=st.integers(0, 1 << 30),
)
def test_no_worse_than_eager_whatever_the_order(vocab, spikes, shared, cuts, perturbation, seed):
    z, r = peaked_rows(vocab, 3, [*spikes, (shared, shared)], seed, perturbation)
    labels = torch.zeros(3, dtype=torch.int64)
    truth = eager.token_divergence(z.double(), r.double(), labels)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    ours = [
        token_divergence(z, r, labels).kl,
        token_divergence(z[:, order], r[:, order], labels).kl,
        token_divergence(z.flip(1), r.flip(1), labels).kl,
        in_slices(cuts)(z, r, labels).kl,
    ]
    rounded = eager.token_divergence(z, r, labels).kl
    # A few roundings of the value, and one of what is of the size of the log-sum-exps on the way.
    lse = torch.stack([z.double().logsumexp(-1).abs(), r.double().logsumexp(-1).abs()]).amax(0)
    floor = EPS * (16 * truth.kl + 0.5 * lse)
    for kl in ours:
        error, eager_error = (kl.double() - truth.kl).abs(), (rounded.double() - truth.kl).abs()
        assert (error <= 2 * eager_error.max() + floor).all()  # the worst row: one alone may round luckily
        assert (kl >= 0).all()


@pytest.mark.parametrize("offset", [10.0, -13.0, 30.0, -100.0, 1e4, -1e6])
@pytest.mark.parametrize("perturbation", [1.0, 1e-2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_logits_with_an_offset(offset, perturbation, direction, whose):
    """Softmax does not see an offset of all logits. z - r would keep only the digits that it leaves."""
    z = 3 * torch.randn(12, 50_257)
    r = z + perturbation * torch.randn(12, 50_257) + offset
    if whose == "policy":
        z, r = r, z
    labels = torch.zeros(12, dtype=torch.int64)
    truth = eager.token_divergence(z.double(), r.double(), labels, kl_direction=direction).kl
    ours, rounded = (
        ((function(z, r, labels, kl_direction=direction).kl.double() - truth).abs() / truth).median()
        for function in (token_divergence, eager.token_divergence)
    )
    assert ours < max(rounded, 2 * EPS)
    assert ours < 1e-5


@pytest.mark.parametrize("mask", [-1e9, -3e9, -1e30, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("place", ["front", "back", "everywhere but one block"])
def test_masks_of_any_size(mask, place):
    """Blocks, slices and threads that see nothing but masked entries have no mass."""
    z = torch.randn(3, 9000)
    r = z + 0.1 * torch.randn(3, 9000)
    masked = {"front": slice(0, 4500), "back": slice(5000, 9000), "everywhere but one block": slice(100, 9000)}[place]
    z[:, masked] = r[:, masked] = mask
    labels = torch.tensor([{"front": 8000}.get(place, 50)] * 3)
    truth = eager.token_divergence(z.double(), r.double(), labels)
    for function in (token_divergence, in_slices([0.2, 0.4, 0.8])):
        for value, expected in zip(function(z, r, labels), truth):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e9, 3e9, 1e20, 3e38, torch.inf, -1e9])
@pytest.mark.parametrize("name", ["logits", "ref_logits"])
def test_logits_beyond_the_exponents_are_refused(size, name):
    rows = {"logits": torch.zeros(2, 9), "ref_logits": torch.zeros(2, 9)}
    if size > 0:
        rows[name][1, 4] = size
    else:
        rows[name][1] = size
    with pytest.raises(REFUSED, match=r"logits or ref_logits .* at row 1"):
        token_divergence(**rows, labels=torch.tensor([1, 2]))


@pytest.mark.parametrize("size", [1e3, 1e6, 7e8])
def test_large_logits_give_finite_values(size):
    z, r = size * torch.randn(4, 300).clamp(-1, 1), size * torch.randn(4, 300).clamp(-1, 1)
    divergence = token_divergence(z.requires_grad_(), r, torch.tensor([1, 2, 3, 4]))
    (divergence.logps.sum() + divergence.kl.sum()).backward()
    assert divergence.kl.isfinite().all()
    assert (divergence.kl >= 0).all()
    assert (divergence.entropy >= 0).all()
    assert z.grad.isfinite().all()
