"""float16: gradients of small slopes keep their digits, whatever the plan, as long as float16 holds the result."""

import itertools

import pytest
import torch
from torch.nn.functional import softplus

from helpers.linear_cases import kind_of, loss_and_gradients, make_case
from tdpo_ext import MarginLoss, eager, linear_preference_loss, linear_token_divergence, per_token
from tdpo_ext.fused import half
from tdpo_ext.ops.operators import RowOptions

pytestmark = pytest.mark.usefixtures("large_calls")

LOSS_SCALE = 65536.0  # a GradScaler's
# (budget, (tokens, width), kind of plan); a wide dW leaves room to keep the dz of a long pair.
PLANS = {
    "one chunk": (1 << 30, (60, 16), "one chunk"),
    "several chunks": (600_000, (60, 16), "several chunks"),
    "long pairs, dz kept": (330_000, (60, 400), "deferred"),
    "long pairs, dW summed apart": (200_000, (150, 16), "deferred"),
    "streamed": (150_000, (60, 16), "streamed"),
}
# e^-x is the slope of the loss where a pair is separated by 10 x nats, at beta 0.1.
SEPARATIONS = [0.0, 6.0, 10.0, 12.0]


def separated(margin):
    return softplus(-margin)


@per_token
def margin_of(chosen, rejected):
    """TDPO2's, of pairs that are separated by the sum of a column more."""
    margin = 0.1 * (chosen.sum(chosen.logratio) - rejected.sum(rejected.logratio)) - 0.05 * rejected.sum(rejected.kl)
    return margin + chosen.sum(chosen.columns["separation"])


def objective_of(plan):
    """An ordinary function where long pairs shall be streamed."""
    if plan == "streamed":
        return per_token(lambda chosen, rejected: separated(margin_of(chosen, rejected)))
    return MarginLoss(margin_of, separated)


def gradients_and_truth(separations, plan, plans, **options):
    """Of a loss that a GradScaler has multiplied, in float16 and in float64."""
    budget, (tokens, width), kind = PLANS[plan]
    case = make_case(torch.float16, pairs=len(separations), tokens=tokens, width=width, bias=True)
    found = loss_and_gradients(
        linear_preference_loss,
        case,
        objective_of(plan),
        scale=LOSS_SCALE,
        logits_budget=budget,
        token_columns={"separation": column_of(case, separations)},
        **options,
    )
    assert kind_of(plans[-1]) == kind
    if kind == "deferred":
        assert plans[-1].weight_apart == plan.endswith("apart")

    def true_objective(chosen, rejected):
        margin = 0.1 * (chosen.logratio - rejected.logratio) - 0.05 * rejected.kl
        return separated(margin + torch.tensor(separations))

    truth = loss_and_gradients(eager.linear_preference_loss, case, true_objective, torch.float64, LOSS_SCALE, **options)
    return found[2], truth[2]


def column_of(case, separations):
    """A token column whose sum over a chosen response is the separation of its pair."""
    column = torch.zeros(case.labels.shape)
    for pair, separation in enumerate(separations):
        column[pair, (case.labels[pair] != -100).nonzero()[0, 0]] = separation
    return column


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("kl_direction", ["forward", "reverse"])
@pytest.mark.parametrize("plan", PLANS)
def test_each_pair_of_a_batch_keeps_its_gradient(plan, kl_direction, plans):
    """Although the slopes of the pairs differ by five digits."""
    found, truth = gradients_and_truth(SEPARATIONS, plan, plans, kl_direction=kl_direction)
    for sequence, (of_sequence, exact) in enumerate(zip(found["hidden"], truth["hidden"])):
        assert relative_error(of_sequence, exact) < 1e-3, sequence
    for name in ("weight", "bias"):
        assert relative_error(found[name], truth[name]) < 1e-3, name


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_all_pairs_are_well_separated(plan, separation, plans):
    found, truth = gradients_and_truth([separation] * 3, plan, plans)
    for name in ("hidden", "weight"):
        assert relative_error(found[name], truth[name]) < 1e-3, name


def test_a_loss_scale_that_changes_between_calls():
    """The sums of a call start anew, and a factor of the loss is taken in float32: 2^-20 of a slope of 2^20."""
    case = make_case(torch.float16)
    plain = loss_and_gradients(linear_preference_loss, case, lambda c, r: c.logratio - r.logratio - r.kl, scale=1.0)
    steep = loss_and_gradients(
        linear_preference_loss, case, lambda c, r: 2.0**20 * (c.logratio - r.logratio - r.kl), scale=2.0**-20
    )
    for name in ("hidden", "weight"):
        torch.testing.assert_close(plain[2][name], steep[2][name], rtol=0, atol=0)


@pytest.mark.parametrize("slope", [2.0**-30, 1.0, 2.0**10])
def test_per_token_values_with_a_steep_or_flat_upstream_gradient(slope):
    case = make_case(torch.float16, bias=True)

    def gradients(function, dtype=None):
        tensors = case.tensors(dtype)
        values = function(**tensors)
        leaves = [tensors[name] for name in ("hidden", "weight", "bias")]
        total = slope * (values.logps.sum() + 2 * values.kl.sum()) * (LOSS_SCALE if slope < 1 else 1)
        return torch.autograd.grad(total, leaves)

    truth = gradients(eager.linear_token_divergence, torch.float64)
    for found, exact in zip(gradients(linear_token_divergence), truth):
        smallest = 2.0**-24 * exact.numel() ** 0.5  # what float16 itself cannot hold
        assert (found.double() - exact).norm() < 1e-3 * exact.norm() + smallest


def test_hidden_states_of_any_size():
    """Large activations, whose products with dz would not fit float16, beside small ones."""
    case = make_case(torch.float16, pairs=2)
    case.hidden[0] *= 2.0**10
    case.weight *= 2.0**-8
    case.hidden[1] *= 2.0**-10
    found = loss_and_gradients(linear_preference_loss, case, lambda c, r: c.logps - r.logps, scale=0.1)
    truth = loss_and_gradients(eager.linear_preference_loss, case, lambda c, r: c.logps - r.logps, torch.float64, 0.1)
    for name in ("hidden", "weight"):
        assert relative_error(found[2][name], truth[2][name]) < 1e-3, name


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_no_entry_of_dz_exceeds_what_the_scale_allows(reverse_kl):
    """By the gradients of rows from flat to peaked, of logits near and far from the reference's."""
    options = RowOptions(0, 50, temperature=0.5, reverse_kl=reverse_kl)
    largest = 0.0
    for seed, sharpness in itertools.product(range(20), (0.1, 3.0, 30.0)):
        torch.manual_seed(seed)
        z, r = sharpness * torch.randn(2, 4, 50, dtype=torch.float64)
        z.requires_grad_()
        labels = torch.randint(50, (4,))
        values = eager.token_divergence(
            z, r, labels, temperature=0.5, kl_direction="reverse" if reverse_kl else "forward"
        )
        logps_grad, kl_grad = torch.randn(2, 4).double() * torch.empty(2, 4).uniform_(-14, 5).exp().double()
        (logps_grad * values.logps + kl_grad * values.kl).sum().backward()
        scales = half.dz_scales(logps_grad, kl_grad, values.kl.detach(), options)
        scaled = (z.grad * scales[:, None]).abs().amax(1)
        assert (scaled <= 2.0**14).all()
        largest = max(largest, scaled.max().item())
    assert largest > 2.0**12


def test_rows_without_a_gradient_and_calls_without_rows():
    case = make_case(torch.float16, ignored=1.0)
    _, _, grads = loss_and_gradients(linear_preference_loss, case, lambda c, r: c.logps - r.logps)
    assert all((grad == 0).all() for grad in grads.values())
    case = make_case(torch.float16)
    _, _, grads = loss_and_gradients(linear_preference_loss, case, lambda c, r: 0.0 * (c.logps - r.logps))
    assert all((grad == 0).all() for grad in grads.values())


def test_what_is_not_a_number_reaches_every_gradient():
    """As a GradScaler expects, which then skips the step."""
    case = make_case(torch.float16, ignored=0.0)
    case.hidden[0, 0, 0] = torch.nan
    _, _, grads = loss_and_gradients(linear_preference_loss, case, lambda c, r: c.logps - r.logps)
    assert grads["weight"].isnan().all()
    assert grads["hidden"][0].isnan().any()
