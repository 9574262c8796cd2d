"""What the trainer does with a family of models, held to plain arithmetic."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from tdpo.models.stand_ins import shaken

from helpers import families
from helpers.device import USE_CPU

TOLERANCE = 2e-3  # relative, in float32, or five times what rounding changes, but no more than MOST
MOST = 2e-2
LAYOUTS = {
    "padded": {"shared_prompts": "never"},
    "packed": {"shared_prompts": "never", "padding_free": True},
    "shared": {"shared_prompts": "always"},
    "shared, packed": {"shared_prompts": "always", "padding_free": True},
}


@dataclass
class Outcome:
    """What was found of a family."""

    name: str
    kind: str = ""
    left_out: str = ""  # why it could not be built
    refused: str = ""  # why nothing trains
    from_logits: str = ""  # why it isn't fused
    layouts: list[str] = field(default_factory=list)
    row_by_row: bool = False
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def one_line(error: BaseException, most: int = 260) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def make_trainer(policy, reference, folder: str, **options) -> TDPOTrainer:
    args = TDPOConfig(
        output_dir=folder, use_cpu=USE_CPU, report_to=[], save_strategy="no", max_length=256, max_prompt_length=128,
        beta=families.BETA, alpha=families.ALPHA, per_device_train_batch_size=16, disable_tqdm=True, **options,
    )  # fmt: skip
    rows, models = Dataset.from_list(families.make_rows()), (families.copied(policy), families.copied(reference))
    return TDPOTrainer(*models, args, train_dataset=rows, processing_class=families.make_tokenizer())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of all weights, which are left without."""
    found = {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_values(policy: torch.nn.Module, reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Loss, sums and gradients by plain arithmetic, by their names."""
    loss, *sides = families.plain_loss(policy, reference, families.make_rows())
    loss.backward()
    return named(loss, *sides) | gradients(policy)


def named(loss: torch.Tensor, *sides: Any) -> dict[str, torch.Tensor]:
    sums = {
        f"{name}/{side}": getattr(values, name).detach()
        for side, values in zip(("chosen", "rejected"), sides)
        for name in ("logps", "ref_logps", "kl")
    }
    return {"loss": loss.detach(), **sums}


def errors(some: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors; those of small gradients are relative to the gradient of all weights."""
    total = torch.stack([value.norm() for name, value in right.items() if name.startswith("d ")]).norm().item()
    found = {}
    for name, value in right.items():
        least = 1e-3 * total if name.startswith("d ") else 1e-2
        difference = (some.get(name, torch.zeros_like(value)) - value).norm() / value.norm().clamp_min(least)
        found[name] = float("inf") if difference.isnan() else difference.item()
    return found


def trainer_values(trainer: TDPOTrainer) -> dict[str, torch.Tensor]:
    """The same, of all rows in one batch of the trainer."""
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[number] for number in range(len(rows))])
    trainer.model.eval()
    output = trainer.loss(batch)
    output.loss.backward()
    return named(output.loss, output.chosen, output.rejected) | gradients(trainer.model)


def try_family(name: str) -> Outcome:
    """Trains a family in every layout that the trainer allows."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        policy = families.make_family(name)
        reference = families.perturbed(policy)
        right = plain_values(policy, reference)
        models = [shaken(families.copied(model)) for model in (policy, reference)]
        rounding = max(errors(plain_values(*models), right).values())
    except Exception as error:  # whatever a family's code raises
        outcome.left_out = f"{type(error).__name__}: {one_line(error)}"
        return outcome
    outcome.kind, allowed = type(policy).__name__, max(TOLERANCE, min(5 * rounding, MOST))
    with tempfile.TemporaryDirectory() as folder:
        for layout, options in LAYOUTS.items():
            try:
                trainer = make_trainer(policy, reference, folder, router_aux_loss_coef=0.0, **options)
            except (ValueError, TypeError) as error:
                if layout == "padded":
                    outcome.refused = one_line(error)
                    break
                continue
            outcome.from_logits = trainer.loss.policy.fallback_reason or ""
            outcome.row_by_row |= trainer.data_collator.row_by_row
            wrong = {name: size for name, size in errors(trainer_values(trainer), right).items() if not size <= allowed}
            outcome.layouts.append(layout)
            outcome.wrong += [f"{layout}: {name} {size:.0e} off" for name, size in list(wrong.items())[:3]]
        if not outcome.refused and getattr(policy.config.get_text_config(), "router_aux_loss_coef", None):
            try:  # with the load-balancing loss that is the default
                trainer = make_trainer(policy, reference, folder)
                rows = trainer.train_dataset
                trainer.loss(trainer.data_collator([rows[number] for number in range(len(rows))])).loss.backward()
            except ValueError as error:
                outcome.refused = f"by default: {one_line(error)}"
            except Exception as error:
                outcome.wrong.append(f"the routers' loss: {type(error).__name__}: {one_line(error)}")
    outcome.seconds = time.perf_counter() - start
    return outcome
