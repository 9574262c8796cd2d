"""The bytes of a training step, by what they are for, and the longest responses that fit a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tdpo_ext
from tdpo_ext.losses import margin_form

from ..config import TDPOConfig
from ..models.causal_lm import unwrap_peft
from ..models.heads import head_parts
from ..models.without_weights import empty_policy, empty_reference, weight_bytes
from ..options import ModelOptions
from ..precision import autocast_dtype
from ..reference.choose import needs_reference
from .activations import Activations, activations_of
from .held import HeldReference, gradient_bytes, held_reference, optimizer_bytes

# The ways to the loss that are compared: ours, the code published with the paper, and TRL's own DPO.
WAYS = ("tdpo", "published", "trl")
# On a CPU, the temporaries of a loss stay for the next one, up to so many bytes (`tdpo_ext.release_scratch`).
_KEPT_ON_CPU = 1 << 30
_LONGEST = 1 << 20  # tokens of a response, beyond which nothing is looked for


@dataclass(frozen=True)
class Batch:
    """Pairs of equal lengths on one device.

    Attributes:
        pairs: of a batch.
        prompt, response: tokens of each.
        shared: a pair's prompt runs through the models once.
    """

    pairs: int
    prompt: int
    response: int
    shared: bool

    @property
    def sequences(self) -> tuple[int, int]:
        """How many sequences the backbone reads, and their tokens."""
        if self.shared:
            return self.pairs, self.prompt + 2 * self.response
        return 2 * self.pairs, self.prompt + self.response


@dataclass(frozen=True)
class Device:
    """What the planner asks of a device: "cpu" or "cuda", and the bytes of a GPU."""

    type: str
    memory: int | None

    @classmethod
    def of(cls, gpu_memory: int | None) -> Device:
        """A GPU with this memory, or this machine's, or its CPU."""
        if gpu_memory is not None:
            return cls("cuda", gpu_memory)
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.get_device_properties(0).total_memory)
        return cls("cpu", None)


@dataclass(frozen=True)
class LossBytes:
    """One way to the loss.

    Attributes:
        peak: bytes while it is computed.
        left: those that are still there when it is known: gradients that it returns, temporaries that are kept.
        kept: those that are still there when every gradient is formed: temporaries for the next loss.
    """

    peak: int
    left: int = 0
    kept: int = 0


@dataclass(frozen=True)
class HeadBytes:
    """What a step holds for the policy's head, and for the embedding that it may share its weight with.

    Attributes:
        copies: both heads in the precision of autocast; 0 where they have it.
        returned: dW as the loss returns it, in that precision; 0 for a frozen head.
        gradient: dW in the weight's own precision, formed from it where autocast computes; else 0.
        beside: gradients of the same weights that are there at the end of the backward pass beside the one that is
            kept: the embedding's, if its weight is the head's, and that of the earlier batches of a step.
    """

    copies: int
    returned: int
    gradient: int
    beside: int

    @classmethod
    def of(cls, policy: Any, ref_head: Tensor | None, dtype: torch.dtype, *, accumulates: bool) -> HeadBytes:
        """Args: the policy with its adapters; the weight of the reference's head; what the loss computes in."""
        head = _head_weight("model", policy)
        causal_lm: Any = unwrap_peft(policy)
        embedding = causal_lm.get_input_embeddings().weight
        others = [] if ref_head is None else [ref_head]
        cast = [weight.numel() for weight in (head, *others) if weight.dtype != dtype]
        returned = head.numel() * dtype.itemsize if head.requires_grad else 0
        return cls(
            copies=sum(cast) * dtype.itemsize,
            returned=returned,
            gradient=head.nbytes if returned and head.dtype != dtype else 0,
            beside=(embedding.nbytes if embedding.requires_grad else 0) * ((embedding is head) + accumulates),
        )


@dataclass(frozen=True)
class Training:
    """What a training holds, and how what it needs beside grows with the batch. All numbers are bytes.

    Attributes:
        parameters, trained: how many numbers the policy has, and how many of them train.
        weights, gradients, optimizer, reference: as long as it runs; `optimizer` is None where it is not known.
        activations: or why they are not known.
        checkpointed: whether activations are recomputed.
        accumulates: gradients of earlier batches are there while a loss is computed.
        head: of the policy.
        cached: at most, of the copies that autocast keeps until its end, which are those of weights that train.
        device: that it runs on.
        estimate: of the loss of a batch.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int | None
    reference: HeldReference
    activations: Activations | str
    checkpointed: bool
    accumulates: bool
    head: HeadBytes
    cached: int
    device: Device
    estimate: Callable[[Batch], tdpo_ext.Estimate]

    @classmethod
    def of(cls, models: ModelOptions, args: TDPOConfig, device: Device) -> Training:
        """Raises ValueError where a model can't be built from its configuration; the message names it."""
        policy, reference = empty_policy(models), empty_reference(models)
        head, objective = _head_weight("model", policy), args.trained_objective().objective
        ref_head = None
        if needs_reference(objective, reference, args):
            ref_head = _head_weight("ref_model", policy if reference is None else reference)
        if ref_head is not None and len(head) != len(ref_head):
            raise ValueError(f"ref_model has a vocabulary of {len(ref_head)} but model has {len(head)}")
        autocast = autocast_dtype(args)
        dtype = autocast or head.dtype
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        accumulates = args.gradient_accumulation_steps > 1

        def estimate(batch: Batch) -> tdpo_ext.Estimate:
            return tdpo_ext.estimate(
                [2 * batch.response] * batch.pairs,
                vocab=head.shape[0],
                width=head.shape[1],
                ref_width=0 if ref_head is None else ref_head.shape[1],
                dtype=dtype,
                frozen_head=not head.requires_grad,
                margin_loss=margin_form(objective) is not None,
                logits_budget=args.logits_budget,
                device_type=device.type,
                device_memory=device.memory,
                positions=2 * batch.pairs * (batch.prompt + batch.response),
            )

        return cls(
            parameters=sum(parameter.numel() for parameter in policy.parameters()),
            trained=trained,
            weights=weight_bytes(policy, in_4bit=models.load_in_4bit),
            gradients=gradient_bytes(policy),
            optimizer=optimizer_bytes(policy, args),
            reference=held_reference(policy, reference, models, args)
            if ref_head is not None
            else HeldReference("none, which the loss does not read", 0),
            activations=activations_of(policy, autocast),
            checkpointed=bool(args.activation_checkpointing),
            accumulates=accumulates,
            head=HeadBytes.of(policy, ref_head, dtype, accumulates=accumulates),
            cached=trained * dtype.itemsize,
            device=device,
            estimate=estimate,
        )

    def loss(self, batch: Batch) -> dict[str, LossBytes]:
        """The bytes of the loss by every way: logits and temporaries, copies of the heads, and the gradients.

        TRL copies one slice of a head at a time; its float32 sums are the gradients where autocast computes in less.
        """
        found, head = self.estimate(batch), self.head
        most = _KEPT_ON_CPU if self.device.type == "cpu" else 0
        again = head.returned if head.gradient or self.accumulates else 0  # whose memory the next loss takes
        return {
            "tdpo": LossBytes(
                peak=found.temporaries + found.gradients + head.copies,
                left=found.gradients + min(found.temporaries, most),
                kept=min(found.temporaries + again, most),
            ),
            "published": LossBytes(found.published + head.copies),
            "trl": LossBytes(found.trl + (0 if head.copies else found.gradients)),
        }

    def kept(self, batch: Batch, *, checkpointed: bool) -> int | None:
        """The bytes of activations; None where they are not known."""
        if isinstance(self.activations, str):
            return None
        found, sequences = self.activations, batch.sequences
        return sum(bytes_of(*sequences, checkpointed=checkpointed) for bytes_of in (found.forward, found.recomputed))

    @property
    def copies(self) -> int:
        """The bytes of the backbone's weights in the precision of autocast."""
        return 0 if isinstance(self.activations, str) else self.activations.copies

    def together(self, batch: Batch) -> dict[str, int]:
        """The peak of a step by every way: the most of its phases. What is not known counts as 0."""
        return {way: max(self.phases(batch, loss).values()) for way, loss in self.loss(batch).items()}

    def phases(self, batch: Batch, loss: LossBytes) -> dict[str, int]:
        """The bytes of a step while its loss is computed, and at both ends of its backward pass.

        Between these ends gradients come as activations go, a layer at a time. An optimizer's step has nothing that
        the end of the backward pass has not. The forward pass has less than the loss.
        """
        held = self.weights + (self.optimizer or 0) + self.reference.bytes
        earlier = self.gradients if self.accumulates else 0
        activations = layer = copies_of_layer = 0
        copies_at_loss = copies = self.copies
        if not isinstance(self.activations, str):
            activations = self.activations.forward(*batch.sequences, checkpointed=self.checkpointed)
            layer = self.activations.recomputed(*batch.sequences, checkpointed=self.checkpointed)
            if self.checkpointed:
                copies_at_loss = min(self.copies, self.cached)
                copies = copies_of_layer = self.copies // self.activations.layers
        return {
            "loss": held + activations + copies_at_loss + earlier + loss.peak,
            "backward": held + activations + copies + layer + earlier + loss.left + self.head.gradient,
            "gradients": held + self.gradients + max(layer + copies_of_layer, self.head.beside) + loss.kept,
        }

    def longest(self, batch: Batch, memory: int, way: str) -> int:
        """The most response tokens with which such a batch stays within `memory` bytes; 0 if none does."""

        def fits(response: int) -> bool:
            tried = Batch(batch.pairs, batch.prompt, response, batch.shared)
            return self.together(tried)[way] <= memory

        low, high = 0, 1
        while high <= _LONGEST and fits(high):
            low, high = high, 2 * high
        while high - low > max(1, low >> 7):  # to a hundredth
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return min(low, _LONGEST)


def _head_weight(name: str, model: Any) -> Tensor:
    """Of a head, without what adapters add to it."""
    parts = head_parts(unwrap_peft(model).get_output_embeddings())
    if isinstance(parts, str):
        raise ValueError(f"the logits of {name} are materialised: {parts}")
    return parts.weights[0]
