"""Errors of the KL on real text and real models, and what the first steps of a training see of it.

    python benchmarks/bench_precision.py [--rows 189] [--rows-only] [--steps 20] [--models smollm2 gemma3]
                                         [--output FOLDER]

* rows: hidden states of IMDb reviews from a model, as the reference, and from the same model with its weights perturbed
  by 1e-3, 1e-2 and 5e-2 of their standard deviation, as the policy; relative errors of each row's KL against float64 on
  the same inputs: hidden states and heads in float32, or rounded to bfloat16; and float32 logits, where no product adds
  its rounding. Median and 99th percentile.
* heads: the training step of bench_models.py on a pair with responses of 32 tokens, from hidden states; errors of the
  loss and of its gradients against float64 on the same hidden states and heads.
* whole_step: the same from token ids, against SmolLM2 in float64, which adds what bfloat16 costs in the backbones.
* steps: LoRA on SmolLM2 in bfloat16 with TDPO2 through the trainer; after every step, the mean KL of a fixed batch as
  each implementation computes it from the same hidden states.

Ours: `linear_token_divergence`, and with its kernels in plain torch. Published: the published arithmetic on logits in
the inputs' dtype. TRL: its streamed divergence (Triton kernels on a GPU, torch on a CPU). The models and their terms:
benchmarks/real_models.py. Results go to bench_precision.json and .png, in benchmarks/results, after every model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import real_models
import torch
import torch.nn.functional as F
from bench_models import Step, loss_of_rows, pairs_of_reviews
from common import RESULTS, save, text_table, with_torch_kernels
from datasets import Dataset
from peers import published, trl_linear
from torch import Tensor
from transformers import TrainerCallback

from tdpo_ext import eager, linear_token_divergence, token_divergence

PERTURBATIONS = (1e-3, 1e-2, 5e-2)
TOKENS = 64  # a text
ROWS_AT_ONCE = 64  # their float64 logits are in memory together
PROMPT_TOKENS, RESPONSE_TOKENS, PAIRS = 16, 32, 8


def published_linear_values(hidden, weight, ref_hidden, ref_weight, labels):
    return published(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight), labels)


CANDIDATES: dict[str, Callable] = {
    "tdpo_ext": linear_token_divergence,
    "torch kernels": with_torch_kernels(linear_token_divergence, "cpu"),
    "published": published_linear_values,
    "trl": trl_linear,
}


class Rows(NamedTuple):
    """Rows of hidden states (n, D) behind two heads (V, D), and labels (n,)."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in self))

    def parts(self) -> list[Rows]:
        """A few rows at a time, behind the same heads."""
        pieces = (tensor.split(ROWS_AT_ONCE) for tensor in (self.hidden, self.ref_hidden, self.labels))
        return [Rows(hidden, self.weight, ref, self.ref_weight, labels) for hidden, ref, labels in zip(*pieces)]

    def kl(self, function: Callable) -> Tensor:
        """(n,), float64."""
        return torch.cat([function(**part._asdict()).kl.double() for part in self.parts()])


def token_ids(tokenizer, count: int) -> Tensor:
    """The first tokens of reviews: (count, TOKENS)."""
    encoded = (tokenizer(text)["input_ids"][:TOKENS] for text in real_models.review_texts(400, 800))
    return torch.tensor([ids for ids in encoded if len(ids) == TOKENS][:count])


@torch.no_grad()
def row_errors(name: str, rows: int) -> list[dict]:
    """Errors of every candidate at every perturbation and dtype."""
    reference, tokenizer = real_models.load(name, torch.float32)
    tokens = token_ids(tokenizer, max(1, rows // (TOKENS - 1)))

    def states(model) -> Tensor:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

    ref_hidden, ref_weight = states(reference), reference.get_output_embeddings().weight.clone()
    results = []
    for size in PERTURBATIONS:
        policy, _ = real_models.load(name, torch.float32)
        real_models.perturb(policy, size)
        heads = states(policy), policy.get_output_embeddings().weight, ref_hidden, ref_weight
        exact_inputs = Rows(*heads, tokens[:, 1:].flatten())
        for dtype in (torch.float32, torch.bfloat16):
            inputs = exact_inputs.to(dtype)
            exact = inputs.to(torch.float64).kl(eager.linear_token_divergence)
            case = {"model": name, "perturbation": size, "inputs": f"hidden states, {dtype}".replace("torch.", "")}
            results += [
                {**case, "candidate": candidate, **_errors(inputs.kl(function), exact)}
                for candidate, function in CANDIDATES.items()
            ]
        case["inputs"] = "logits, float32"
        exact, *others = (torch.cat(kls) for kls in zip(*map(_kl_of_logits, exact_inputs.parts())))
        for candidate, kl in zip(("tdpo_ext", "torch kernels", "published"), others):
            results.append({**case, "candidate": candidate, **_errors(kl, exact)})
    return results


def _kl_of_logits(rows: Rows) -> tuple[Tensor, ...]:
    """The KL of rows from the same float32 logits: the oracle's in float64, ours with both kernels, the published."""
    logits, ref_logits = F.linear(rows.hidden, rows.weight), F.linear(rows.ref_hidden, rows.ref_weight)
    exact = eager.token_divergence(logits.double(), ref_logits.double(), rows.labels).kl
    functions = token_divergence, with_torch_kernels(token_divergence, "cpu"), published
    return exact, *(function(logits, ref_logits, rows.labels).kl.double() for function in functions)


def _errors(kl: Tensor, exact: Tensor) -> dict[str, float]:
    errors = (kl - exact).abs() / exact
    return {
        "rows": len(exact),
        "median_kl": exact.median().item(),
        "median": errors.median().item(),
        "99th percentile": errors.quantile(0.99).item(),
    }


def short_pair(name: str) -> list[dict]:
    """A pair of reviews whose responses have 32 tokens."""
    return pairs_of_reviews(real_models.load(name, torch.bfloat16).tokenizer, 1, (32, 32))


def head_errors(name: str) -> list[dict]:
    """Errors of the loss and of its two gradients against float64 on the same hidden states and heads."""
    step = Step(name, short_pair(name))
    losses, leaves = step.heads(), step.head_leaves
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true_loss = _exact_loss(*exact, *(tensor.double() for tensor in step.ref_head), step.batch())
    true_loss.backward()
    results = []
    for candidate, loss in losses.items():
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        dhidden, dweight = (_relative_error([leaf.grad], [true.grad]) for leaf, true in zip(leaves, exact))
        margin = abs(value.item() - true_loss.item())
        results.append({"model": name, "candidate": candidate, "loss": margin, "dhidden": dhidden, "dweight": dweight})
    return results


def whole_step_errors(name: str) -> list[dict]:
    """Errors of the loss and of the gradient of all weights, backbones included, against the same models in float64."""
    rows = short_pair(name)
    step, exact = Step(name, rows), Step(name, rows, dtype=torch.float64)
    batch = exact.batch()
    with torch.no_grad():
        ref_hidden = exact.reference.hidden(**batch).flatten(0, 1)[batch["rows"]]
    hidden = exact.policy.hidden(**batch).flatten(0, 1)[batch["rows"]]
    true_loss = _exact_loss(hidden, exact.policy.weight, ref_hidden, exact.reference.weight, batch)
    true_loss.backward()
    truth = [parameter.grad for parameter in exact.policy_model.parameters()]
    results = []
    for candidate, loss in step.candidates(trainer=False).items():
        step.clear()
        value = loss()
        value.backward()
        error = _relative_error([parameter.grad for parameter in step.policy_model.parameters()], truth)
        margin = abs(value.item() - true_loss.item())
        results.append({"candidate": candidate, "loss": margin, "gradient": error})
    return results


def _exact_loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, batch: dict) -> Tensor:
    tokens = eager.linear_token_divergence(hidden, weight, ref_hidden, ref_weight, batch["targets"])
    return loss_of_rows(tokens, batch["row_lengths"])


def _relative_error(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """The error of several gradients together."""
    difference = sum((mine.double() - true).square().sum().item() for mine, true in zip(gradients, truth))
    return (difference / sum(true.square().sum().item() for true in truth)) ** 0.5


class WatchKL(TrainerCallback):
    """After every step, the mean KL of a fixed batch as each candidate computes it."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.series = tokens, []

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **_) -> None:
        from tdpo import CausalLM

        causal, batch = CausalLM.of(model), {"input_ids": self.tokens, "attention_mask": torch.ones_like(self.tokens)}
        hidden = causal.hidden(**batch)[:, :-1].flatten(0, 1)
        with model.disable_adapter():
            ref_hidden = causal.hidden(**batch)[:, :-1].flatten(0, 1)
        rows = Rows(hidden, causal.weight, ref_hidden, causal.weight, self.tokens[:, 1:].flatten())
        exact = rows.to(torch.float64).kl(eager.linear_token_divergence)
        means = {name: rows.kl(function).mean().item() for name, function in CANDIDATES.items()}
        self.series.append({"step": state.global_step, "float64": exact.mean().item(), **means})


def review_pairs(tokenizer, count: int) -> Dataset:
    """The beginning of a review, continued as it is written (chosen) and by another review (rejected)."""
    ids = token_ids(tokenizer, 2 * count)
    end = PROMPT_TOKENS + RESPONSE_TOKENS
    columns = {
        "prompt_ids": ids[:count, :PROMPT_TOKENS],
        "chosen_ids": ids[:count, PROMPT_TOKENS:end],
        "rejected_ids": ids[count : 2 * count, PROMPT_TOKENS:end],
    }
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def first_steps(steps: int, learning_rate: float) -> list[dict]:
    """The KL over the first steps of LoRA in bfloat16."""
    from peft import LoraConfig
    from tdpo import TDPOConfig, TDPOTrainer

    model, tokenizer = real_models.load("smollm2", torch.bfloat16)
    watch = WatchKL(token_ids(tokenizer, 2))
    with tempfile.TemporaryDirectory() as folder:
        args = TDPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=PAIRS,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        TDPOTrainer(
            model,
            args=args,
            train_dataset=review_pairs(tokenizer, 64),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
            callbacks=[watch],
        ).train()
    return watch.series


def plot(series: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    steps = [point["step"] for point in series]
    styles = {"published": "s-", "trl": "^-", "tdpo_ext": "o-", "float64": "k--"}
    for name, style in styles.items():
        axes.plot(steps, [point[name] for point in series], style, ms=4, label=name)
    axes.set(xlabel="step", ylabel="mean KL of a token, nats", yscale="log", title="LoRA on SmolLM2, bfloat16")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(folder / "bench_precision.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=189, help="rows of text")
    parser.add_argument("--rows-only", action="store_true", help="nothing but the errors of rows")
    parser.add_argument("--steps", type=int, default=20, help="steps of LoRA; 0 skips them")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of LoRA")
    parser.add_argument("--models", nargs="*", default=real_models.available(), help="whose rows are measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    results: dict = {"rows": []}
    for name in arguments.models:
        results["rows"] += row_errors(name, arguments.rows)
        if not arguments.rows_only:
            results.setdefault("heads", []).extend(head_errors(name))
        save("bench_precision", results, arguments.output)
    if arguments.rows_only:
        print(text_table(results["rows"], list(results["rows"][0])))
        return
    if "smollm2" in arguments.models:  # the one whose float64 copies fit a small machine
        results["whole_step"] = whole_step_errors("smollm2")
    for part, found in results.items():
        print(f"\n{part}\n{text_table(found, list(found[0]))}")
    if arguments.steps:
        results |= {
            "learning_rate": arguments.learning_rate,
            "steps": first_steps(arguments.steps, arguments.learning_rate),
        }
        plot(results["steps"], arguments.output)
        print(text_table(results["steps"], list(results["steps"][0])))
    print(f"saved {save('bench_precision', results, arguments.output)}")


if __name__ == "__main__":
    main()
