"""The training step on pretrained models with real vocabularies and real text, against the published code and TRL.

    python benchmarks/bench_models.py [--models smollm2 gemma3] [--rounds 2] [--pairs 2] [--parts heads]

Forward and backward of TDPO2 in bfloat16 on pairs of IMDb reviews: a prompt of 64 tokens, and responses of 32 to 128.
The reference is the same model; the policy's weights are perturbed by 1e-2 of their standard deviation. Candidates:

* published: both models' logits of a padded batch, then the published arithmetic, everything materialised.
* trl kernels: hidden states of a padded batch, then TRL's streamed divergence and log-probabilities, composed to TDPO2.
* trl DPOTrainer: its own step with its own loss, DPO, which needs no KL: for scale.
* tdpo: our trainer's step: padded, packed (padding_free), with shared prompts, and the last with the reference's hidden
  states cached (they are in memory here, where a training reads them from disk).

heads: from given hidden states of the response rows, median seconds of alternating candidates, by the clock and of the
processor (all threads: other work on the machine hardly changes these, which "faster" compares), rows a second, and
peak resident memory beyond models and gradients. steps: the same of the whole step, with prompts among the tokens.
lengths: peak memory of one pair over the length of its responses, and the longest that a line through the points allows
in 8 GiB. bench_precision.py measures the candidates' errors.

The models and their terms: benchmarks/real_models.py. Results are added to benchmarks/results/bench_models.json
after every part.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import real_models
import torch
import torch.nn.functional as F
from common import RESULTS, peak_extra_bytes, processor_medians, save, text_table
from datasets import Dataset
from peers import published, trl_linear
from tdpo import CausalLM, PreferenceCollator
from tdpo.loss.preference_loss import FusedLoss
from tdpo.reference.cached_states import CachedStates
from tdpo.reference.second_model import SecondModel
from torch import Tensor

from tdpo_ext import TokenDivergence, linear_preference_loss, tdpo_loss

PROMPT, SHORTEST, LONGEST = 64, 32, 128
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)
MEMORY = 8 << 30  # bytes beyond models and gradients, for the longest sequence
LENGTHS = (128, 256, 512)
SIDES = ("chosen", "rejected")
PARTS = ("heads", "steps", "lengths")


def pairs_of_reviews(tokenizer, count: int, responses: tuple[int, int]) -> list[dict]:
    """Token ids of `count` pairs, whose responses have lengths evenly spread between two bounds."""
    needed = PROMPT + responses[1]
    encoded = (tokenizer(text)["input_ids"] for text in real_models.review_texts(6 * needed, 12 * needed))
    reviews = [ids for ids in encoded if len(ids) >= needed][: 2 * count]
    if len(reviews) < 2 * count:
        raise ValueError(f"pairs is {count}; there are {len(reviews)} reviews of {needed} tokens")
    lengths = np.linspace(*responses, 2 * count).astype(int).tolist()
    return [
        {
            "prompt_ids": reviews[pair][:PROMPT],
            "chosen_ids": reviews[pair][PROMPT : PROMPT + lengths[2 * pair]],
            "rejected_ids": reviews[count + pair][PROMPT : PROMPT + lengths[2 * count - 1 - 2 * pair]],
        }
        for pair in range(count)
    ]


class Step:
    """One training step of a policy and a reference, by every candidate."""

    def __init__(self, name: str, rows: list[dict], dtype: torch.dtype = torch.bfloat16, models: tuple | None = None):
        if models is None:
            policy, tokenizer = real_models.load(name, torch.bfloat16)
            real_models.perturb(policy, 1e-2)
            models = policy, real_models.load(name, torch.bfloat16).model, tokenizer
        policy, reference, self.tokenizer = models
        self.policy_model, self.reference_model = policy.to(dtype), reference.to(dtype).requires_grad_(False)
        self.policy, self.reference, self.rows = (
            CausalLM.of(self.policy_model),
            SecondModel.of(self.reference_model),
            rows,
        )
        self.loss = FusedLoss(self.policy, self.reference, OBJECTIVE)
        self.cached = FusedLoss(self.policy, CachedStates.beside(self.reference, []), OBJECTIVE)

    def clear(self) -> None:
        self.policy_model.zero_grad(set_to_none=True)

    @property
    def tokens(self) -> int:
        """Of prompts and responses, as separate sequences."""
        return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.policy_model.parameters())

    def batch(self, **options: bool) -> dict[str, Any]:
        return PreferenceCollator(self.tokenizer.pad_token_id or 0, **options)(self.rows)

    def candidates(self, *, trainer: bool = True) -> dict[str, Callable[[], Tensor]]:
        """Functions that compute a loss, to be differentiated; `trainer`: TRL's own too."""
        padded, packed = self.batch(), self.batch(padding_free=True)
        shared = self.batch(padding_free=True, shared_prompts=True)
        with torch.no_grad():
            ref_hidden = self.reference.rows(shared)
        candidates = {
            "published": functools.partial(self.published, padded),
            "trl kernels": functools.partial(self.trl_kernels, padded),
            "tdpo, padded": lambda: self.loss(padded).loss,
            "tdpo, packed": lambda: self.loss(packed).loss,
            "tdpo, shared prompts": lambda: self.loss(shared).loss,
            "tdpo, shared prompts, cached reference": lambda: self.cached({**shared, "ref_hidden": ref_hidden}).loss,
        }
        if find_spec("trl") is None:
            print("trl is not installed: its candidates are skipped")
            del candidates["trl kernels"]
        elif trainer:
            candidates["trl DPOTrainer (DPO)"] = self.trl_trainer()
        return candidates

    def published(self, batch: dict) -> Tensor:
        """Logits of whole padded sequences, as the published code computes them; its loss sums response tokens."""
        with torch.no_grad():
            ref_logits = self.reference.logits(**batch)[:, :-1]
        logits = self.policy.logits(**batch)[:, :-1]
        counts = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
        counts[batch["rows"]] = True
        counts = counts.view_as(batch["input_ids"])[:, :-1]
        tokens = published(logits, ref_logits, batch["input_ids"][:, 1:])
        chosen, rejected = TokenDivergence(*(values * counts for values in tokens)).per_sequence().chunk(2)
        return OBJECTIVE(chosen, rejected).mean()

    def trl_kernels(self, batch: dict) -> Tensor:
        with torch.no_grad():
            ref_hidden = self.reference.hidden(**batch).flatten(0, 1)[batch["rows"]]
        hidden = self.policy.hidden(**batch).flatten(0, 1)[batch["rows"]]
        tokens = trl_linear(hidden, self.policy.weight, ref_hidden, self.reference.weight, batch["targets"])
        return loss_of_rows(tokens, batch["row_lengths"])

    def trl_trainer(self) -> Callable[[], Tensor]:
        from trl import DPOConfig, DPOTrainer

        texts = [{name: self.tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", *SIDES)} for row in self.rows]
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(texts),
            max_length=None,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        data = Dataset.from_list(texts)
        models = self.policy_model, self.reference_model
        trainer = DPOTrainer(*models, args=args, train_dataset=data, processing_class=self.tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        return lambda: trainer.compute_loss(trainer.model, dict(batch))

    def heads(self) -> dict[str, Callable[[], Tensor]]:
        """The losses from given hidden states of the response rows."""
        batch = self.batch()
        with torch.no_grad():
            hidden, ref_hidden = (
                model.hidden(**batch).flatten(0, 1)[batch["rows"]] for model in (self.policy, self.reference)
            )
        hidden, weight = hidden.requires_grad_(), self.policy.weight.detach().clone().requires_grad_()
        ref_weight, labels, lengths = self.reference.weight, batch["targets"], batch["row_lengths"]

        def ours() -> Tensor:
            return linear_preference_loss(
                OBJECTIVE, hidden, weight, ref_hidden, ref_weight, labels, cu_seqlens=batch["cu_seqlens"]
            )[0]

        def theirs(function: Callable) -> Tensor:
            return loss_of_rows(function(hidden, weight, ref_hidden, ref_weight, labels), lengths)

        def from_logits(hidden, weight, ref_hidden, ref_weight, labels) -> TokenDivergence:
            return published(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight), labels)

        self.head_leaves, self.ref_head = (hidden, weight), (ref_hidden, ref_weight)
        candidates = {"published": functools.partial(theirs, from_logits), "tdpo": ours}
        if find_spec("trl") is not None:
            candidates["trl kernels"] = functools.partial(theirs, trl_linear)
        return candidates


def loss_of_rows(tokens: TokenDivergence, lengths: list[int]) -> Tensor:
    """TDPO2 of sequences whose tokens (n,) stand one after another."""
    sums = TokenDivergence(*(torch.stack([part.sum() for part in values.split(lengths)]) for values in tokens))
    return OBJECTIVE(*sums.chunk(2)).mean()


def backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def measure(losses: dict, rounds: int, clear: Callable[[], object], gradient_bytes: int, tokens: int) -> list[dict]:
    """Seconds, tokens a second and extra memory of every candidate."""
    runs = {name: functools.partial(backward, loss) for name, loss in losses.items()}
    rows, extra = [], {}
    for name, run in runs.items():  # also a warm-up
        clear()
        extra[name] = (peak_extra_bytes(run) - gradient_bytes) / 2**20
    seconds = processor_medians(runs, rounds, prepare=clear)
    for name, (wall, processor) in seconds.items():
        speed = {"seconds": wall, "processor_seconds": processor, "tokens_per_second": tokens / wall}
        faster = {"faster": seconds["published"][1] / processor}
        rows.append({"candidate": name, **speed, **faster, "extra_mb": extra[name]})
    return rows


def measure_heads(step: Step, rounds: int) -> list[dict]:
    losses = step.heads()

    def clear() -> None:
        for leaf in step.head_leaves:
            leaf.grad = None

    gradient_bytes = sum(leaf.nbytes for leaf in step.head_leaves)
    return measure(losses, rounds, clear, gradient_bytes, sum(step.batch()["row_lengths"]))


def measure_steps(step: Step, rounds: int) -> list[dict]:
    return measure(step.candidates(), rounds, step.clear, step.gradient_bytes, step.tokens)


def lengths(name: str) -> list[dict]:
    """Peak memory over the length of both responses of a pair, and the longest that fits `MEMORY`."""
    extra: dict[str, list[float]] = {}
    tokenizer = real_models.load(name, torch.bfloat16).tokenizer
    step = Step(name, [])
    for length in LENGTHS:
        step.rows = pairs_of_reviews(tokenizer, 1, (length, length))
        losses = step.candidates(trainer=False)
        for candidate in ("published", "trl kernels", "tdpo, padded", "tdpo, shared prompts"):
            if candidate in losses:
                step.clear()
                peak = peak_extra_bytes(functools.partial(backward, losses[candidate])) - step.gradient_bytes
                extra.setdefault(candidate, []).append(peak / 2**20)
    rows = []
    for candidate, megabytes in extra.items():
        slope, offset = np.polyfit(LENGTHS, megabytes, 1)
        longest = int((MEMORY / 2**20 - offset) / slope)
        rows.append({"candidate": candidate, "extra_mb": megabytes, "mb_per_token": slope, "longest_response": longest})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=real_models.available(), choices=real_models.available())
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds; medians are reported")
    parser.add_argument("--pairs", type=int, default=2, help="of a batch")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure")
    arguments = parser.parse_args()
    path = RESULTS / "bench_models.json"
    results: dict = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.models:
        tokenizer = real_models.load(name, torch.bfloat16).tokenizer
        rows = pairs_of_reviews(tokenizer, arguments.pairs, (SHORTEST, LONGEST))
        measured = {
            "heads": lambda name=name, rows=rows: measure_heads(Step(name, rows), arguments.rounds),
            "steps": lambda name=name, rows=rows: measure_steps(Step(name, rows), arguments.rounds),
            "lengths": lambda name=name: lengths(name),
        }
        for part in arguments.parts:
            found = measured[part]()
            print(f"\n{name}: {part}\n{text_table(found, list(found[0]))}", flush=True)
            parts = results.setdefault(name, {})
            parts |= {"pairs": arguments.pairs, part: found, f"load after {part}": os.getloadavg()[0]}
            save("bench_models", {"models": results})


if __name__ == "__main__":
    main()
