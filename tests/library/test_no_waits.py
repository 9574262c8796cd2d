"""The host never waits for the device: what a fused loss reads back, and how many operations a chunk costs.

Shown without a GPU: under FakeTensorMode there is no data, so that whatever would make the host look at a tensor
raises; and a dispatch mode counts operations. `reading_is_free` is patched to take the paths that a GPU takes.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tdpo_ext.fused.objective_gradient
import tdpo_ext.fused.rows
import tdpo_ext.fused.run
import tdpo_ext.fused.streaming
from helpers.linear_cases import OBJECTIVES, kind_of, make_case, not_a_margin_loss
from tdpo_ext import linear_preference_loss, linear_token_divergence, per_token

pytestmark = pytest.mark.usefixtures("large_calls")
LENGTHS = [11, 4, 7, 9, 11, 1]
# Operators whose result the host reads, or whose shape depends on data.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


def check_linear_on_a_device(objective, coefficients, others):
    """On a GPU an assertion of the device, which the host does not wait for."""
    torch._assert_async(torch.isclose(coefficients, others).all(), "a margin that is not linear")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    for module in (tdpo_ext.fused.rows, tdpo_ext.fused.run, tdpo_ext.fused.streaming):
        monkeypatch.setattr(module, "reading_is_free", lambda device: False)
    monkeypatch.setattr(tdpo_ext.fused.objective_gradient, "check_linear", check_linear_on_a_device)
    monkeypatch.setattr(
        tdpo_ext.ops.memory, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
    )


def packed_arguments(lengths=LENGTHS, **sizes):
    rows = sum(lengths)
    case = make_case(pairs=1, tokens=(rows + 1) // 2, ignored=0.0, **sizes)
    tensors = case.tensors()
    for name in ("hidden", "ref_hidden", "labels"):
        tensors[name] = tensors[name].flatten(0, 1)[:rows].detach()
    tensors["hidden"].requires_grad_()
    return tensors


@per_token
def weighted(chosen, rejected):
    w, l = chosen.columns["weight"], rejected.columns["weight"]
    return torch.nn.functional.softplus(rejected.mean(l * rejected.logratio) - chosen.sum(w * chosen.kl))


LONG = [60, 9, 50, 70]
# (objective, kind of plan, budget, lengths, width): one chunk, several, blocks of a pair, slices of the vocabulary.
PLANS = {
    "one chunk": ("tdpo2", "one chunk", 1 << 30, LENGTHS, 16),
    "several chunks": ("tdpo2", "several chunks", 90_000, LENGTHS, 16),
    "deferred, dW apart": ("tdpo1", "deferred", 200_000, LONG, 16),
    "deferred, dz kept": ("tdpo1", "deferred", 400_000, LONG, 300),
    "streaming": (not_a_margin_loss, "streamed", 30_000, LENGTHS, 16),
    "per token": (weighted, "several chunks", 90_000, LENGTHS, 16),
    "streaming per token": (weighted, "streamed", 30_000, LENGTHS, 16),
}


def faked(mode, tensors):
    """The same arguments without data."""
    return {
        name: None if tensor is None else mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_read_where_the_lengths_are_given(plan, plans):
    name, kind, budget, lengths, width = PLANS[plan]
    objective = OBJECTIVES[name] if isinstance(name, str) else name
    columns = {"weight": torch.rand(sum(lengths), requires_grad=True)} if "token" in plan else {}
    arguments = packed_arguments(lengths, width=width)
    offsets = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    options = {"row_lengths": lengths, "logits_budget": budget}
    linear_preference_loss(objective, **arguments, **offsets, token_columns=columns, **options)  # checks the objective
    assert kind_of(plans[-1]) == kind
    if kind == "deferred":
        assert (plans[-1].keeps_dz, plans[-1].weight_apart) == (width == 300, width == 16)
    mode = FakeTensorMode()
    arguments, offsets, columns = (faked(mode, tensors) for tensors in (arguments, offsets, columns))
    with mode, torch.enable_grad():
        loss, _, _ = linear_preference_loss(objective, **arguments, **offsets, token_columns=columns, **options)
        loss.backward()
    for leaf in (arguments["hidden"], arguments["weight"], *columns.values()):
        assert leaf.grad.shape == leaf.shape


def test_per_token_values_read_nothing():
    mode = FakeTensorMode()
    arguments = faked(mode, packed_arguments())
    with mode, torch.enable_grad():
        divergence = linear_token_divergence(**arguments, logits_budget=30_000)
        (divergence.logps.sum() + divergence.kl.sum()).backward()
    assert arguments["hidden"].grad.shape == arguments["hidden"].shape


class Counter(TorchDispatchMode):
    """Names of the dispatched operations, and of host reads among them."""

    def __init__(self):
        super().__init__()
        self.operations, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operations.append(name)
        if name in READS:
            self.reads.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_lists(counter):
    """Counts `Tensor.tolist`, which dispatches nothing on the CPU, as one read."""
    tolist = torch.Tensor.tolist

    def reading(tensor):
        counter.reads.append("tolist")
        return tolist(tensor)

    torch.Tensor.tolist = reading
    try:
        yield
    finally:
        torch.Tensor.tolist = tolist


def count(budget, objective="tdpo2", packed=False):
    case = make_case(pairs=24, tokens=11, ignored=0.3)
    tensors, options = case.tensors(), {}
    if packed:
        for name in ("hidden", "ref_hidden", "labels"):
            tensors[name] = tensors[name].detach().flatten(0, 1)
        tensors["hidden"].requires_grad_()
        options["cu_seqlens"] = 11 * torch.arange(49)
    function = OBJECTIVES[objective]
    linear_preference_loss(function, **tensors, logits_budget=budget, **options)
    counter = Counter()
    with counter, counted_lists(counter):
        loss, _, _ = linear_preference_loss(function, **tensors, logits_budget=budget, **options)
        loss.backward()
    return counter


@pytest.mark.parametrize("packed", [False, True])
def test_one_read_however_many_chunks(packed):
    for budget in (1 << 30, 400_000, 90_000, 60_000):
        assert len(count(budget, packed=packed).reads) == 1, budget


def identity(chosen, rejected):
    return chosen.logps


def test_a_chunk_costs_a_dozen_operations_beside_its_products(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "identity", identity)
    chunks, original = [], tdpo_ext.fused.call.make_plan

    def make_plan(*arguments, **options):
        plan = original(*arguments, **options)
        chunks.append(len(plan.chunks))
        return plan

    monkeypatch.setattr(tdpo_ext.fused.call, "make_plan", make_plan)
    few, many = count(400_000, "identity"), count(60_000, "identity")
    more_chunks = chunks[-1] - chunks[0]
    assert more_chunks >= 4
    products = {"mm", "addmm_", "matmul_float32"}
    no_kernels = {"slice", "view", "t", "transpose", "unbind", "detach", "alias", "select", "split", "new_empty"}
    # The mean, its autograd, and the copy of the sums that an objective may write to.
    of_the_objective = {"sum", "div", "ones_like", "expand", "zeros_like", "clone"}
    counted = [
        sum(name not in products | no_kernels | of_the_objective for name in counter.operations)
        for counter in (few, many)
    ]
    assert (counted[1] - counted[0]) / more_chunks <= 12
