"""Digests of the weights that a run starts from, and that a cache was made from."""

from __future__ import annotations

from torch import nn

from ..models.digest import weights_digest
from .without_adapters import starts_without_adapters


def reference_digest(model: nn.Module) -> str:
    """The digest of a reference's weights. New adapters, which change nothing, are left out."""
    return weights_digest(model, with_adapters=not starts_without_adapters(model))


def digests_at_start(model: nn.Module, ref_model: nn.Module | None) -> dict[str, str]:
    """The digests of the policy's weights and of the reference's, by the names of the arguments.

    Args:
        model: before new adapters are added: some are initialised by a decomposition, which differs between machines.
        ref_model: as it was given, or None.
    """
    digest = reference_digest(model)
    return {"model": digest, "ref_model": digest if ref_model is None else reference_digest(ref_model)}
