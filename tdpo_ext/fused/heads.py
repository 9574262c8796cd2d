"""LM heads, and the tensors of a call: hidden states beside the heads that make logits of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..ops.matmul import full_precision, product
from ..vocab_parallel import VocabShard, check_replicated, local_tensors


@dataclass(frozen=True)
class Head:
    """An LM head: logits = scale * (hidden @ weight.T + bias).

    Attributes:
        weight: (V, D), of this rank's slice of the vocabulary.
        bias: (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def cast(self, dtype: torch.dtype) -> Head:
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def detach(self) -> Head:
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of some rows' hidden states over some columns, in the precision of `out`, which is returned."""
        with full_precision(hidden):
            product(hidden, self.weight[columns].t(), out)
        if self.bias is not None:
            out += self.bias[columns]
        return out if self.scale == 1 else out.mul_(self.scale)


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
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        *,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> CallTensors:
        """Of a public function's arguments.

        Raises:
            ValueError: there is a part of a reference only.
        """
        if ref_hidden is None and ref_weight is None:
            if ref_bias is not None:
                raise ValueError("ref_bias is given, but ref_hidden and ref_weight are None")
            return cls(hidden, Head(weight, bias), hidden, Head(weight, bias), labels, has_reference=False)
        for name, other, given in (("ref_hidden", "ref_weight", ref_hidden), ("ref_weight", "ref_hidden", ref_weight)):
            if given is None:
                raise ValueError(f"{name} is None but {other} is given; both are needed, or neither")
        assert ref_hidden is not None
        assert ref_weight is not None
        return cls(hidden, Head(weight, bias), ref_hidden, Head(ref_weight, ref_bias), labels)

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
            checks.float_tensor(f"{prefix}weight", head.weight)
            if head.bias is not None:
                checks.float_tensor(f"{prefix}bias", head.bias)
        checks.label_tensor("labels", self.labels)

    def check_replicated(self, shard: VocabShard | None) -> None:
        """Raises ValueError naming a DTensor beside the heads whose local part is not what every rank must have."""
        for name, tensor in (("hidden", self.hidden), ("ref_hidden", self.ref_hidden), ("labels", self.labels)):
            check_replicated(name, tensor, shard)

    def local(self) -> tuple[CallTensors, VocabShard | None]:
        """The local parts of arguments that are DTensors, and the shard that their heads are."""
        sharded = {
            "weight": self.head.weight,
            "bias": self.head.bias,
            "ref_weight": self.ref_head.weight,
            "ref_bias": self.ref_head.bias,
        }
        replicated = {"hidden": self.hidden, "ref_hidden": self.ref_hidden, "labels": self.labels}
        local, shard = local_tensors(sharded, replicated, vocab_dim=0)
        tensors = CallTensors(
            hidden=local["hidden"],
            head=Head(local["weight"], local["bias"]),
            ref_hidden=local["ref_hidden"],
            ref_head=Head(local["ref_weight"], local["ref_bias"]),
            labels=local["labels"],
            has_reference=self.has_reference,
        )
        return tensors, shard

    def narrowed(self, shard: VocabShard) -> CallTensors:
        """Heads without padding beyond the shard."""

        def narrow(head: Head, prefix: str) -> Head:
            bias = None if head.bias is None else shard.narrow(f"{prefix}bias", head.bias, 0)
            return Head(shard.narrow(f"{prefix}weight", head.weight, 0), bias)

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
        rows, vocab = tuple(self.labels.shape), _size(head.weight, 0)
        width, ref_width = _size(self.hidden, -1), _size(self.ref_hidden, -1)

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

        of_labels, of_weight = f"labels {rows}", f"weight {tuple(head.weight.shape)}"
        check("hidden", self.hidden, (*rows, width), self.hidden, of_labels)
        check("weight", head.weight, (vocab, width), self.hidden, f"hidden {tuple(self.hidden.shape)}")
        check("ref_hidden", self.ref_hidden, (*rows, ref_width), self.ref_hidden, of_labels)
        of_both = f"{of_weight} and ref_hidden {tuple(self.ref_hidden.shape)}"
        check("ref_weight", ref_head.weight, (vocab, ref_width), self.ref_hidden, of_both)
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
