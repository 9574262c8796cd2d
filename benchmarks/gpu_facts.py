"""What a GPU does, fact by fact: one JSON line each, the most valuable first.

    python benchmarks/gpu_facts.py [--rounds 9] [--tiny] [--output FOLDER]

Every fact is appended to FOLDER/facts.jsonl and flushed at once: a run that is cut short loses only what is left. A
section that fails is a fact too, and the next one runs; the exit status then is 1. Shares are of a copy's bandwidth and
errors relative, in the norm, to the oracle in float64. Times are medians of candidates that alternate.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench_linear import OBJECTIVE, Shape, Step, compare
from common import cuda_peaks, machine, medians
from row_kernels import RowKernels

from tdpo_ext import eager, linear_preference_loss, token_divergence
from tdpo_ext.ops import operators
from tdpo_ext.ops.matmul import product

DEVICE = "cuda"
F32, BF16 = torch.float32, torch.bfloat16
Fact = dict


class Scale(NamedTuple):
    """The sizes of all sections."""

    copied: int  # entries
    rows: tuple[int, int]  # of the row kernels: rows, V
    short_rows: tuple[int, int]
    steps: tuple[Shape, ...]  # the kernels of the first are listed
    larger: tuple[Shape, ...]  # vocabularies, after the products
    product_rows: tuple[int, ...]
    sequences: int  # in a batch, of lengths between the next two
    lengths: tuple[int, int]
    batches: int


def usual(rows: int, vocab: int = 128_256) -> Shape:
    """Pairs of 1,024 rows."""
    return Shape(rows // 1024, 512, 4096, vocab)


FULL = Scale(
    copied=1 << 30,
    rows=(4096, 128_256),
    short_rows=(1 << 20, 32),
    steps=(usual(4096), usual(8192)),
    larger=(usual(8192, 151_936), usual(8192, 262_144), usual(1024)),
    product_rows=(4096, 8192, 1024, 512, 391),
    sequences=16,
    lengths=(64, 400),
    batches=20,
)
TINY = Scale(  # to rehearse the script
    copied=1 << 12,
    rows=(6, 1031),
    short_rows=(40, 32),
    steps=(Shape(1, 3, 16, 301), Shape(2, 3, 16, 301)),
    larger=(Shape(2, 3, 16, 407),),
    product_rows=(8, 5),
    sequences=4,
    lengths=(3, 8),
    batches=3,
)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def values_and_gradient(function, logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor) -> dict:
    leaf = logits.detach().requires_grad_()
    values = function(leaf, ref_logits, labels)
    (values.logps.sum() - 0.3 * values.kl.sum()).backward()
    return {"logps": values.logps.detach(), "kl": values.kl.detach(), "gradient": leaf.grad}


def agreement(scale: Scale, rounds: int) -> Iterator[Fact]:
    """With float64, of logits and of every plan of the fused loss."""
    vocab = min(scale.rows[1], 50_257)
    for dtype in (F32, BF16):
        logits, ref_logits, labels = random_logits(min(scale.rows[0], 512), vocab, dtype)
        ours = values_and_gradient(token_divergence, logits, ref_logits, labels)
        true = values_and_gradient(eager.token_divergence, logits.double(), ref_logits.double(), labels)
        errors = {name: relative_error(value, true[name]) for name, value in ours.items()}
        yield {"fact": "logits against float64", "dtype": str(dtype), "errors": errors}

    step = Step(Shape(4, 64, 256, 1031), BF16, device=DEVICE)
    exact = {name: tensor.detach().double() for name, tensor in step.inputs.items() if name != "labels"}
    leaves = [exact[name].requires_grad_() for name in ("hidden", "weight")]
    eager.linear_preference_loss(OBJECTIVE, **exact, labels=step.labels)[0].backward()
    runs = {str(step.plan(budget)): functools.partial(step.packed, budget) for budget in (8 << 20, 3 << 20, 1 << 20)}
    for plan, run in {**runs, "streaming": functools.partial(step.streamed, 1 << 20)}.items():
        step.clear()
        run()
        errors = {
            name: relative_error(ours.grad, leaf.grad)
            for name, ours, leaf in zip(("dhidden", "dweight"), (step.hidden, step.weight), leaves)
        }
        yield {"fact": "fused loss against float64", "plan": plan, "errors": errors}


def random_logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(rows, vocab, device=DEVICE)
    ref_logits = logits + 0.3 * torch.randn_like(logits)
    return logits.to(dtype), ref_logits.to(dtype), torch.randint(vocab, (rows,), device=DEVICE)


def copy_rate(scale: Scale, rounds: int) -> Iterator[Fact]:
    """The bandwidth that others are a share of."""
    source = torch.randn(scale.copied, device=DEVICE).to(BF16)
    target = torch.empty_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, rounds, device=DEVICE)["copy"]
    yield {"fact": "copy", "gb_per_s": 2 * source.nbytes / seconds / 1e9}


def row_kernels(scale: Scale, rounds: int) -> Iterator[Fact]:
    """Each row kernel beside a copy in the same run."""
    for case, shape, dtypes, options in (
        ("float32 to bfloat16", scale.rows, (F32, BF16), {}),  # the fused loss's
        ("bfloat16", scale.rows, (BF16, BF16), {}),
        ("float32", scale.rows, (F32, F32), {}),
        ("bfloat16, softcap", scale.rows, (BF16, BF16), {"softcap": 30.0}),
        ("bfloat16, reverse KL", scale.rows, (BF16, BF16), {"reverse_kl": True}),
        ("bfloat16, short rows", scale.short_rows, (BF16, BF16), {}),
    ):
        logits, ref_logits, labels = random_logits(*shape, dtypes[0])
        kernels = RowKernels(logits, ref_logits, labels, torch.empty(shape, dtype=dtypes[1], device=DEVICE), **options)
        other = torch.empty_like(logits)
        runs = {
            "forward": kernels.forward,
            "backward": kernels.backward(-0.3),
            "backward without KL": kernels.backward(0.0),
            "copy": functools.partial(other.copy_, logits),
        }
        seconds = medians(runs, rounds, device=DEVICE)
        copied = 2 * logits.nbytes / seconds["copy"]
        yield {
            "fact": "row kernels",
            "case": case,
            "rows": shape[0],
            "vocab": shape[1],
            "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
            "of_copy": {name: size / seconds[name] / copied for name, size in kernels.bytes_moved().items()},
        }


def scaling(scale: Scale, rounds: int) -> Iterator[Fact]:
    """The kernel that multiplies gradients by a loss's upstream gradient, and reads nothing where that is 1."""
    one, minus_one = torch.ones((), device=DEVICE), torch.full((), -1.0, device=DEVICE)
    source, target = (torch.randn(scale.rows, device=DEVICE).to(BF16) for _ in range(2))
    runs = {
        "scale": lambda: operators.scale_unless_one(target, minus_one),
        "scale by 1": lambda: operators.scale_unless_one(target, one),
        "copy": lambda: target.copy_(source),
    }
    seconds = medians(runs, rounds, device=DEVICE)
    times = {name: 1e3 * value for name, value in seconds.items()}
    yield {"fact": "scaling", "milliseconds": times, "of_copy": seconds["copy"] / seconds["scale"]}


def steps(scale: Scale, rounds: int) -> Iterator[Fact]:
    """The fused loss beside its products, and the kernels of the first step."""
    for shape in scale.steps:
        yield {"fact": "fused loss", **compare(shape, BF16, rounds, DEVICE, with_peers=False)}
        if shape == scale.steps[0]:
            yield {"fact": "kernels of a step", "rows": shape.rows, "vocab": shape.vocab, "kernels": kernels_of(shape)}


def kernels_of(shape: Shape, most: int = 25) -> list[Fact]:
    """Those of a packed step that take longest."""
    step = Step(shape, BF16, device=DEVICE)
    step.packed(None)
    step.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.packed(None)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:most]
    return [
        {"kernel": event.key[:120], "calls": event.count, "milliseconds": event.device_time_total / 1e3}
        for event in events
    ]


def products(scale: Scale, rounds: int) -> Iterator[Fact]:
    """Each product of a step, as it is taken and with an output in bfloat16 beside it."""
    vocab, width = scale.steps[0].vocab, scale.steps[0].width
    weight, sums = torch.randn(vocab, width, device=DEVICE).to(BF16), torch.zeros(vocab, width, device=DEVICE)
    low_sums = torch.empty_like(weight)
    for rows in scale.product_rows:
        hidden = torch.randn(rows, width, device=DEVICE).to(BF16)
        dz = torch.randn(rows, vocab, device=DEVICE).to(BF16)
        low_logits, logits, dhidden = torch.empty_like(dz), torch.empty_like(dz, dtype=F32), torch.empty_like(hidden)
        runs = {
            "logits, bfloat16": functools.partial(product, hidden, weight.t(), low_logits),
            "logits, float32": functools.partial(product, hidden, weight.t(), logits),
            "dhidden": functools.partial(product, dz, weight, dhidden),
            "dweight, bfloat16": functools.partial(product, dz.t(), hidden, low_sums),
            "dweight, float32": functools.partial(product, dz.t(), hidden, sums),
            "dweight, accumulated": functools.partial(product, dz.t(), hidden, sums, accumulate=True),
        }
        yield {"fact": "products", "rows": rows, **timed_products(runs, 2 * rows * vocab * width, rounds)}
    yield from misaligned_product(scale.product_rows[0], vocab, width, rounds)


def timed_products(runs: dict, operations: int, rounds: int) -> Fact:
    seconds = medians(runs, rounds, device=DEVICE)
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "tflops": {name: operations / value / 1e12 for name, value in seconds.items()},
    }


def misaligned_product(rows: int, vocab: int, width: int, rounds: int) -> Iterator[Fact]:
    """The product for half of dW, whose columns of dz begin at 128 bytes, or 2 bytes later."""
    half = vocab // 2 // 64 * 64
    hidden = torch.randn(rows, width, device=DEVICE).to(BF16)
    dz = torch.randn(rows, half + 128, device=DEVICE).to(BF16)
    sums = torch.empty(half, width, device=DEVICE)
    runs = {
        name: functools.partial(product, dz[:, first : first + half].t(), hidden, sums)
        for name, first in (("aligned", 64), ("misaligned", 65))
    }
    yield {"fact": "misaligned product", "rows": rows, **timed_products(runs, 2 * rows * half * width, rounds)}


def larger(scale: Scale, rounds: int) -> Iterator[Fact]:
    """The fused loss with other vocabularies and few rows."""
    for shape in scale.larger:
        yield {"fact": "fused loss", **compare(shape, BF16, rounds, DEVICE, with_peers=False)}


def reserved_memory(scale: Scale, rounds: int) -> Iterator[Fact]:
    """What the allocator holds after batches of other lengths, beside the most that was in use."""
    vocab, width = scale.steps[0].vocab, scale.steps[0].width
    draw = torch.Generator().manual_seed(0)
    weight = torch.zeros(vocab, width, dtype=BF16, device=DEVICE, requires_grad=True)
    ref_weight = torch.zeros_like(weight).detach()

    def batches() -> None:
        for _ in range(scale.batches):
            lengths = torch.randint(*scale.lengths, (scale.sequences,), generator=draw).tolist()
            hidden = torch.randn(sum(lengths), width, device=DEVICE).to(BF16).requires_grad_()
            labels = torch.zeros(sum(lengths), dtype=torch.long, device=DEVICE)
            heads = {"weight": weight, "ref_hidden": hidden.detach(), "ref_weight": ref_weight}
            linear_preference_loss(OBJECTIVE, hidden, **heads, labels=labels, row_lengths=lengths)[0].backward()
            weight.grad = None

    allocated, reserved = cuda_peaks(batches)
    yield {"fact": "memory over batches", "batches": scale.batches, "allocated": allocated, "reserved": reserved}


SECTIONS = (agreement, copy_rate, row_kernels, scaling, steps, products, larger, reserved_memory)


def facts(scale: Scale, rounds: int) -> Iterator[Fact]:
    """All facts; that a section failed is one."""
    yield {"fact": "machine", **machine()}
    for section in SECTIONS:
        try:
            yield from section(scale, rounds)
        except Exception as error:  # the next section may still work
            message = f"{type(error).__name__}: {str(error)[:500]}"
            yield {"fact": "failure", "section": section.__name__, "error": message}
        torch.cuda.empty_cache()
    yield {"fact": "end"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; medians are reported")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: rehearses the script, measures nothing")
    parser.add_argument("--output", type=Path, default=Path("out/gpu_check"), help="folder for facts.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    failures, begin = 0, time.monotonic()
    with open(arguments.output / "facts.jsonl", "w") as file:
        for fact in facts(TINY if arguments.tiny else FULL, arguments.rounds):
            line = json.dumps({**fact, "after_s": round(time.monotonic() - begin, 1)})
            print(line, file=file, flush=True)
            print(line, flush=True)
            failures += fact["fact"] == "failure"
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
