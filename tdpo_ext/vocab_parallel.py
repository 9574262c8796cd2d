"""A vocabulary sharded over the ranks of a process group, and every collective of the library.

Kernels are local. Ranks exchange three things: a short header with what they must agree on and whether each is ready,
the row states of a chunk (`STATE_SIZE` numbers per row and rank, whatever the vocabulary), and the sum of dhidden. Each
carries a failure flag: when one rank fails, all raise its message instead of waiting for it forever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import operators

Result = TypeVar("Result")
_HEADER = 12  # numbers in a header


@dataclass(frozen=True)
class VocabShard:
    """The rows start to stop of both LM heads (or columns of both logits) that this rank holds.

    The shards of a group's ranks tile the vocabulary, in any order and of any sizes, including empty ones. Labels are
    global token ids and, like hidden states, the same on every rank. A weight (or logits) with more rows than the shard
    counts as padded at the end: the padding takes no part and gets a zero gradient.

    Args:
        start, stop: the shard's first token id and the one after its last.
        group: the torch process group (any backend that serves the tensors' device), or a 1-D DeviceMesh.
        sum_hidden_grad: whether the fused losses sum dL/dhidden over the group, in float32. False leaves each rank its
            own share, for callers whose layers already reduce it.

    Raises:
        ValueError: bounds out of order, or a mesh of several dimensions.
        TypeError: `group` is no process group.
    """

    start: int
    stop: int
    group: Any
    sum_hidden_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"start and stop are {self.start} and {self.stop}; 0 <= start <= stop is needed")
        if hasattr(self.group, "mesh_dim_names"):
            if self.group.ndim != 1:
                raise ValueError(f"group is a mesh of {self.group.ndim} dimensions; pass one of them")
            object.__setattr__(self, "group", self.group.get_group())
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group is {type(self.group).__name__}; a torch process group is needed")

    @classmethod
    def from_group(cls, vocab_size: int, group: Any, **options) -> VocabShard:
        """This rank's share of `vocab_size` entries in equal parts, as `torch.chunk` cuts them (so does DTensor)."""
        group = group.get_group() if hasattr(group, "mesh_dim_names") else group
        return cls(*_part(vocab_size, dist.get_world_size(group), dist.get_rank(group)), group, **options)

    @classmethod
    def from_dtensor(cls, tensor: Any, dim: int = 0, **options) -> VocabShard:
        """The shard that a DTensor's local part is: a weight is sharded along dimension 0, logits along the last.

        Raises:
            ValueError: the DTensor isn't sharded along `dim`, or along something else too.
        """
        from torch.distributed.tensor import Shard

        dim %= tensor.ndim
        mesh, sharded = tensor.device_mesh, [p for p in tensor.placements if not p.is_replicate()]
        if len(sharded) != 1 or type(sharded[0]) is not Shard or sharded[0].dim % tensor.ndim != dim:
            raise ValueError(
                f"the DTensor has placements {tuple(tensor.placements)}; Shard({dim}) on one mesh dimension is needed, "
                "and Replicate on the others"
            )
        mesh_dim = tensor.placements.index(sharded[0])
        part = _part(tensor.shape[dim], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
        return cls(*part, mesh.get_group(mesh_dim), **options)

    @property
    def size(self) -> int:
        """Vocabulary entries of this shard."""
        return self.stop - self.start

    def narrow(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` without padding beyond the shard.

        Raises:
            ValueError: it is smaller than the shard; the message names it.
        """
        if tensor.shape[dim] < self.size:
            raise ValueError(f"{name} has {tensor.shape[dim]} entries of the vocabulary, but its shard has {self.size}")
        return tensor if tensor.shape[dim] == self.size else tensor.narrow(dim, 0, self.size)

    def agree(
        self, device: torch.device, prepare: Callable[[], tuple[Result, dict[str, int]]]
    ) -> tuple[Result, RankFacts]:
        """Runs `prepare() -> (result, facts)` on every rank; returns this rank's result and the facts of all ranks.

        Raises:
            RuntimeError: another rank failed; the message is that rank's. (The rank that failed raises its own error.)
            ValueError: the shards don't tile a vocabulary.
        """
        failure: Exception | None = None
        result, facts = None, dict[str, int]()
        try:
            result, facts = prepare()
        except Exception as error:
            failure = error
        header = torch.zeros(_HEADER, dtype=torch.int64)
        header[:3] = torch.tensor([failure is None, self.start, self.stop])
        header[3 : 3 + len(facts)] = torch.tensor(list(facts.values()), dtype=torch.int64)
        headers = self._gather(header.to(device)).tolist()
        if not all(succeeded for succeeded, *_ in headers):
            self._raise(failure)
        vocab_size = _tiled_size([(start, stop) for _, start, stop, *_ in headers])
        by_rank = {name: [row[3 + index] for row in headers] for index, name in enumerate(facts)}
        return result, RankFacts(vocab_size, by_rank)  # type: ignore[return-value]

    def gather(self, local: Callable[[Tensor], object], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """What `local` writes on each rank into a tensor of `shape`, stacked in rank order: (ranks, *shape)."""
        payload, failure = self._run_local(local, shape, like)
        gathered = self._gather(payload)
        if gathered[:, -1].any():
            self._raise(failure)
        return gathered[:, :-1].reshape(-1, *shape)

    def sum(self, local: Callable[[Tensor], object], shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """Starts summing what `local` writes on each rank into a tensor of `shape`; the returned function waits."""
        payload, failure = self._run_local(local, shape, like)
        work = dist.all_reduce(payload, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            if payload[-1] != 0:
                self._raise(failure)
            return payload[:-1].view(shape)

        return wait

    def _run_local(
        self, local: Callable[[Tensor], object], shape: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Exception | None]:
        """What `local` writes, flat, followed by a flag that is 1 where it raised instead."""
        payload = like.new_zeros(prod(shape) + 1)
        try:
            local(payload[:-1].view(shape))
        except Exception as error:
            payload.zero_()[-1] = 1
            return payload, error
        return payload, None

    def _gather(self, payload: Tensor) -> Tensor:
        gathered = payload.new_empty(dist.get_world_size(self.group), len(payload))
        dist.all_gather(list(gathered.unbind()), payload, group=self.group)
        return gathered

    def _raise(self, failure: Exception | None) -> NoReturn:
        """Raises this rank's own failure or, where only others failed, theirs."""
        messages: list[str | None] = [None] * dist.get_world_size(self.group)
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(messages, message, group=self.group)
        if failure is not None:
            raise failure
        failed = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None)
        raise RuntimeError(f"tdpo_ext: failed on another rank of the vocabulary's group: {failed}")


@dataclass(frozen=True)
class RankFacts:
    """What the ranks of a group reported to each other.

    Attributes:
        vocab_size: entries of the whole vocabulary.
        by_rank: numbers by name, one for each rank.
    """

    vocab_size: int
    by_rank: dict[str, list[int]]

    def check_same(self, fact: str, argument: str) -> None:
        """Raises ValueError, on every rank, where ranks differ in `fact`, which follows from `argument`."""
        if len(set(self.by_rank[fact])) > 1:
            raise ValueError(f"{argument} differs between the vocabulary's ranks: {fact} {self.by_rank[fact]}")


def merged_row_states(
    shard: VocabShard | None,
    local: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # (*shape, STATE_SIZE)
    """The states of rows of `shape` that `local` computes over this rank's slice, merged with the other ranks'."""
    if shard is None:
        return local()
    like = torch.empty(0, dtype=dtype, device=device)
    states = shard.gather(lambda out: out.copy_(local()), (*shape, operators.STATE_SIZE), like)
    return operators.merge_row_states(states)


def local_tensors(
    sharded: dict[str, Any], replicated: dict[str, Any], vocab_dim: int
) -> tuple[dict[str, Any], VocabShard | None]:
    """The local parts of all tensors by name and, where the `sharded` are DTensors, the shard that they are.

    The `sharded` are split along `vocab_dim` alike, or are None; the `replicated` are the same on every rank. Gradients
    flow back to the DTensors. Plain tensors are returned as they are, with None.

    Raises:
        ValueError: one of the `sharded` is a plain tensor beside DTensors, or sharded otherwise; the message names it.
    """
    first_name, first = next(iter(sharded.items()))
    if not hasattr(first, "placements"):
        return {**sharded, **replicated}, None
    shard = VocabShard.from_dtensor(first, vocab_dim)
    for name, tensor in sharded.items():
        if tensor is None:
            continue
        if not hasattr(tensor, "placements"):
            raise ValueError(f"{name} is a plain tensor but {first_name} is a DTensor; both must be sharded alike")
        other = VocabShard.from_dtensor(tensor, vocab_dim)
        if (other.start, other.stop, other.group) != (shard.start, shard.stop, shard.group):
            raise ValueError(f"{name} is sharded otherwise than {first_name}")
    tensors = {**sharded, **replicated}
    return {name: t.to_local() if hasattr(t, "placements") else t for name, t in tensors.items()}, shard


def _tiled_size(bounds: list[tuple[int, int]]) -> int:
    """Entries of the vocabulary that shards with these bounds cover, each once."""
    covered = 0
    for start, stop in sorted((start, stop) for start, stop in bounds if stop > start):
        if start != covered:
            shards = ", ".join(f"{start} to {stop}" for start, stop in bounds)
            raise ValueError(f"the shards don't tile a vocabulary: {shards}")
        covered = stop
    return covered


def _part(total: int, parts: int, index: int) -> tuple[int, int]:
    """Bounds of part `index` of `total` entries, as torch.chunk cuts them."""
    size = -(-total // parts)
    return min(total, index * size), min(total, (index + 1) * size)
