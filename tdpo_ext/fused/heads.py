"""LM heads, and the tensors of a call: hidden states beside the heads that make logits of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..ops.matmul import full_precision, product
from ..vocab_parallel import VocabShard, check_replicated, local_tensors

# (V, D), or parts of it that lie side by side, (V, D_1), (V, D_2), ...
Weight = Tensor | list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Head:
    """An LM head: logits = scale * (hidden @ weight.T + bias).

    Attributes:
        weights: the weight, (V, D), in one or more parts that lie side by side, (V, D_1), (V, D_2), ..., of this rank's
            slice of the vocabulary.
        bias: (V,), or None.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, weight: Weight, bias: Tensor | None) -> Head:
        """Of a public function's arguments."""
        return cls(tuple(weight) if isinstance(weight, (list, tuple)) else (weight,), bias)

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary that this rank holds."""
        return self.weights[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def widths(self) -> list[int]:
        return [weight.shape[1] for weight in self.weights]

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def trained_width(self) -> int:
        """Of the parts that want a gradient."""
        return sum(weight.shape[1] for weight in self.weights if weight.requires_grad)

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """The parts by the names that messages have for them."""
        if len(self.weights) == 1:
            return {f"{prefix}weight": self.weights[0]}
        return {f"{prefix}weight[{part}]": weight for part, weight in enumerate(self.weights)}

    def cast(self, dtype: torch.dtype) -> Head:
        weights = tuple(weight.to(dtype) for weight in self.weights)
        return replace(self, weights=weights, bias=None if self.bias is None else self.bias.to(dtype))

    def detach(self) -> Head:
        weights = tuple(weight.detach() for weight in self.weights)
        return replace(self, weights=weights, bias=None if self.bias is None else self.bias.detach())

    def beside(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every part, and its columns of some rows of hidden states or of their gradient, (n, D)."""
        return list(zip(self.weights, columns_of_parts(rows, self.widths)))

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of some rows' hidden states over some columns, in the precision of `out`, which is returned."""
        with full_precision(hidden):
            for part, (weight, piece) in enumerate(self.beside(hidden)):
                product(piece, weight[columns].t(), out, accumulate=part > 0)
        if self.bias is not None:
            out += self.bias[columns]
        return out if self.scale == 1 else out.mul_(self.scale)

    def hidden_gradient(self, dz: Tensor, columns: slice, out: Tensor, *, accumulate: bool = False) -> None:
        """out = dz @ weight[columns], or out += it, in the precision of `out`, (n, D)."""
        for weight, piece in self.beside(out):
            product(dz, weight[columns], piece, accumulate=accumulate)


def columns_of_parts(rows: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """The columns, of some rows (n, D), of parts that lie side by side; of a single part without an operation."""
    return [rows] if len(widths) == 1 else rows.split(list(widths), dim=1)


@dataclass(frozen=True)
class CallTensors:
    """The tensors of a public call; widths and dtypes of policy and reference may differ.

    Attributes:
        hidden, ref_hidden: (..., D) and (..., D_ref); flat, (N, D), once they are prepared.
        head, ref_head: the policy's and the reference's.
        labels: (...), token ids of the whole vocabulary; flat, (N,), once they are prepared.
        has_reference: False where the call has none: the policy's tensors then stand in its place, and are not read.
    """

    hidden: Tensor
    head: Head
    ref_hidden: Tensor
    ref_head: Head
    labels: Tensor
    has_reference: bool = True

    @classmethod
    def of_call(
        cls,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        labels: Tensor,
        *,
        ref_hidden: Tensor | None,
        ref_weight: Weight | None,
        ref_bias: Tensor | None,
    ) -> CallTensors:
        """Of a public function's arguments.

        Raises:
            ValueError: there is a part of a reference only.
        """
        if ref_hidden is None and ref_weight is None:
            if ref_bias is not None:
                raise ValueError("ref_bias is given, but ref_hidden and ref_weight are None")
            return cls(hidden, Head.of(weight, bias), hidden, Head.of(weight, bias), labels, has_reference=False)
        for name, other, given in (("ref_hidden", "ref_weight", ref_hidden), ("ref_weight", "ref_hidden", ref_weight)):
            if given is None:
                raise ValueError(f"{name} is None but {other} is given; both are needed, or neither")
        assert ref_hidden is not None
        assert ref_weight is not None
        return cls(hidden, Head.of(weight, bias), ref_hidden, Head.of(ref_weight, ref_bias), labels)

    def check_types(self) -> None:
        """Raises TypeError or ValueError naming the first argument that is no tensor that the kernels know.

        Raises:
            RuntimeError: inside a transform of `torch.func`.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "tdpo_ext: the fused losses do not run inside transforms of torch.func (grad, vmap, jvp, ...); use "
                "torch.autograd.grad or backward, or tdpo_ext.eager"
            )
        for prefix, hidden, head in (("", self.hidden, self.head), ("ref_", self.ref_hidden, self.ref_head)):
            checks.float_tensor(f"{prefix}hidden", hidden)
            if not head.weights:
                raise ValueError(f"{prefix}weight is an empty sequence; a tensor, or several, are needed")
            for name, weight in head.named(prefix).items():
                checks.float_tensor(name, weight)
            if head.bias is not None:
                checks.float_tensor(f"{prefix}bias", head.bias)
        checks.label_tensor("labels", self.labels)

    def check_replicated(self, shard: VocabShard | None) -> None:
        """Raises ValueError naming a DTensor beside the heads whose local part is not what every rank must have."""
        for name, tensor in (("hidden", self.hidden), ("ref_hidden", self.ref_hidden), ("labels", self.labels)):
            check_replicated(name, tensor, shard)

    def local(self) -> tuple[CallTensors, VocabShard | None]:
        """The local parts of arguments that are DTensors, and the shard that their heads are."""
        heads = {"": self.head, "ref_": self.ref_head}
        sharded: dict[str, Tensor | None] = {}
        for prefix, head in heads.items():
            sharded |= {**head.named(prefix), f"{prefix}bias": head.bias}
        replicated = {"hidden": self.hidden, "ref_hidden": self.ref_hidden, "labels": self.labels}
        local, shard = local_tensors(sharded, replicated, vocab_dim=0)
        head, ref_head = (
            Head(tuple(local[name] for name in head.named(prefix)), local[f"{prefix}bias"])
            for prefix, head in heads.items()
        )
        tensors = CallTensors(
            hidden=local["hidden"],
            head=head,
            ref_hidden=local["ref_hidden"],
            ref_head=ref_head,
            labels=local["labels"],
            has_reference=self.has_reference,
        )
        return tensors, shard

    def narrowed(self, shard: VocabShard) -> CallTensors:
        """Heads without padding beyond the shard."""

        def narrow(head: Head, prefix: str) -> Head:
            bias = None if head.bias is None else shard.narrow(f"{prefix}bias", head.bias, 0)
            return Head(tuple(shard.narrow(name, weight, 0) for name, weight in head.named(prefix).items()), bias)

        return replace(self, head=narrow(self.head, ""), ref_head=narrow(self.ref_head, "ref_"))

    def autocast(self) -> CallTensors:
        """The casts of `torch.nn.functional.linear` under autocast; unchanged without."""
        device_type = self.hidden.device.type
        if not torch.is_autocast_enabled(device_type):
            return self
        dtype = torch.get_autocast_dtype(device_type)
        return replace(self, hidden=self.hidden.to(dtype), head=self.head.cast(dtype)).cast_reference(dtype)

    def cast_reference(self, dtype: torch.dtype) -> CallTensors:
        """The reference in another precision; what stands in its place is the policy, as it is cast already."""
        if not self.has_reference:
            return replace(self, ref_hidden=self.hidden, ref_head=self.head)
        return replace(self, ref_hidden=self.ref_hidden.to(dtype), ref_head=self.ref_head.cast(dtype))

    def check_shapes(self) -> None:
        """Raises ValueError or TypeError naming the first argument whose shape, dtype or device doesn't fit."""
        device, head, ref_head = self.hidden.device, self.head, self.ref_head
        rows, vocab = tuple(self.labels.shape), _size(head.weights[0], 0)

        def check(name: str, tensor: Tensor | None, shape: tuple[int, ...], hidden: Tensor, beside: str) -> None:
            if tensor is None:
                return
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} but {shape} is needed beside {beside}")
            if tensor.dtype != hidden.dtype:
                hidden_name = "ref_hidden" if name.startswith("ref_") else "hidden"
                raise TypeError(
                    f"{name} has dtype {tensor.dtype} but {hidden_name} has {hidden.dtype}; call the loss inside "
                    "autocast, as the model that made the hidden states, or cast one of them"
                )
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device} but hidden is on {device}")

        def check_head(prefix: str, head: Head, hidden: Tensor, beside: str) -> None:
            width, named = _size(hidden, -1), head.named(prefix)
            check(f"{prefix}hidden", hidden, (*rows, width), hidden, f"labels {rows}")
            for name, weight in named.items():
                own = width if len(named) == 1 else _size(weight, -1)
                check(name, weight, (vocab, own), hidden, f"{beside}{prefix}hidden {tuple(hidden.shape)}")
            if len(named) > 1 and 0 in head.widths:
                raise ValueError(f"a part of {prefix}weight has no columns: their widths are {head.widths}")
            if head.width != width:
                raise ValueError(
                    f"the widths of {prefix}weight, {head.widths}, do not add up to {prefix}hidden's, {width}"
                )

        of_weight = f"{next(iter(head.named()))} {tuple(head.weights[0].shape)}"
        check_head("", head, self.hidden, "")
        check_head("ref_", ref_head, self.ref_hidden, f"{of_weight} and ")
        check("bias", head.bias, (vocab,), self.hidden, of_weight)
        check("ref_bias", ref_head.bias, (vocab,), self.ref_hidden, of_weight)
        if self.ref_hidden.dtype == torch.float64 and self.hidden.dtype != torch.float64:
            raise TypeError(
                f"ref_hidden has dtype {self.ref_hidden.dtype} but hidden has the less precise {self.hidden.dtype}"
            )
        if self.labels.device != device:
            raise ValueError(f"labels is on {self.labels.device} but hidden is on {device}")


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() else 1
