"""What the trainer does with a family of models, held to plain arithmetic."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer

from helpers import families

TOLERANCE = 2e-3  # relative, in float32; the errors that layouts have made were 1e-2 and more
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


def one_line(error: BaseException, most: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def make_trainer(policy, reference, folder: str, **options) -> TDPOTrainer:
    args = TDPOConfig(
        output_dir=folder, use_cpu=True, report_to=[], save_strategy="no", max_length=256, max_prompt_length=128,
        beta=families.BETA, alpha=families.ALPHA, per_device_train_batch_size=16, disable_tqdm=True, **options,
    )  # fmt: skip
    rows, models = Dataset.from_list(families.make_rows()), (families.copied(policy), families.copied(reference))
    return TDPOTrainer(*models, args, train_dataset=rows, processing_class=families.make_tokenizer())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def differences(trainer: TDPOTrainer, plain: tuple, right: dict[str, torch.Tensor]) -> list[str]:
    """What the trainer's loss of all rows gives otherwise than plain arithmetic does."""
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[number] for number in range(len(rows))])
    trainer.model.eval()
    output = trainer.loss(batch)
    output.loss.backward()
    mine, (loss, *sides) = gradients(trainer.model), plain
    found = []

    def compare(name: str, some: torch.Tensor, others: torch.Tensor, least: float) -> None:
        error = ((some - others).norm() / others.norm().clamp_min(least)).item()
        if not error <= TOLERANCE:
            found.append(f"{name} {error:.0e} off")

    compare("loss", output.loss.detach(), loss.detach(), 1e-3)
    for side, some, others in zip(("chosen", "rejected"), (output.chosen, output.rejected), sides):
        for name in ("logps", "ref_logps", "kl"):
            compare(f"{name}/{side}", getattr(some, name), getattr(others, name).detach(), 1e-2)
    total = torch.stack([grad.norm() for grad in right.values()]).norm().item()
    for name, grad in right.items():
        compare(f"gradient of {name}", mine.get(name, torch.zeros_like(grad)), grad, 1e-3 * total)
    return found


def try_family(name: str) -> Outcome:
    """Trains a family in every layout that the trainer allows."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        policy = families.make_family(name)
        reference = families.perturbed(policy)
        plain = families.plain_loss(policy, reference, families.make_rows())
        plain[0].backward()
    except Exception as error:  # whatever a family's code raises
        outcome.left_out = f"{type(error).__name__}: {one_line(error)}"
        return outcome
    outcome.kind, right = type(policy).__name__, gradients(policy)
    plain = (plain[0].detach(), *plain[1:])
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
            wrong = differences(trainer, plain, right)
            outcome.layouts.append(layout)
            outcome.wrong += [f"{layout}: {text}" for text in wrong[:3]]
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
