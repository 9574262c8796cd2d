"""The tables of the library and of the trainer's speed, and the README's summary."""

from __future__ import annotations

from .models import precision_row, summary_rows
from .pages import load, markdown, table


@table
def logits() -> str:
    """Logit-level forward and backward."""
    columns = ["published, eager", "published, compiled", "oracle, eager", "oracle, compiled"]
    rows = []
    for result in load("bench_logits")["results"]:
        memory, share = result["peak_memory_in_gradients"], result["of_copy_bandwidth"]
        rows.append(
            [
                f"{result['rows']} x {result['vocab']:,}",
                result["dtype"],
                f"{result['milliseconds']['tdpo_ext']:.1f}",
                *(f"{result['faster_than'][name]:.3g}x" for name in columns),
                f"{share['tdpo_ext']:.0%}",
                f"{memory['tdpo_ext']:.2f}",
                f"{memory['published, eager']:.1f}",
            ]
        )
    return markdown(["rows x V", "dtype", "ms", *columns, "of copy", "memory", "published's memory"], rows)


def _steps() -> dict[str, dict[str, dict]]:
    return {
        step["dtype"]: {row["candidate"]: row for row in step["candidates"]} for step in load("bench_linear")["steps"]
    }


@table
def torch_kernels() -> str:
    """Kernels in plain torch beside the compiled ones and torch."""
    rows = []
    names = ("tdpo_ext", "torch kernels", "published, eager", "published, compiled", "oracle, compiled")
    for result in load("torch_kernels/bench_logits")["results"]:
        case = f"logits, {result['rows']} x {result['vocab']:,}, {result['dtype']}"
        for name in names:
            memory = result["peak_memory_in_gradients"][name]
            rows.append([case, name, f"{result['milliseconds'][name]:,.0f}", f"{memory:.2f} gradients"])
    for step in load("torch_kernels/bench_linear")["steps"]:
        case = f"hidden states, {step['rows']:,} x D {step['width']} x V {step['vocab']:,}, {step['dtype']}"
        for row in step["candidates"]:
            memory = "" if row["candidate"] == "products" else f"{row['extra_mb']:,.0f} MiB"
            rows.append([case, row["candidate"], f"{1e3 * row['seconds']:,.0f}", memory])
    return markdown(["", "", "ms", "extra memory"], rows)


@table
def linear() -> str:
    """Hidden states to gradients."""
    steps = _steps()
    rows = []
    for name in steps["float32"]:
        cells = [name]
        for dtype in ("float32", "bfloat16"):
            row = steps[dtype][name]
            cells += [f"{row['seconds']:.2f}", f"{row['over_products']:.2f}"]
            cells.append("" if name == "products" else f"{row['extra_mb']:,.0f}")
        rows.append(cells)
    header = [f"{dtype}: {what}" for dtype in ("float32", "bfloat16") for what in ("s", "over products", "extra MiB")]
    return markdown(["", *header], rows)


@table
def where_time_goes() -> str:
    """The parts of a logit-level step and of a fused one."""
    first = load("bench_logits")["results"][0]
    times = first["milliseconds"]
    rows = [
        [
            f"logits, {first['rows']} x {first['vocab']:,}, {first['dtype']}",
            f"row states alone {times['forward']:.1f} ms, gradient alone {times['backward']:.1f} ms",
        ]
    ]
    for dtype, step in _steps().items():
        total, products = step["tdpo_ext chunked"]["seconds"], step["products"]["seconds"]
        rows.append(
            [f"hidden states, {dtype}", f"{total:.2f} s; the four products by torch.mm alone take {products:.2f} s"]
        )
    return markdown(["step", "where its time goes"], rows)


@table
def vocab_parallel() -> str:
    """The vocabulary sharded over 1, 2 and 4 processes."""
    rows = [
        [
            str(row["ranks"]),
            f"{row['vocab']:,}",
            f"{row['seconds']:.2f}",
            f"{row['bytes_per_row']:,.0f}",
            f"{row['logits_mb']:.0f}",
            f"{row['extra_mb']:.0f}",
        ]
        for row in load("bench_vocab_parallel")["results"]
    ]
    return markdown(["ranks", "V", "s", "bytes a row", "logits, MiB a rank", "extra, MiB a rank"], rows)


@table
def trainer_speed() -> str:
    """What packing and the cached reference gain."""
    speed = load("bench_trainer")["speed"]
    slowest = max(speed["seconds"].values())
    rows = [
        [name, f"{speed['positions'][name]:,}", f"{seconds:.2f}", f"{slowest / seconds:.2f}x"]
        for name, seconds in speed["seconds"].items()
    ]
    return markdown(["", "positions", "s", "faster"], rows)


@table
def trainer_memory() -> str:
    """Peak memory with a live and with a cached reference."""
    results = load("bench_trainer")
    peak = results["peak_mb"]
    saved = peak["live"] - peak["cached"]
    return (
        f"Peak resident memory of one training step: {peak['live']:,.0f} MiB with a live reference, "
        f"{peak['cached']:,.0f} MiB from the cache, {saved:,.0f} MiB less (the model's weights are "
        f"{results['large_model_mb']:,.0f} MiB)."
    )


@table
def storage() -> str:
    """Errors from storing the reference's hidden states in less than float32."""
    results = load("bench_trainer")["storage"]
    dtypes = list(results[0]["kl_error"])
    rows = [
        [
            f"{row['perturbation']:g}",
            f"{row['kl_per_sequence']:.1e}",
            *(f"{row[error][dtype]:.1e}" for dtype in dtypes for error in ("kl_error", "gradient_error")),
        ]
        for row in results
    ]
    columns = [f"{dtype}: {error}" for dtype in dtypes for error in ("KL", "gradient")]
    return markdown(["policy's weights perturbed by", "KL a sequence", *columns], rows)


@table
def long_pairs() -> str:
    """Pairs that are too long for the budget."""
    rows, results = [], load("bench_long_pairs")
    for step in results["steps"]:
        by_name = {row["candidate"]: row for row in step["candidates"]}
        deferred, streaming = by_name["deferred"], by_name["streaming"]
        rows.append(
            [
                f"{step['pairs']} x {step['pair_rows']:,}",
                f"{step['vocab']:,}",
                *(f"{row['over_products']:.2f}" for row in (deferred, streaming, by_name["frozen head"])),
                *(f"{row['extra_mb']:,.0f}" for row in (deferred, streaming)),
                f"{(results['budget'] + 4 * step['vocab'] * results['width']) / 2**20 + 64:,.0f}",
            ]
        )
    header = ["pairs x rows", "V", "deferred: over products", "streaming: over products", "frozen head: over three"]
    return markdown([*header, "deferred: extra MiB", "streaming: extra MiB", "aim: MiB"], rows)


@table
def products() -> str:
    """Products of the fused losses over torch.mm."""
    results = load("bench_products")["results"]
    names = list(results[0]["ratios"])
    rows = [
        [
            f"{row['vocab']:,} x {row['width']}",
            row["dtype"],
            f"{row['rows']:,}",
            *(f"{row['ratios'][name]:.2f}" for name in names),
        ]
        for row in results
    ]
    return markdown(["V x D", "dtype", "rows", *names], rows)


@table
def rates() -> str:
    """The constants of the planner's cost model."""
    rows = [
        [
            row["dtype"],
            f"{row['products'] / 1e9:,.0f}e9",
            f"{row['weights'] / 1e9:.0f}e9",
            f"{row['memory'] / 1e9:.0f}e9",
        ]
        for row in load("bench_rates")["results"]
    ]
    return markdown(["weights", "multiply-adds a second", "bytes of weights", "bytes of sums"], rows)


@table
def summary() -> str:
    """The README's figures."""
    logit, steps = load("bench_logits")["results"][0], _steps()
    ours, eager = steps["float32"]["tdpo_ext chunked"], steps["float32"]["published, eager"]
    bf16 = steps["bfloat16"]["tdpo_ext chunked"]
    trainer = load("bench_trainer")
    seconds = trainer["speed"]["seconds"]
    rows = [
        [
            f"logits, forward + backward, {logit['rows']} x {logit['vocab']:,}",
            f"{logit['faster_than']['published, eager']:.0f}x faster than the published arithmetic in eager torch, "
            f"{logit['faster_than']['published, compiled']:.1f}x than compiled; "
            f"{logit['of_copy_bandwidth']['tdpo_ext']:.0%} of a copy's bandwidth; no temporary beyond the gradient",
        ],
        [
            "hidden states to gradients, 1,024 rows x D 768 x V 50,257",
            f"{ours['over_products']:.2f}x its four matrix products alone ({bf16['over_products']:.2f}x in bfloat16), "
            f"in {ours['extra_mb']:,.0f} MiB beyond inputs and gradients; eager: {eager['over_products']:.2f}x and "
            f"{eager['extra_mb']:,.0f} MiB",
        ],
        precision_row(),
        [
            "trainer, ragged batches",
            f"{seconds['padded, live reference'] / seconds['packed, live reference']:.2f}x faster without padding, "
            f"{seconds['padded, live reference'] / seconds['packed, cached reference']:.2f}x with the reference cached",
        ],
        *summary_rows(),
    ]
    return markdown(["", ""], rows)


@table
def float16_gradients() -> str:
    """Errors of float16 gradients by the separation of pairs."""
    results = load("bench_float16")["results"]
    names = list(dict.fromkeys(row["candidate"] for row in results))
    errors: dict[int, dict[str, str]] = {}
    for row in results:
        errors.setdefault(row["nats"], {})[row["candidate"]] = f"{row['dhidden']:.1e}; {row['dweight']:.1e}"
    return markdown(["nats", *names], [[str(nats), *(cells[name] for name in names)] for nats, cells in errors.items()])


@table
def distillation() -> str:
    """Exact on-policy distillation beside its peers."""
    rows = []
    for step in load("bench_distillation")["steps"]:
        case = f"{step['sequences'] * step['tokens']} x V {step['vocab']:,}, D {step['width']}, {step['dtype']}"
        for row in step["candidates"]:
            memory = f"{row['extra_mb']:,.0f}" if "extra_mb" in row else ""
            ratio = f"{row['over_products']:.2f}"
            rows.append([case, row["candidate"], f"{row['seconds']:.2f}", ratio, f"{row['multiply_adds']:.0f}", memory])
    header = ["rows x vocabulary", "candidate", "s", "over products", "multiply-adds: rows x D x V", "extra MiB"]
    return markdown(header, rows)
