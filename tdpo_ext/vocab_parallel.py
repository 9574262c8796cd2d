"""A vocabulary sharded over the ranks of a process group, and every collective of the library.

Kernels are local. Ranks exchange four things in a call: a header with what they must agree on and whether each is
ready; the row states of a chunk (`STATE_SIZE` numbers per row and rank, whatever the vocabulary); the sum of dhidden;
and, at the end, whether all have succeeded. A rank that fails in between takes part in the remaining exchanges with
zeros, so that no rank waits for another, and at the end all raise its message.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .ops import operators

Result = TypeVar("Result")
_HEADER = 32  # numbers in a header: whether the rank is ready, its start and stop, and its facts
_ODD = 0x1E3779B97F4A7C15


class Fact(NamedTuple):
    """A number that a rank reports to the others; `argument` is what it follows from where all must report the same."""

    name: str
    value: int | float
    argument: str | None = None


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
        checks.integer("start", self.start)
        checks.integer("stop", self.stop)
        if not isinstance(self.sum_hidden_grad, bool):
            raise TypeError(f"sum_hidden_grad is {checks.describe(self.sum_hidden_grad)}; True or False is needed")
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
        checks.integer("vocab_size", vocab_size, least=1)
        group = group.get_group() if hasattr(group, "mesh_dim_names") else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group is {checks.describe(group)}; a torch process group is needed")
        return cls(*_part(vocab_size, dist.get_world_size(group), dist.get_rank(group)), group, **options)

    @classmethod
    def from_dtensor(cls, tensor: Any, dim: int = 0, **options) -> VocabShard:
        """The shard that a DTensor's local part is: a weight is sharded along dimension 0, logits along the last.

        Raises:
            ValueError: the DTensor isn't sharded along `dim`, or along something else too.
        """
        from torch.distributed.tensor import Shard

        if not hasattr(tensor, "placements"):
            raise TypeError(f"tensor is {checks.describe(tensor)}; a DTensor is needed")
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

    def agree(self, device: torch.device, prepare: Callable[[], tuple[Result, list[Fact]]]) -> tuple[Result, RankFacts]:
        """Runs `prepare() -> (result, facts)` on every rank; returns this rank's result and the facts of all ranks.

        Raises:
            RuntimeError: another rank failed; the message is that rank's. (The rank that failed raises its own error.)
            ValueError: the shards don't tile a vocabulary, or ranks differ in what they must share.
        """
        failure: Exception | None = None
        result, facts = None, list[Fact]()
        try:
            result, facts = prepare()
        except Exception as error:
            failure = error
        header = torch.zeros(_HEADER, dtype=torch.int64, device="cpu")
        header[:3] = header.new_tensor([failure is None, self.start, self.stop])
        header[3 : 3 + len(facts)] = header.new_tensor([_as_integer(fact.value) for fact in facts])
        headers = self.all_gather(header.to(device)).tolist()
        if not all(succeeded for succeeded, *_ in headers):
            self.raise_failure(failure)
        vocab_size = _tiled_size([(start, stop) for _, start, stop, *_ in headers])
        by_rank = {fact.name: [row[3 + index] for row in headers] for index, fact in enumerate(facts)}
        for name, argument in ((fact.name, fact.argument) for fact in facts):
            if argument is not None and len(set(by_rank[name])) > 1:
                raise ValueError(f"{argument} differs between the vocabulary's ranks: {name} {by_rank[name]}")
        return result, RankFacts(vocab_size, by_rank)  # type: ignore[return-value]

    def all_gather(self, payload: Tensor) -> Tensor:
        """Every rank's payload (n,), stacked in rank order: (ranks, n)."""
        gathered = payload.new_empty(dist.get_world_size(self.group), len(payload))
        dist.all_gather(list(gathered.unbind()), payload, group=self.group)
        return gathered

    def raise_failure(self, failure: Exception | None) -> NoReturn:
        """Raises this rank's own failure or, where only others failed, theirs; all ranks call."""
        messages: list[str | None] = [None] * dist.get_world_size(self.group)
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(messages, message, group=self.group)
        if failure is not None:
            raise failure
        failed = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None)
        raise RuntimeError(f"tdpo_ext: failed on another rank of the vocabulary's group: {failed}")


class Exchange:
    """The exchanges of one call over a shard, or of a call that has none.

    Local work runs through `run`, which keeps a failure for the end; `finish` raises it, on all ranks. Without a shard,
    failures are raised where they happen.
    """

    def __init__(self, shard: VocabShard | None):
        self.shard = shard
        self._failure: Exception | None = None
        self._digests: list[Tensor] = []

    def run(self, work: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
        """`work()`; where it fails, or anything before it has failed, `otherwise()`."""
        if self.shard is None:
            return work()
        if self._failure is None:
            try:
                return work()
            except Exception as error:
                self._failure = error
        return otherwise()

    def merged_row_states(
        self,
        local: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        reverse_kl: bool,
    ) -> Tensor:  # (*shape, STATE_SIZE)
        """The states of rows of `shape` that `local` computes over this rank's slice, merged with the other ranks'."""
        if self.shard is None:
            return local()
        size = (*shape, operators.STATE_SIZE)
        states = self.run(local, lambda: torch.zeros(size, dtype=dtype, device=device))
        gathered = self.shard.all_gather(states.reshape(-1))
        return operators.merge_row_states(gathered.reshape(len(gathered), *size), reverse_kl=reverse_kl)

    def start_sum(self, local: Callable[[Tensor], object], out: Tensor) -> Callable[[], Tensor]:
        """Starts summing over the ranks what `local` writes into `out`; the returned function waits for the sum."""
        assert self.shard is not None

        def write() -> Tensor:
            local(out)
            return out

        payload = self.run(write, out.zero_)
        work = dist.all_reduce(payload, group=self.shard.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return payload

        return wait

    def compare(self, values: Tensor) -> None:
        """What every rank has computed for itself from what all have: `finish` raises where it differs."""
        if self.shard is not None:
            self._digests.append(_digest(values))

    def finish(self, device: torch.device) -> None:
        """Raises, on every rank, if any has failed since the exchange began, or has computed something else."""
        if self.shard is None:
            return
        outcome = torch.zeros(1, dtype=torch.int64, device=device)  # 0: failed
        if self._failure is None:
            odd = 2 * torch.arange(len(self._digests), device=device) + 1
            outcome += (torch.stack(self._digests) * odd).sum() if self._digests else 0
            outcome |= 1
        outcomes = self.shard.all_gather(outcome)[:, 0].tolist()
        if 0 in outcomes:
            self.shard.raise_failure(self._failure)
        if len(set(outcomes)) > 1:
            raise ValueError(
                "objective differs between the vocabulary's ranks: they agree on made-up pairs, but not in the loss of "
                "these pairs or in its gradient"
            )


@dataclass(frozen=True)
class RankFacts:
    """What the ranks of a group reported to each other.

    Attributes:
        vocab_size: entries of the whole vocabulary.
        by_rank: numbers by name, one for each rank.
    """

    vocab_size: int
    by_rank: dict[str, list[int]]


def digest(values: Tensor) -> int:
    """A number that tells tensors of integers or floats apart, whatever their shape; read from the device."""
    return int(_digest(values)) ^ values.numel()


def row_digest(values: Tensor) -> Tensor:
    """A number for each row of (rows, width), which tells rows apart by the bits of their entries; on the device.

    It is a sum of integers: exact, and the same whatever its order.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().view(integers[values.element_size()]).sum(-1, dtype=torch.int64)


def _digest(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.double().view(torch.int64)
    flat = flat.to(torch.int64)
    factors = (2 * torch.arange(len(flat), device=flat.device) + 1) * _ODD
    return ((flat ^ (flat >> 29)) * factors).sum()


def _as_integer(value: int | float) -> int:
    """The value itself, or the bits of a float."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if isinstance(value, float) else int(value)


def local_tensors(
    sharded: dict[str, Any], replicated: dict[str, Any], vocab_dim: int
) -> tuple[dict[str, Any], VocabShard | None]:
    """The local parts of all tensors by name and, where the `sharded` are DTensors, the shard that they are.

    The `sharded` are split along `vocab_dim` alike, or are None; the `replicated` are the same on every rank. Gradients
    flow back to the DTensors. The shard is None where the `sharded` are plain tensors.

    Raises:
        ValueError: one of the `sharded` is a plain tensor beside DTensors, or sharded otherwise; the message names it.
    """
    first_name, first = next(iter(sharded.items()))
    shard = VocabShard.from_dtensor(first, vocab_dim) if _is_dtensor(first) else None
    for name, tensor in sharded.items():
        if tensor is None or (shard is None and not _is_dtensor(tensor)):
            continue
        if shard is None or not _is_dtensor(tensor):
            kinds = ("a plain tensor", "a DTensor") if shard is not None else ("a DTensor", "a plain tensor")
            raise ValueError(f"{name} is {kinds[0]} but {first_name} is {kinds[1]}; both must be sharded alike")
        other = VocabShard.from_dtensor(tensor, vocab_dim)
        if (other.start, other.stop, other.group) != (shard.start, shard.stop, shard.group):
            raise ValueError(f"{name} is sharded otherwise than {first_name}")
    tensors = {**sharded, **replicated}
    return {name: t.to_local() if _is_dtensor(t) else t for name, t in tensors.items()}, shard


def check_replicated(name: str, tensor: Any, shard: VocabShard | None) -> None:
    """Nothing for plain tensors.

    Raises:
        ValueError: a DTensor that is a sum still to be taken, or in parts over the shard's group.
    """
    if not _is_dtensor(tensor):
        return
    for mesh_dim, placement in enumerate(tensor.placements):
        in_parts = shard is not None and tensor.device_mesh.get_group(mesh_dim) == shard.group
        if placement.is_partial() or (in_parts and not placement.is_replicate()):
            raise ValueError(
                f"{name} is a DTensor with placements {tuple(tensor.placements)}, but every rank of the vocabulary "
                f"needs it whole: pass {name}.redistribute(placements=[Replicate()]) (on that mesh dimension)"
            )


def _is_dtensor(value: Any) -> bool:
    return hasattr(value, "placements")


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
