"""A vocabulary sharded over the ranks of a process group, and every collective of the library.

Kernels are local. Ranks exchange three things: a short header that says whether all are ready and what they agree on,
the row states of a chunk (`STATE_SIZE` numbers a row and rank, whatever the vocabulary), and the sum of dhidden. Each
carries a flag, so that a rank that fails takes the others with it, message and all, where they would otherwise wait for
it forever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
_HEADER = 12  # numbers in a header


@dataclass(frozen=True)
class VocabShard:
    """The rows start to stop of both LM heads (or columns of both logits) that this rank holds.

    The shards of a group's ranks tile the vocabulary, in any order and of any sizes, empty ones included. Labels are
    global token ids and, like hidden states, the same on every rank. A weight (or logits) with more rows than the shard
    is taken to be padded at the end: what is beyond the shard takes no part and gets a zero gradient.

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
    ) -> tuple[Result, dict[str, list[int]]]:
        """Runs `prepare() -> (result, facts)` on every rank; returns this rank's result and all ranks' facts.

        The facts named "vocab_size" are added: the whole vocabulary's size.

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
        rows = self._gather(header.to(device)).tolist()
        if not all(row[0] for row in rows):
            self._fail(failure)
        last = 0
        for start, stop in sorted((row[1], row[2]) for row in rows if row[2] > row[1]):
            if start != last:
                bounds = ", ".join(f"{row[1]} to {row[2]}" for row in rows)
                raise ValueError(f"the shards don't tile a vocabulary: {bounds}")
            last = stop
        found = {name: [row[3 + index] for row in rows] for index, name in enumerate(facts)}
        return result, {**found, "vocab_size": [last] * len(rows)}  # type: ignore[return-value]

    @staticmethod
    def check_same(facts: dict[str, list[int]], arguments: dict[str, str]) -> None:
        """Raises ValueError, on every rank, where ranks differ in a fact; `arguments` says whose fact it is."""
        for fact, argument in arguments.items():
            if len(set(facts[fact])) > 1:
                raise ValueError(f"{argument} differs between the vocabulary's ranks: {fact} {facts[fact]}")

    def gather(self, local: Callable[[Tensor], None], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """What `local` writes on each rank into a tensor of `shape`, stacked in rank order: (ranks, *shape)."""
        payload, failure = self._guarded(local, shape, like)
        gathered = self._gather(payload)
        if gathered[:, -1].any():
            self._fail(failure)
        return gathered[:, :-1].reshape(-1, *shape)

    def sum(self, local: Callable[[Tensor], None], shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """Starts to sum what `local` writes on each rank into a tensor of `shape`; what is returned waits for it."""
        payload, failure = self._guarded(local, shape, like)
        work = dist.all_reduce(payload, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            if payload[-1] != 0:
                self._fail(failure)
            return payload[:-1].view(shape)

        return finish

    def _guarded(self, local, shape, like) -> tuple[Tensor, Exception | None]:
        """What `local` writes, flat, and behind it a number that is 1 where it failed instead."""
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

    def _fail(self, failure: Exception | None) -> None:
        """Raises this rank's own failure or, where others failed, theirs."""
        messages: list[str | None] = [None] * dist.get_world_size(self.group)
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(messages, mine, group=self.group)
        if failure is not None:
            raise failure
        failed = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None)
        raise RuntimeError(f"tdpo_ext: failed on another rank of the vocabulary's group: {failed}")


def _part(total: int, parts: int, index: int) -> tuple[int, int]:
    size = -(-total // parts)
    return min(total, index * size), min(total, (index + 1) * size)


def local_parts(names: tuple[str, ...], tensors: dict[str, Any], dim: int) -> tuple[dict[str, Any], VocabShard | None]:
    """Where `tensors[names[0]]` is a DTensor sharded over the vocabulary: the local parts, and its shard.

    The tensors in `names` are sharded along `dim` alike (or are None); all others are replicated. Gradients go back to
    the DTensors. Plain tensors are returned as they are, with None.

    Raises:
        ValueError: one of `names` is not a DTensor, or sharded otherwise; the message names it.
    """
    if not hasattr(tensors[names[0]], "placements"):
        return tensors, None
    shard = VocabShard.from_dtensor(tensors[names[0]], dim)
    local = dict(tensors)
    for name, tensor in tensors.items():
        if name in names and tensor is not None:
            if not hasattr(tensor, "placements"):
                raise ValueError(f"{name} is a plain tensor but {names[0]} is a DTensor; both must be sharded alike")
            other = VocabShard.from_dtensor(tensor, dim)
            if (other.start, other.stop, other.group) != (shard.start, shard.stop, shard.group):
                raise ValueError(f"{name} is sharded otherwise than {names[0]}")
        if hasattr(tensor, "placements"):
            local[name] = tensor.to_local()
    return local, shard
