"""The pairwise losses against the paper's equations in independent arithmetic."""

import mpmath
import pytest
import torch

from tdpo_ext import TokenDivergence, dpo_loss, rewards, tdpo_loss

mpmath.mp.dps = 50
BETA, ALPHA = 0.3, 0.7
# Per-sequence sums of three pairs: logps, ref_logps, kl.
CHOSEN = [(-11.0, -12.5, 0.8), (-30.0, -29.0, 2.5), (-4.25, -4.5, 0.0)]
REJECTED = [(-14.0, -13.0, 1.7), (-25.5, -28.0, 0.4), (-6.0, -2.0, 9.0)]


def side(values):
    logps, ref_logps, kl = (torch.tensor(column, dtype=torch.float64) for column in zip(*values))
    return TokenDivergence(logps.requires_grad_(), ref_logps, kl.requires_grad_(), torch.zeros_like(kl))


def by_hand(loss, pair):
    """Loss, and its derivatives by the sums that carry gradient, in 50 digits."""
    (lw, rw, kw), (ll, rl, kl) = CHOSEN[pair], REJECTED[pair]

    def value(lw=lw, kw=kw, ll=ll, kl=kl):
        u = mpmath.mpf(lw) - rw - (mpmath.mpf(ll) - rl)
        if loss == "tdpo1":
            u -= mpmath.mpf(kl) - kw
        if loss == "tdpo2":
            u -= mpmath.mpf(ALPHA) * (mpmath.mpf(kl) - kw)
        return mpmath.log(1 + mpmath.exp(-mpmath.mpf(BETA) * u))

    def derivative(name, at):
        return float(mpmath.diff(lambda x: value(**{name: x}), mpmath.mpf(at)))

    gradients = [derivative("lw", lw), derivative("ll", ll), derivative("kw", kw), derivative("kl", kl)]
    if loss == "tdpo2":
        gradients[2] = 0.0  # stopgrad
    return float(value()), gradients


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2"])
def test_losses_by_hand(loss):
    chosen, rejected = side(CHOSEN), side(REJECTED)
    if loss == "dpo":
        values = dpo_loss(chosen, rejected, beta=BETA)
    else:
        values = tdpo_loss(chosen, rejected, beta=BETA, alpha=ALPHA, variant=loss)
    leaves = (chosen.logps, rejected.logps, chosen.kl, rejected.kl)
    grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    for pair in range(3):
        expected, gradients = by_hand(loss, pair)
        assert values[pair].item() == pytest.approx(expected, rel=1e-13)
        for grad, wanted in zip(grads, gradients):
            assert (0.0 if grad is None else grad[pair].item()) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_the_default_is_tdpo2():
    chosen, rejected = side(CHOSEN), side(REJECTED)
    assert torch.equal(tdpo_loss(chosen, rejected), tdpo_loss(chosen, rejected, beta=0.1, alpha=0.5, variant="tdpo2"))
    assert not torch.equal(tdpo_loss(chosen, rejected), tdpo_loss(chosen, rejected, variant="tdpo1"))


def test_tdpo2_with_alpha_zero_is_dpo():
    chosen, rejected = side(CHOSEN), side(REJECTED)
    torch.testing.assert_close(tdpo_loss(chosen, rejected, alpha=0.0), dpo_loss(chosen, rejected))


def test_label_smoothing():
    chosen, rejected = side(CHOSEN), side(REJECTED)
    smooth = dpo_loss(chosen, rejected, label_smoothing=0.1)
    mix = 0.9 * dpo_loss(chosen, rejected) + 0.1 * dpo_loss(rejected, chosen)
    torch.testing.assert_close(smooth, mix)


def test_rewards():
    got = rewards(side(CHOSEN), beta=2.0)
    assert got.tolist() == pytest.approx([2 * (1.5 + 0.8), 2 * (-1.0 + 2.5), 2 * 0.25])
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("function", "options", "name"),
    [
        (tdpo_loss, {"beta": 0.0}, "beta"),
        (tdpo_loss, {"beta": float("nan")}, "beta"),
        (tdpo_loss, {"alpha": -0.1}, "alpha"),
        (tdpo_loss, {"variant": "tdpo3"}, "variant"),
        (dpo_loss, {"beta": -1.0}, "beta"),
        (dpo_loss, {"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_bad_options_are_named(function, options, name):
    with pytest.raises(ValueError, match=name):
        function(side(CHOSEN), side(REJECTED), **options)


def test_bad_beta_of_rewards():
    with pytest.raises(ValueError, match="beta"):
        rewards(side(CHOSEN), beta=0.0)
