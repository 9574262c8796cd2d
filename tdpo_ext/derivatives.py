"""What backward functions keep, and derivatives that they do not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def save(ctx, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, for tensors made in inference mode too.

    Those are not told from ones that were changed in place since: torch counts no changes of them.
    """
    ctx.unversioned = [tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors]
    ctx.save_for_backward(*(tensor if kept is None else None for tensor, kept in zip(tensors, ctx.unversioned)))


def saved(ctx) -> list[Any]:
    """The tensors that `save` has kept, and None where it was given None.

    Raises:
        RuntimeError: a tensor has been changed in place since.
    """
    return [tensor if kept is None else kept for tensor, kept in zip(ctx.saved_tensors, ctx.unversioned)]


def anchor(leaves: Iterable[Tensor | None]) -> Tensor:
    """An empty tensor whose graph reaches all leaves, and that keeps none of their data."""
    return torch.cat([leaf[:0].reshape(0) for leaf in leaves if leaf is not None and leaf.requires_grad])


def once(
    what: str, gradients: Iterable[Tensor | None], depend_on: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """What a backward function returns whose own derivative is not known: a second backward through it raises.

    Args:
        what: the name of the public function.
        depend_on: all that the gradients depend on: inputs (or their `anchor`) and upstream gradients.
    """
    if not torch.is_grad_enabled():  # no create_graph=True: nothing differentiates the gradients
        return tuple(gradients)
    origins = [tensor for tensor in depend_on if tensor is not None]
    return tuple(None if gradient is None else _Once.apply(what, gradient, *origins) for gradient in gradients)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, what: str, gradient: Tensor, *_origins: Tensor) -> Tensor:
        ctx.what = what
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(
            f"tdpo_ext: a second derivative through {ctx.what} is not supported: its gradients are formed by kernels "
            "that have no derivative; tdpo_ext.eager has all derivatives"
        )
