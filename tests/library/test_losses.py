"""The pairwise losses against the paper's equations in independent arithmetic."""

import functools

import mpmath
import pytest
import torch

from tdpo_ext import MarginLoss, TokenDivergence, dpo_loss, rewards, tdpo_loss, token_divergence
from tdpo_ext.losses import dpo_margin_loss, margin_form, tdpo_margin_loss

mpmath.mp.dps = 50
BETA, ALPHA = 0.3, 0.7
# Per-sequence sums of three pairs: logps, ref_logps, kl.
CHOSEN = [(-11.0, -12.5, 0.8), (-30.0, -29.0, 2.5), (-4.25, -4.5, 0.0)]
REJECTED = [(-14.0, -13.0, 1.7), (-25.5, -28.0, 0.4), (-6.0, -2.0, 9.0)]


def side(values):
    logps, ref_logps, kl = (torch.tensor(column, dtype=torch.float64) for column in zip(*values))
    unused = torch.zeros_like(kl)
    return TokenDivergence(
        logps=logps.requires_grad_(),
        ref_logps=ref_logps,
        kl=kl.requires_grad_(),
        entropy=unused,
        correct=unused,
        tokens=unused,
    )


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


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (tdpo_loss, {}),
        (tdpo_loss, {"variant": "tdpo1"}),
        (tdpo_loss, {"beta": 0.3}),
        (tdpo_loss, {"alpha": 0.7}),
        (dpo_loss, {}),
        (dpo_loss, {"beta": 0.3}),
        (dpo_loss, {"label_smoothing": 0.2}),
    ],
)
def test_margin_forms_are_the_losses(loss, options):
    """What the fused loss takes in place of a loss, or of a partial of it, has its defaults too."""
    chosen, rejected = side(CHOSEN), side(REJECTED)
    expected = loss(chosen, rejected, **options)
    assert torch.equal(margin_form(functools.partial(loss, **options))(chosen, rejected), expected)
    form = {tdpo_loss: tdpo_margin_loss, dpo_loss: dpo_margin_loss}[loss]
    assert torch.equal(form(**options)(chosen, rejected), expected)
    if not options:
        assert torch.equal(margin_form(loss)(chosen, rejected), expected)


def test_other_objectives_have_no_margin_form():
    own = MarginLoss(lambda chosen, rejected: chosen.logps, torch.sigmoid)
    assert margin_form(own) is own
    assert margin_form(lambda chosen, rejected: chosen.logps) is None
    assert margin_form(functools.partial(tdpo_loss, side(CHOSEN))) is None  # a side is fixed


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


# Two pairs of two tokens each over a vocabulary of three, worked out from the logits.
LOGITS = [[[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], [[-0.75, 0.0, 1.25], [2.5, -2.0, 0.125]]]
REF_LOGITS = [[[0.25, -0.5, 1.0], [1.0, 0.75, -1.5]], [[0.5, 0.5, 0.5], [2.0, -1.0, 1.0]]]
LABELS = [[2, 0], [1, 2]]  # the first sequence is chosen, the second rejected


def loss_from_logits(loss, logits, stopped_kl=None):
    """The paper's equations from the start, in 50 digits: (loss, KL of the chosen sequence).

    `logits` are mpmath numbers by (sequence, token, entry); `stopped_kl` stands for what a stopgrad holds fast.
    """
    sums = []
    for sequence in range(2):
        logratio = kl = mpmath.mpf(0)
        for token in range(2):
            z = [logits[sequence, token, v] for v in range(3)]
            r = [mpmath.mpf(v) for v in REF_LOGITS[sequence][token]]
            log_p, log_q = ([x - mpmath.log(sum(map(mpmath.exp, row))) for x in row] for row in (z, r))
            label = LABELS[sequence][token]
            logratio += log_p[label] - log_q[label]
            kl += sum(mpmath.exp(q) * (q - p) for p, q in zip(log_p, log_q))
        sums.append((logratio, kl))
    (chosen, kl_chosen), (rejected, kl_rejected) = sums
    weight = {"dpo": 0, "tdpo1": 1, "tdpo2": mpmath.mpf(ALPHA)}[loss]
    held = kl_chosen if stopped_kl is None else stopped_kl
    margin = chosen - rejected - weight * (kl_rejected - held)
    return mpmath.log(1 + mpmath.exp(-mpmath.mpf(BETA) * margin)), kl_chosen


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_sized_logits(loss, dtype):
    point = {(s, t, v): mpmath.mpf(LOGITS[s][t][v]) for s in range(2) for t in range(2) for v in range(3)}
    value, kl_chosen = loss_from_logits(loss, point)
    stopped_kl = kl_chosen if loss == "tdpo2" else None
    gradient = torch.zeros(2, 2, 3, dtype=torch.float64)
    for key in point:

        def along(x, key=key):
            return loss_from_logits(loss, {**point, key: x}, stopped_kl)[0]

        gradient[key] = float(mpmath.diff(along, point[key]))

    leaf = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    divergence = token_divergence(leaf, torch.tensor(REF_LOGITS, dtype=dtype), torch.tensor(LABELS))
    chosen, rejected = divergence.per_sequence().chunk(2)
    if loss == "dpo":
        ours = dpo_loss(chosen, rejected, beta=BETA)
    else:
        ours = tdpo_loss(chosen, rejected, beta=BETA, alpha=ALPHA, variant=loss)
    ours.sum().backward()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert ours.item() == pytest.approx(float(value), rel=tolerance)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance)
