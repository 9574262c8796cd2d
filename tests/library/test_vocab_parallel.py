"""The vocabulary sharded over ranks, against the float64 oracle of one process: gloo here, NCCL with `-m cuda`."""

import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import tdpo_ext
from helpers.collectives import payload_bytes
from helpers.cuda_support import reason_to_skip
from helpers.distributed import run_on_ranks
from helpers.linear_cases import OBJECTIVES, make_case
from helpers.logit_cases import random_rows
from tdpo_ext import LinearTDPOLoss, VocabShard, eager, tdpo_loss, token_divergence
from tdpo_ext.fused.heads import CallTensors, Head
from tdpo_ext.fused.inputs import prepare
from tdpo_ext.fused.options import FusedOptions
from tdpo_ext.fused.rows import Padded

INF = math.inf
# Bounds of the shards as shares of the vocabulary: even, uneven, with an empty one.
LAYOUTS = {2: [(0, 0.5, 1), (0, 0.9, 1), (0, 1, 1)], 4: [(0, 0.25, 0.5, 0.75, 1), (0, 0.6, 0.6, 0.61, 1)]}


CHECKS = {}


def on_every_rank(check):
    """Registers check(rank, world, device) to be run on all ranks of one process group."""
    CHECKS[check.__name__] = check
    return check


def shards(vocab, rank, world):
    for layout in LAYOUTS[world]:
        bounds = [round(share * vocab) for share in layout]
        yield VocabShard(bounds[rank], bounds[rank + 1], dist.group.WORLD)
    last_first = world - 1 - rank  # ranks in any order
    yield VocabShard(bounds[last_first], bounds[last_first + 1], dist.group.WORLD)


def close(ours, truth, rtol, what):
    error = (ours.double() - truth).norm() / (truth.norm() + 1e-30)
    assert error <= rtol, f"{what}: relative error {error:.3g}"


@on_every_rank
def logits(rank, world, device):
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for options in ({}, {"temperature": 0.7, "softcap": 6.0}, {"kl_direction": "reverse"}):
            logits, ref_logits, labels = (t.to(device) for t in random_rows(9, 347, dtype, ignored=[2]))
            logits[2] = math.nan
            logits[3, 5] = ref_logits[3, 5] = -INF
            labels[3] = 7
            # Autograd of the oracle's reverse KL makes NaN of -inf.
            leaf, ref_double = (tensor.double().clamp(min=-1e4) for tensor in (logits, ref_logits))
            truth = eager.token_divergence(leaf.requires_grad_(), ref_double, labels, **options)
            weights = torch.linspace(-1, 1, 9, device=device, dtype=torch.float64)
            (truth.logps * weights + truth.kl * (0.5 - weights)).sum().backward()
            for shard in shards(347, rank, world):
                local = logits[:, shard.start : shard.stop].clone().requires_grad_()
                ours = token_divergence(local, ref_logits[:, shard.start : shard.stop], labels, shard=shard, **options)
                (ours.logps * weights + ours.kl * (0.5 - weights)).sum().backward()
                for name, value, expected in zip(ours._fields, ours, truth):
                    close(value, expected.detach(), max(rtol if dtype == torch.float64 else 1e-5, 1e-12), name)
                close(local.grad, leaf.grad[:, shard.start : shard.stop], rtol, "dlogits")


@on_every_rank
def fused(rank, world, device):
    for dtype, rtol in ((torch.float64, 1e-11), (torch.float32, 3e-5), (torch.bfloat16, 1e-2)):
        case = make_case(dtype, bias=True)
        compare_case(case, OBJECTIVES, (1 << 30, 40_000, 9_000, 100), rank, world, device, rtol)


@on_every_rank
def deferred(rank, world, device):
    """Pairs of many rows, whose dz is kept (wide) or whose dW is summed apart (narrow)."""
    for width in (16, 400):
        for dtype, rtol in ((torch.float64, 1e-11), (torch.bfloat16, 1e-2)):
            case = make_case(dtype, bias=True, pairs=2, tokens=120, width=width)
            budget = 70 * (301 * 10 + case.hidden.itemsize * (2 * width + 24) + 128)
            compare_case(case, {"tdpo1": OBJECTIVES["tdpo1"]}, (budget,), rank, world, device, rtol)


def compare_case(case, objectives, budgets, rank, world, device, rtol):
    tensors = {name: value.to(device) for name, value in vars(case).items()}
    for name, objective in objectives.items():
        doubles = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        leaves = {n: doubles[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
        truth, chosen, _ = eager.linear_preference_loss(objective, **{**doubles, **leaves})
        truth_grads = dict(zip(leaves, torch.autograd.grad(3.0 * truth, list(leaves.values()))))
        for shard in shards(301, rank, world):
            for budget in budgets:
                compare_fused(objective, tensors, shard, budget, truth, chosen, truth_grads, rtol, name)


def compare_fused(objective, tensors, shard, budget, truth, chosen, truth_grads, rtol, name):
    rows = slice(shard.start, shard.stop)
    local = {n: t[rows] if n.endswith(("weight", "bias")) else t for n, t in tensors.items()}
    leaves = {n: local[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    own_budget = budget * (1 + dist.get_rank())  # the smallest counts
    loss, ours, _ = tdpo_ext.linear_preference_loss(
        objective, **{**local, **leaves}, shard=shard, logits_budget=own_budget
    )
    grads = dict(zip(leaves, torch.autograd.grad(3.0 * loss, list(leaves.values()))))
    what = f"{name}, {budget} bytes, entries {shard.start} to {shard.stop}"
    assert abs(loss.item() - truth.item()) <= max(rtol, 1e-11) * (1 + abs(truth.item())), what
    close(ours.kl, chosen.kl, max(rtol / 10, 1e-11), f"kl: {what}")
    for n, grad in grads.items():
        close(grad, truth_grads[n] if n == "hidden" else truth_grads[n][rows], rtol, f"d{n}: {what}")
    everywhere = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, loss.detach())
    assert all(torch.equal(other, loss.detach()) for other in everywhere), "the loss differs between ranks"


@on_every_rank
def smallest_budget(rank, world, device):
    tensors = {n: t.to(device) for n, t in vars(make_case()).items() if t is not None}
    shard = VocabShard.from_group(301, dist.group.WORLD)
    weights = [tensors[name][shard.start : shard.stop] for name in ("weight", "ref_weight")]
    arguments = CallTensors(
        tensors["hidden"], Head((weights[0],)), tensors["ref_hidden"], Head((weights[1],)), tensors["labels"]
    )
    options = FusedOptions(
        ignore_index=-100,
        temperature=1.0,
        softcap=None,
        logit_scale=1.0,
        ref_logit_scale=1.0,
        kl_direction="forward",
        logits_budget=1000 * (world - rank),
        shard=shard,
    )
    _, _, plan_inputs = prepare(arguments, Padded(2), options)
    assert plan_inputs.budget == 1000


@on_every_rank
def per_token(rank, world, device):
    case = make_case(torch.float32)
    tensors = {n: t.to(device) for n, t in vars(case).items() if t is not None}
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    leaf = doubles["hidden"] = doubles["hidden"].clone().requires_grad_()
    truth = eager.linear_token_divergence(**doubles)
    (truth_grad,) = torch.autograd.grad((truth.kl - 2 * truth.logps).sum(), leaf)
    for shard in shards(301, rank, world):
        rows = slice(shard.start, shard.stop)
        local = {n: t[rows] if n.endswith("weight") else t for n, t in tensors.items()}
        local["hidden"] = local["hidden"].clone().requires_grad_()
        ours = tdpo_ext.linear_token_divergence(**local, shard=shard, logits_budget=3_000)
        close(ours.kl, truth.kl.detach(), 1e-5, "kl")
        (grad,) = torch.autograd.grad((ours.kl - 2 * ours.logps).sum(), local["hidden"])
        close(grad, truth_grad, 1e-5, "dhidden")


@on_every_rank
def padding_and_unsummed_gradient(rank, world, device):
    case = make_case(torch.float32)
    tensors = {n: t.to(device) for n, t in vars(case).items() if t is not None}
    objective = functools.partial(tdpo_loss, beta=0.1)
    leaf = tensors["hidden"].clone().requires_grad_()
    whole, _, _ = tdpo_ext.linear_preference_loss(objective, **{**tensors, "hidden": leaf})
    (expected,) = torch.autograd.grad(whole, leaf)
    shard = VocabShard.from_group(301, dist.group.WORLD, sum_hidden_grad=False)
    padded = {}
    for name in ("weight", "ref_weight"):  # as Megatron pads: the last ranks hold rows that no token has
        padded[name] = torch.full((304 // world + 5, tensors[name].shape[1]), 3.0, device=device)
        padded[name][: shard.size] = tensors[name][shard.start : shard.stop]
    weight = padded["weight"].requires_grad_()
    leaf = tensors["hidden"].clone().requires_grad_()
    loss, _, _ = tdpo_ext.linear_preference_loss(objective, **{**tensors, **padded, "hidden": leaf}, shard=shard)
    torch.testing.assert_close(loss, whole)
    share, weight_grad = torch.autograd.grad(loss, (leaf, weight))
    assert not weight_grad[shard.size :].any()
    dist.all_reduce(share)
    close(share, expected.double(), 1e-5, "sum of the ranks' shares of dhidden")


@on_every_rank
def dtensors(rank, world, device):
    mesh = init_device_mesh(device, (world,))
    case = make_case(torch.float32, bias=True)
    tensors = {n: t.to(device) for n, t in vars(case).items()}
    loss_fn = LinearTDPOLoss(beta=0.1)
    names = ("hidden", "weight", "ref_hidden", "ref_weight", "labels")
    leaves = {n: tensors[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    whole, _, _ = loss_fn(*({**tensors, **leaves}[n] for n in names), bias=leaves["bias"], ref_bias=tensors["ref_bias"])
    expected = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values()))))

    sharded = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in tensors.items() if n.endswith(("weight", "bias"))}
    for hidden in (tensors["hidden"].clone(), distribute_tensor(tensors["hidden"], mesh, [Replicate()])):
        leaves = {"hidden": hidden.requires_grad_(), "weight": sharded["weight"].detach().requires_grad_()}
        leaves["bias"] = sharded["bias"].detach().requires_grad_()
        given = {**tensors, **sharded, **leaves}
        loss, _, _ = loss_fn(*(given[n] for n in names), bias=given["bias"], ref_bias=given["ref_bias"])
        torch.testing.assert_close(loss, whole)
        for n, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            close(full, expected[n].double(), 1e-5, f"d{n}")

    logits, ref_logits, labels = (t.to(device) for t in random_rows(6, 43))
    parts = [distribute_tensor(t, mesh, [Shard(1)]) for t in (logits, ref_logits)]
    ours = token_divergence(parts[0].requires_grad_(), parts[1], labels)
    close(
        ours.kl,
        token_divergence(logits, ref_logits, labels).kl.double(),
        5e-6,  # both are float32, summed in another order
        "kl of DTensor logits",
    )
    (grad,) = torch.autograd.grad(ours.kl.sum(), parts[0])
    assert grad.placements == (Shard(1),)
    with pytest.raises(ValueError, match="ref_weight is a plain tensor"):
        loss_fn(tensors["hidden"], sharded["weight"], tensors["ref_hidden"], tensors["ref_weight"], tensors["labels"])


@on_every_rank
def failures_reach_every_rank(rank, world, device):
    case = make_case(torch.float32)
    good = {n: t.to(device) for n, t in vars(case).items() if t is not None}
    shard = VocabShard.from_group(301, dist.group.WORLD)
    for name in ("weight", "ref_weight"):
        good[name] = good[name][shard.start : shard.stop]
    objective = functools.partial(tdpo_loss, beta=0.1)
    faults = {"ref_hidden has shape": {"ref_hidden": good["ref_hidden"][:, :-1]}, "temperature": {"temperature": -1.0}}
    for message, fault in faults.items():
        arguments = {**good, **fault} if rank == 1 else good
        with pytest.raises((ValueError, IndexError) if rank == 1 else RuntimeError, match=message):
            tdpo_ext.linear_preference_loss(objective, **arguments, shard=shard)
    if device == "cpu":  # on a GPU a bad label is a device assertion
        bad = good["labels"].where(good["labels"] == -100, 9999)
        with pytest.raises(IndexError, match="labels hold 9999"):
            tdpo_ext.linear_preference_loss(objective, **{**good, "labels": bad}, shard=shard)
    hole = VocabShard(shard.start, shard.stop - (rank == 0), dist.group.WORLD)
    with pytest.raises(ValueError, match="tile"):
        tdpo_ext.linear_preference_loss(objective, **good, shard=hole)
    logits = torch.randn(3, shard.size, device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="labels hold 301"):
            token_divergence(logits, logits, torch.tensor([1, 2, 301]), shard=shard)


@on_every_rank
def communication_is_independent_of_the_vocabulary(rank, world, device):
    counted = []
    for vocab in (64, 6400):
        case = make_case(torch.float32, vocab=vocab, ignored=0.0)
        tensors = {n: t.to(device) for n, t in vars(case).items() if t is not None}
        tensors["labels"] = tensors["labels"] % 64
        shard = VocabShard.from_group(vocab, dist.group.WORLD)
        for name in ("weight", "ref_weight"):
            tensors[name] = tensors[name][shard.start : shard.stop]
        tensors["hidden"].requires_grad_()
        with payload_bytes() as payloads:
            tdpo_ext.linear_preference_loss(OBJECTIVES["tdpo2"], **tensors, shard=shard)[0].backward()
        counted.append(sum(payloads))
    rows, width = 2 * 3 * 11, 16
    assert counted[0] == counted[1] == 4 * rows * (9 + width) + 8 * 32 + 8  # states and dhidden, header, outcome


class SmallModel(nn.Module):
    """A backbone and a head to be sharded, in float64: AdamW makes much of little, in float32 of rounding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Embedding(99, 32), nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
        self.lm_head = nn.Linear(32, 99, bias=False)
        self.double()


def train(model, reference_model, batches, mesh=None):
    loss_fn = LinearTDPOLoss(beta=0.1, logits_budget=20_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)  # some may be DTensors
    for tokens in batches:
        labels = tdpo_ext.shift_labels(tokens)
        with torch.no_grad():
            ref_hidden = reference_model.backbone(tokens)
        hidden = model.backbone(tokens)
        loss, _, _ = loss_fn(hidden, model.lm_head.weight, ref_hidden, reference_model.lm_head.weight, labels)
        loss.backward()
        if mesh is not None:  # data parallel: the mean over the replicas' pairs
            for parameter in model.parameters():
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                dist.all_reduce(grad, group=mesh.get_group("data"))
                grad /= mesh.size(0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@on_every_rank
def tensor_parallel_training(rank, world, device):
    batches = torch.randint(99, (4, 4, 12), generator=torch.Generator().manual_seed(3)).to(device)
    single, frozen = SmallModel().to(device), SmallModel().to(device)
    for parameter in single.parameters():
        parameter.data.add_(0.02)
    start = copy.deepcopy(single)
    train(single, frozen, batches)
    layouts = [("vocabulary", None)] + ([("data", "vocabulary")] if world == 4 else [])
    for layout in layouts:
        split = layout[0] == "data"
        mesh = init_device_mesh(device, (2, 2) if split else (1, world), mesh_dim_names=("data", "vocabulary"))
        plan = {"lm_head": ColwiseParallel(use_local_output=False)}
        model = parallelize_module(copy.deepcopy(start), mesh["vocabulary"], plan)
        ref_model = parallelize_module(copy.deepcopy(frozen), mesh["vocabulary"], plan)
        mine = batches
        if split:  # 2 pairs: each replica takes one, chosen and rejected
            pair = mesh.get_local_rank("data")
            mine = batches[:, [pair, 2 + pair]]
        train(model, ref_model, mine, mesh if split else None)
        for (name, parameter), expected in zip(model.named_parameters(), single.parameters()):
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(full, expected, rtol=1e-7, atol=1e-8, msg=f"{name}, {layout}")


@on_every_rank
def compile(rank, world, device):
    logits, ref_logits, labels = (t.to(device) for t in random_rows(6, 50))
    shard = VocabShard.from_group(50, dist.group.WORLD)
    local, ref_local = (t[:, shard.start : shard.stop].clone() for t in (logits, ref_logits))

    def loss(x):
        return token_divergence(2 * x, ref_local, labels, shard=shard).kl.sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = local.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    world, device = request.param
    reason = reason_to_skip(world) if device == "cuda" else ""
    if reason:
        pytest.skip(reason)
    return run_on_ranks(CHECKS, world, device, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "outcomes",
    [
        pytest.param((world, device), id=f"{world} {device}", marks=[pytest.mark.cuda] if device == "cuda" else [])
        for device in ("cpu", "cuda")
        for world in (2, 4)
    ],
    indirect=True,
    scope="module",
)
def test_on_ranks(check, outcomes):
    failed = {rank: text for (name, rank), text in outcomes.items() if name == check and text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


def test_shard_arguments():
    with pytest.raises(ValueError, match="start and stop"):
        VocabShard(5, 3, None)
    with pytest.raises(TypeError, match="group"):
        VocabShard(0, 3, "world")
