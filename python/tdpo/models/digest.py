"""Digests of weights: a model's name and folder stay the same when they are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .causal_lm import unwrap_peft
from .sharding import is_partitioned, local_values


def weights_digest(model: nn.Module, *, with_adapters: bool = True) -> str:
    """A digest of the names, types and values of a model's weights, the same on all processes.

    Args:
        with_adapters: if False, the digest is that of the model before it was given adapters.
    """
    digest, spread = xxhash.xxh3_128(), False
    for name, value in _named_values(unwrap_peft(model), with_adapters):
        spread = spread or is_partitioned(value) or isinstance(value, DTensor)
        local = local_values(value).detach().cpu().contiguous()
        digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        digest.update(local.reshape(-1).view(torch.uint8).numpy().data)
    return _of_all_processes(digest.hexdigest()) if spread else digest.hexdigest()


def _named_values(model: nn.Module, with_adapters: bool) -> Iterator[tuple[str, Tensor]]:
    values = model.state_dict(keep_vars=True).items()
    if with_adapters:
        yield from values
        return
    layers = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    for name, value in values:
        if name.startswith(layers) and ".base_layer." not in name:
            continue  # what an adapter adds
        yield name.replace(".base_layer.", "."), value


def _of_all_processes(digest: str) -> str:
    """One digest for the parts of all processes."""
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    return xxhash.xxh3_128("".join(digests).encode()).hexdigest()
