"""Ranks of a vocabulary shard that disagree, or of which one fails: every rank says so, none waits for another."""

import functools
import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import tdpo_ext
from helpers.distributed import outcome_of, run_on_ranks
from helpers.linear_cases import make_case
from tdpo_ext import MarginLoss, VocabShard, linear_preference_loss, linear_token_divergence, per_token, tdpo_loss
from tdpo_ext.losses import logratio_margin
from tdpo_ext.ops import operators
from tdpo_ext.vocab_parallel import Exchange, _tiled_size

SECONDS = 20  # a failure must reach every rank well before the group's timeout of 60
BUDGETS = {"one chunk": 1 << 30, "several chunks": 20_000, "streaming": 3_000}
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)
CHECKS = {}


def on_every_rank(check):
    """Registers check(rank, world, device) to be run on all ranks of one process group."""
    CHECKS[check.__name__] = check
    return check


def arguments_of(rank, world, **sizes):
    tensors = make_case(torch.float32, **sizes).tensors()
    shard = VocabShard.from_group(301, dist.group.WORLD)
    for name in ("weight", "ref_weight"):
        tensors[name] = tensors[name][shard.start : shard.stop].detach()
    tensors["weight"].requires_grad_()
    return {**tensors, "shard": shard}


def expect(message, call, *, own=None, rank=None):
    """`call` fails with `message` on every rank: alike, or as `own` on rank 1 and as RuntimeError on the others."""
    begin = time.monotonic()
    kind = ValueError if own is None else (own if rank == 1 else RuntimeError)
    with pytest.raises(kind, match=message):
        call()
    assert time.monotonic() - begin < SECONDS
    if "TDPO_FAULT_COUNTS" in os.environ:
        _count(Path(os.environ["TDPO_FAULT_COUNTS"]))


def _count(path):
    """Counts a fault that reached every rank, by the number of ranks."""
    if dist.get_rank() == 0:
        counts = json.loads(path.read_text()) if path.exists() else {}
        key = f"{dist.get_world_size()} ranks"
        path.write_text(json.dumps({**counts, key: counts.get(key, 0) + 1}))


@on_every_rank
def arguments_that_differ(rank, world, device):
    good = arguments_of(rank, world, pairs=2, ignored=0.0)
    odd = rank == 1
    other_labels = (good["labels"] + 1) % 301
    shard = good["shard"]
    width = good["hidden"].shape[-1]
    faults = {
        "labels differs": {"labels": other_labels},
        "temperature .* differs": {"temperature": 0.9},
        "softcap .* differs": {"softcap": 5.0},
        "ref_logit_scale differs": {"ref_logit_scale": 2.0},
        "kl_direction differs": {"kl_direction": "reverse"},
        "ignore_index differs": {"ignore_index": -1},
        "weight differs": {name: good[name].detach().bfloat16() for name in ("hidden", "weight")},
        "ref_hidden differs .* ref_width": {
            "ref_hidden": good["ref_hidden"].detach()[..., :width],
            "ref_weight": good["ref_weight"].detach()[:, :width],
        },
        "ref_hidden differs .* ref_bytes": {
            name: good[name].detach().bfloat16() for name in ("ref_hidden", "ref_weight")
        },
        "hidden differs": {
            "hidden": good["hidden"].detach()[..., : width // 2],
            "weight": good["weight"].detach()[:, : width // 2],
        },
        "hidden.requires_grad differs": {"hidden": good["hidden"].detach()},
        "shard differs": {"shard": VocabShard(shard.start, shard.stop, dist.group.WORLD, sum_hidden_grad=False)},
    }
    for message, fault in faults.items():
        arguments = {**good, **fault} if odd else good
        expect(message, lambda arguments=arguments: linear_preference_loss(OBJECTIVE, **arguments))
    objective = functools.partial(tdpo_loss, beta=0.2) if odd else OBJECTIVE
    expect("objective differs", lambda: linear_preference_loss(objective, **good))
    with torch.set_grad_enabled(not odd):
        expect("is_grad_enabled", lambda: linear_preference_loss(OBJECTIVE, **good))
    loss, _, _ = linear_preference_loss(OBJECTIVE, **good)  # the group still works
    loss.backward()


@on_every_rank
def rows_split_otherwise(rank, world, device):
    good = arguments_of(rank, world, pairs=2, tokens=6, ignored=0.0)
    for name in ("hidden", "ref_hidden", "labels"):
        good[name] = good[name].detach().flatten(0, 1)
    offsets = torch.tensor([0, 6, 12, 18, 24] if rank == 1 else [0, 5, 12, 18, 24])
    expect(r"cu_seqlens\) differs", lambda: linear_preference_loss(OBJECTIVE, **good, cu_seqlens=offsets))


@on_every_rank
def hidden_states_that_differ(rank, world, device):
    for name in ("hidden", "ref_hidden"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            good = arguments_of(rank, world, pairs=2)
            for floating in ("hidden", "weight", "ref_hidden", "ref_weight"):
                good[floating] = good[floating].detach().to(dtype)
            other, counted = good[name].clone(), good["labels"] != -100
            other[~counted] += rank  # rows that do not count may hold anything
            arguments = {**good, name: other}
            linear_preference_loss(OBJECTIVE, **arguments)
            other[(*counted.nonzero()[-1], -1)] += 1e-2 * rank
            expect(f"{name} differs", lambda arguments=arguments: linear_preference_loss(OBJECTIVE, **arguments))
            expect(f"{name} differs", lambda arguments=arguments: linear_token_divergence(**arguments))


@on_every_rank
def objectives_that_differ_on_real_values(rank, world, device):
    """They are alike for the few nats that made-up pairs have between their responses."""

    def bounded(chosen, rejected):
        margins = chosen.logratio - rejected.logratio
        return (0.01 * margins).clamp(-0.05 if rank == 1 else -1e9, 0.05 if rank == 1 else 1e9)

    def bounded_gradient(chosen, rejected):
        margins = chosen.logratio - rejected.logratio
        return bounded_link(margins, rank)

    for budget in (1 << 30, 200_000, 3_000):
        for sizes in ({"pairs": 4, "tokens": 60}, {"pairs": 1, "tokens": 300}):
            good = arguments_of(rank, world, **sizes)
            for name in ("hidden", "ref_hidden"):
                good[name] = (good[name] * 9).detach().requires_grad_(name == "hidden")
            for objective in (bounded, bounded_gradient, MarginLoss(logratio_margin, lambda m: bounded_link(m, rank))):
                call = functools.partial(linear_preference_loss, objective, **good, logits_budget=budget)
                expect("objective differs between the vocabulary's ranks", call)
            with torch.no_grad():
                call = functools.partial(linear_preference_loss, bounded, **good, logits_budget=budget)
                expect("objective differs between the vocabulary's ranks", call)
            good["hidden"] = good["hidden"].detach()
            good["weight"].requires_grad_(rank == 1)  # ranks may differ in this: then the losses are compared alone
            linear_preference_loss(OBJECTIVE, **good, logits_budget=budget)


def bounded_link(margins, rank):
    bound = 5.0 if rank == 1 else 1e9
    straight = margins.clamp(-bound, bound)
    return 0.01 * (margins.detach() + straight - straight.detach())


@on_every_rank
def hidden_states_whose_sum_is_not_taken(rank, world, device):
    mesh = init_device_mesh(device, (world,))
    good = arguments_of(rank, world, pairs=2, ignored=0.0)
    parts = {name: DTensor.from_local(good[name].detach(), mesh, [Partial()]) for name in ("hidden", "ref_hidden")}
    parts["labels"] = DTensor.from_local(good["labels"], mesh, [Shard(0)])
    whole = {name: DTensor.from_local(good[name].detach(), mesh, [Replicate()]) for name in parts}
    for name, part in parts.items():
        call = functools.partial(linear_preference_loss, OBJECTIVE, **{**good, name: part})
        expect(f"{name} is a DTensor with placements", call)
        one_rank = {**good, name: part if rank == 1 else good[name]}
        call = functools.partial(linear_preference_loss, OBJECTIVE, **one_rank)
        expect(f"{name} is a DTensor with placements", call, own=ValueError, rank=rank)
        heads = {
            head: DTensor.from_local(good[head].detach(), mesh, [Shard(0)], shape=(301, width), stride=(width, 1))
            for head, width in (("weight", good["weight"].shape[1]), ("ref_weight", good["ref_weight"].shape[1]))
        }
        of_dtensors = {**good, **heads, "shard": None, name: part}
        call = functools.partial(linear_preference_loss, OBJECTIVE, **of_dtensors)
        expect(f"{name} is a DTensor with placements", call)
    linear_preference_loss(OBJECTIVE, **{**good, **whole})


@on_every_rank
def columns_that_differ(rank, world, device):
    @per_token
    def weighted(chosen, rejected):
        return rejected.sum(rejected.columns["w"] * rejected.logratio) - chosen.sum(chosen.logratio)

    good = arguments_of(rank, world, pairs=2)
    column = torch.full(good["labels"].shape, 1.0 + rank)
    expect("token_columns differs", lambda: linear_preference_loss(weighted, **good, token_columns={"w": column}))


@on_every_rank
def logits_that_differ(rank, world, device):
    shard = VocabShard.from_group(40, dist.group.WORLD)
    logits, labels = torch.randn(3, shard.size), torch.tensor([1, 2, 3])
    other = torch.tensor([1, 2, 4]) if rank == 1 else labels
    call = functools.partial(tdpo_ext.token_divergence, logits, logits, shard=shard)
    expect("labels differs", lambda: call(other))
    expect("temperature differs", lambda: call(labels, temperature=1.0 + rank))
    direction = "reverse" if rank == 1 else "forward"
    expect("kl_direction differs", lambda: call(labels, kl_direction=direction))
    expect("softcap differs", lambda: call(labels, softcap=3.0 + rank))
    precise = logits.double() if rank == 1 else logits
    expect("logits differs", lambda: tdpo_ext.token_divergence(precise, precise, labels, shard=shard))
    expect("ignore_index differs", lambda: call(labels, ignore_index=-100 - rank))
    call(labels)


class FailsOnRankOne:
    """An objective that passes the check and then raises on rank 1."""

    def __init__(self, rank):
        self.fails = rank == 1
        self.calls = 0

    def __call__(self, chosen, rejected):
        self.calls += 1
        if self.fails and self.calls > 5:  # the check makes five calls
            raise KeyError("lost objective")
        return OBJECTIVE(chosen, rejected)


@on_every_rank
def objective_that_raises_on_one_rank(rank, world, device):
    for budget in BUDGETS.values():
        good = arguments_of(rank, world, pairs=4)
        call = functools.partial(linear_preference_loss, FailsOnRankOne(rank), **good, logits_budget=budget)
        expect("lost objective", call, own=KeyError, rank=rank)
    linear_preference_loss(OBJECTIVE, **arguments_of(rank, world))[0].backward()


@on_every_rank
def operators_that_raise_on_one_rank(rank, world, device):
    long = {"pairs": 1, "tokens": 200}  # deferred at 60,000 bytes
    for name in ("row_states", "logit_gradient_out"):
        for sizes, budget in [({"pairs": 4}, b) for b in BUDGETS.values()] + [(long, 120_000)]:
            good, real, calls = arguments_of(rank, world, **sizes), getattr(operators, name), []

            def failing(*arguments, real=real, calls=calls, **options):
                calls.append(1)
                if rank == 1 and len(calls) == 1:
                    raise MemoryError("out of luck")
                return real(*arguments, **options)

            setattr(operators, name, failing)
            try:
                call = functools.partial(linear_preference_loss, OBJECTIVE, **good, logits_budget=budget)
                expect("out of luck", call, own=MemoryError, rank=rank)
            finally:
                setattr(operators, name, real)


@on_every_rank
def backward_that_fails(rank, world, device):
    good = arguments_of(rank, world, pairs=2)
    real = operators.logit_gradient_out

    def failing(*arguments, **options):
        if rank == 1:
            raise MemoryError("out of luck")
        return real(*arguments, **options)

    values = linear_token_divergence(**good, logits_budget=3_000)
    operators.logit_gradient_out = failing
    try:
        expect("out of luck", (values.kl.sum() + values.logps.sum()).backward, own=MemoryError, rank=rank)
    finally:
        operators.logit_gradient_out = real
    values = linear_token_divergence(**good, logits_budget=3_000)
    expect("gradient of the values differs", ((1.0 + rank) * values.kl.sum()).backward)


@on_every_rank
def nothing_runs_after_a_failure(rank, world, device):
    """The first failure is the one that is raised; what comes after it may fail for no reason but the first."""
    exchange, ran = Exchange(VocabShard.from_group(9, dist.group.WORLD)), []

    def fails():
        ran.append("first")
        raise MemoryError("out of luck")

    assert exchange.run(fails, lambda: "placeholder") == "placeholder"
    assert exchange.run(lambda: ran.append("second"), lambda: "placeholder") == "placeholder"
    assert ran == ["first"]


def test_a_check_that_does_not_raise_fails_on_its_rank():
    """Rather than to end the rank, for which the others would wait."""

    def does_not_raise(rank, world, device):
        with pytest.raises(ValueError):
            pass

    assert "DID NOT RAISE" in outcome_of(does_not_raise, 0, 1, "cpu")
    assert outcome_of(lambda rank, world, device: None, 0, 1, "cpu") == ""


@pytest.mark.parametrize(
    ("bounds", "size"),
    [([(0, 5), (5, 9)], 9), ([(5, 9), (0, 5)], 9), ([(0, 5), (3, 3), (5, 9), (9, 9)], 9), ([(7, 7), (0, 9)], 9)],
)
def test_shards_tile_a_vocabulary_in_any_order_and_some_may_be_empty(bounds, size):
    assert _tiled_size(bounds) == size


@pytest.mark.parametrize("bounds", [[(0, 5), (6, 9)], [(0, 5), (4, 9)], [(1, 5), (5, 9)], [(0, 9), (0, 9)]])
def test_shards_that_do_not_tile_a_vocabulary(bounds):
    with pytest.raises(ValueError, match="the shards don't tile a vocabulary"):
        _tiled_size(bounds)


# The soak runs them on 4 ranks too, and counts the faults.
RANKS = [int(world) for world in os.environ.get("TDPO_FAULT_RANKS", "2").split(",")]


@pytest.fixture(scope="module", params=RANKS, ids=lambda world: f"{world} ranks")
def outcomes(request, tmp_path_factory):
    return run_on_ranks(CHECKS, request.param, "cpu", tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_faults(check, outcomes):
    failed = {rank: text for (name, rank), text in outcomes.items() if name == check and text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
