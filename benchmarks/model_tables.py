"""The tables of pretrained models: the demo, precision, and the training step."""

from __future__ import annotations

import statistics

from table_kit import load, markdown, table

_MODELS = {"smollm2": "SmolLM2 (V 49,152)", "gemma3": "Gemma 3 (V 262,144)"}
_LAST_STEPS = 8  # of a training, averaged: a batch is 8 pairs
_CANDIDATES = {"tdpo_ext": "tdpo_ext", "published": "published", "trl": "TRL"}


@table
def precision() -> str:
    """Errors of the KL on real text."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in load("bench_precision")["rows"]:
        cases.setdefault((row["model"], row["perturbation"], row["inputs"]), {})[row["candidate"]] = row
    rows = []
    for (model, size, inputs), errors in cases.items():
        cells = [
            f"{errors[name]['median']:.1e}; {errors[name]['99th percentile']:.1e}" if name in errors else ""
            for name in _CANDIDATES
        ]
        rows.append([_MODELS[model], f"{size:g}", inputs, f"{errors['published']['median_kl']:.1e}", *cells])
    return markdown(["model", "noise", "inputs", "median KL", *_CANDIDATES.values()], rows)


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
def model_errors() -> str:
    """Errors of loss and gradients against float64."""
    rows = []
    for model, parts in load("bench_models")["models"].items():
        for row in parts.get("head_errors", []):
            errors = [f"{row[key]:.1e}" for key in ("loss", "dhidden", "dweight")]
            rows.append([_MODELS[model], row["candidate"], *errors])
    return markdown(["model", "", "loss", "dL/dhidden", "dL/dweight"], rows)


@table
def model_whole_errors() -> str:
    """Errors of the gradient of all weights, backbones included."""
    errors = load("bench_models")["models"]["smollm2"].get("model_errors", [])
    shown = ", ".join(f"{row['candidate']} {row['gradient']:.1e}" for row in errors)
    return f"Relative errors of the gradient of all weights of SmolLM2, against the model in float64: {shown}."


@table
def demo() -> str:
    """The demo's rewards at matched KL."""
    results = load("demo")
    methods = list(results["curves"])
    rows = [[f"{row['kl']:.2f}", *(f"{row[method]:.3f}" for method in methods)] for row in results["matched_kl"]]
    start = next(iter(results["curves"].values()))[0]
    table = markdown(
        ["sequence KL", *map(str.upper, methods)], [["0 (before)", *[f"{start['reward']:.3f}"] * 3], *rows]
    )
    minutes = results["processor_seconds"] / 60
    return f"{table}\n\n{results['verdict']} This run took {minutes:.1f} minutes of processor time."


@table
def demo_samples() -> str:
    """What the demo's models write, with its reward."""
    examples = load("demo")["examples"]
    rows = []
    for name, continued in examples.items():
        cells = [f"{' '.join(text.split())} ({reward:.2f})" for _, text, reward in continued[:2]]
        rows.append([name if name == "before" else name.upper(), *cells])
    prompts = [f"{' '.join(prompt.split())} ..." for prompt, _, _ in examples["before"][:2]]
    return markdown(["", *prompts], rows)


@table
def frontier() -> str:
    """Gain in reward at matched KL, mean and standard deviation over seeds."""
    results = load("frontier")
    levels, seeds = results["gain_at_matched_kl"], max(len(runs) for runs in results["runs"].values())
    rows = []
    for name in results["runs"]:
        cells = []
        for level in levels:
            cell = level.get(name, {"seeds": 0})
            if cell["seeds"] == seeds:
                cells.append(f"{cell['mean']:.3f} ± {cell['sd']:.3f}")
            else:
                cells.append(f"{cell['mean']:.3f} ({cell['seeds']} of {seeds})" if cell["seeds"] else "")
        rows.append([name, *cells])
    return markdown(["sequence KL", *(f"{level['kl']:g}" for level in levels)], rows)


@table
def frontier_end() -> str:
    """Every method after its last step: means over seeds."""
    results = load("frontier")
    rows = []
    for name, runs in results["runs"].items():
        gains = [run["frontier"][-1]["reward"] - run["frontier"][0]["reward"] for run in runs.values()]
        samples = [run["frontier"][-1]["kl"] for run in runs.values()]
        chosen, rejected = (
            [statistics.mean(step[key] for step in run["kl"][-_LAST_STEPS:]) for run in runs.values()]
            for key in ("kl/chosen", "kl/rejected")
        )
        means = [statistics.mean(values) for values in (samples, chosen, rejected)]
        differences = results["over_baseline"].get(name, {})
        over = ", ".join(f"{difference:+.3f}" for difference in differences.values() if name != results["baseline"])
        spread = f"{statistics.mean(gains):.3f} ± {statistics.pstdev(gains):.3f}"
        rows.append([name, *(f"{mean:.2f}" for mean in means), spread, over])
    columns = ["KL of samples", "KL of chosen", "KL of rejected", "gain in reward", "over dpo-0.1 at the same KL"]
    return markdown(["", *columns], rows)
