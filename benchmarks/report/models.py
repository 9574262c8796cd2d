"""The tables of pretrained models: precision, and the training step."""

from __future__ import annotations

from .pages import load, markdown, table

_MODELS = {"smollm2": "SmolLM2 (V 49,152)", "gemma3": "Gemma 3 (V 262,144)"}
_CANDIDATES = {"tdpo_ext": "tdpo_ext", "published": "published", "trl": "TRL"}


@table
def precision() -> str:
    """Errors of the KL on real text."""
    return _errors_of_rows("bench_precision", _CANDIDATES)


@table
def torch_kernels_precision() -> str:
    """The same with both kinds of kernels."""
    names = {"tdpo_ext": "compiled kernels", "torch kernels": "torch kernels", "published": "published"}
    return _errors_of_rows("torch_kernels/bench_precision", names)


def _errors_of_rows(results: str, candidates: dict[str, str]) -> str:
    cases: dict[tuple, dict[str, dict]] = {}
    for row in load(results)["rows"]:
        cases.setdefault((row["model"], row["perturbation"], row["inputs"]), {})[row["candidate"]] = row
    rows = []
    for (model, size, inputs), errors in cases.items():
        cells = [
            f"{errors[name]['median']:.1e}; {errors[name]['99th percentile']:.1e}" if name in errors else ""
            for name in candidates
        ]
        rows.append([_MODELS[model], f"{size:g}", inputs, f"{errors['published']['median_kl']:.1e}", *cells])
    return markdown(["model", "noise", "inputs", "median KL", *candidates.values()], rows)


@table
def precision_steps() -> str:
    """Errors of the mean KL over the first steps of a training."""
    steps = load("bench_precision")["steps"]
    rows = []
    for name, title in _CANDIDATES.items():
        errors = sorted(abs(step[name] / step["float64"] - 1) for step in steps)
        rows.append([title, f"{errors[len(errors) // 2]:.1e}", f"{errors[-1]:.1e}"])
    return markdown(["relative error of the mean KL", "median of the steps", "largest"], rows)


@table
def bfloat16_checkpoint() -> str:
    """What trains of a bfloat16 checkpoint, by the precision it is loaded in."""
    results = load("bench_bfloat16_checkpoint")
    loaded = {"bfloat16": "bfloat16, the checkpoint's", "auto": "float32, the default"}
    rows = [
        [
            run["options"],
            loaded[run["dtype"]],
            f"{run['changed']:.2%}",
            f"{run['first_loss']:.6f}",
            f"{run['last_loss']:.6f}",
        ]
        for run in results["training"]
    ]
    changed = f"weights changed after {results['steps']} steps"
    return markdown(
        ["options", "weights", changed, "first loss", f"loss, mean of the last {results['last_steps']}"], rows
    )


@table
def reference_precision() -> str:
    """Loss and KL before the first step, by the reference's precision."""
    rows = [
        [run["computes in"], run["reference"], f"{run['loss']:.6f}", f"{run['kl/chosen']:.1e}"]
        for run in load("bench_bfloat16_checkpoint")["start"]
    ]
    return markdown(["computes in", "reference's weights", "loss", "KL of chosen responses, nats"], rows)


@table
def precision_heads() -> str:
    """Errors of loss and gradients against float64."""
    rows = []
    for row in load("bench_precision")["heads"]:
        errors = [f"{row[key]:.1e}" for key in ("loss", "dhidden", "dweight")]
        rows.append([_MODELS[row["model"]], row["candidate"], *errors])
    return markdown(["model", "", "loss", "dL/dhidden", "dL/dweight"], rows)


@table
def precision_whole_step() -> str:
    """Errors of the gradient of all weights, backbones included."""
    errors = load("bench_precision")["whole_step"]
    shown = ", ".join(f"{row['candidate']} {row['gradient']:.1e}" for row in errors)
    return f"Relative errors of the gradient of all weights of SmolLM2, against the model in float64: {shown}."


def precision_row() -> list[str]:
    """What the README says of the KL near p = q: SmolLM2 in bfloat16 with the least noise."""
    rows = [row for row in load("bench_precision")["rows"] if row["inputs"] == "hidden states, bfloat16"]
    nearest = min(row["perturbation"] for row in rows)
    errors = {row["candidate"]: row for row in rows if (row["model"], row["perturbation"]) == ("smollm2", nearest)}
    ours, published = errors["tdpo_ext"], errors["published"]
    return [
        f"KL of {published['median_kl']:.0e} nats, SmolLM2 in bfloat16",
        f"median relative error {ours['median']:.0e}; the published arithmetic: {published['median']:.0f}",
    ]


def _of_models(part: str) -> str:
    rows = []
    for model, parts in load("bench_models")["models"].items():
        for row in parts.get(part, []):
            seconds = row["processor_seconds"]
            tokens = row["tokens_per_second"] * row["seconds"]
            speeds = [f"{seconds:.2f}", f"{tokens / seconds:,.0f}", f"{row['faster']:.2f}x"]
            rows.append([_MODELS[model], row["candidate"], *speeds, f"{row['extra_mb']:,.0f}"])
    return markdown(["model", "", "processor seconds", "tokens a second of it", "faster", "extra MiB"], rows)


def summary_rows() -> list[list[str]]:
    """What the README says of the training step."""
    rows = []
    for name, title in _MODELS.items():
        parts = load("bench_models")["models"][name]
        steps = {row["candidate"]: row for row in parts["steps"]}
        ours, cached, published = (
            steps[candidate]
            for candidate in ("tdpo, shared prompts", "tdpo, shared prompts, cached reference", "published")
        )
        gains = (
            f"{ours['faster']:.1f}x faster than the published code ({cached['faster']:.1f}x with a cached reference)"
        )
        memory = (
            f"in {ours['extra_mb']:,.0f} MiB beyond models and gradients; published: {published['extra_mb']:,.0f} MiB"
        )
        rows.append([f"training step of {title}, bfloat16", f"{gains}, {memory}"])
    return rows


@table
def headline() -> str:
    """The README's one number."""
    steps = {row["candidate"]: row for row in load("bench_models")["models"]["gemma3"]["steps"]}
    ours, published = steps["tdpo, shared prompts"], steps["published"]
    gigabytes, theirs = ours["extra_mb"] / 1024, published["extra_mb"] / 1024
    faster = f"**{ours['faster']:.1f}x faster**"
    lines = [
        f"A training step of Gemma 3 270M (V 262,144) in bfloat16 on two CPU cores: {faster} than the",
        f"published code, in **{gigabytes:.1f} GiB** beyond models and gradients instead of {theirs:.1f}.",
    ]
    return "\n".join(lines)


@table
def model_steps() -> str:
    """Whole training steps of pretrained models."""
    return _of_models("steps")


@table
def model_heads() -> str:
    """Heads and loss of pretrained models."""
    return _of_models("heads")


@table
def model_lengths() -> str:
    """Memory over the length of responses."""
    rows = []
    for model, parts in load("bench_models")["models"].items():
        for row in parts.get("lengths", []):
            cells = [f"{row['mb_per_token']:.2f}", f"{row['longest_response']:,}"]
            rows.append([_MODELS[model], row["candidate"], *(f"{mb:,.0f}" for mb in row["extra_mb"]), *cells])
    header = [f"extra MiB, responses of {length}" for length in (128, 256, 512)]
    return markdown(["model", "", *header, "MiB a token", "longest in 8 GiB"], rows)


@table
def audit() -> str:
    """What the audit finds on pretrained models, and what it takes."""
    rows = [
        [
            _MODELS[row["model"]],
            row["reference"],
            row["precision"],
            f"{row['log-probabilities']:.0e}",
            f"{row['KL']:.0e}",
            f"{row['audit / step']:.1f}",
        ]
        for row in load("bench_audit")["rows"]
    ]
    return markdown(["model", "reference", "precision", "log-probabilities", "KL", "audit / step"], rows)
