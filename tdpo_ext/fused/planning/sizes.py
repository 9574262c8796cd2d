"""What decides a plan: the sizes of a call, and the bytes that its parts need."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per row beside hidden states and logits: row state, values, upstream gradients, index and label.
_ROW_OVERHEAD = 128
# Rows of logits are padded to a multiple of this many entries, so that an odd vocabulary does not push the products off
# their fast path; not where the padding would be a sizeable part of a row.
_PITCH, _PITCH_FROM = 64, 1024


def row_pitch(columns: int) -> int:
    """Entries from one row of a logits buffer to the next."""
    return columns if columns < _PITCH_FROM else -(-columns // _PITCH) * _PITCH


def rows_beside(vocab: int, weight_bytes: int, logit_bytes: int) -> int:
    """Rows of the sum of a low-precision dW that the memory of dW itself does not hold.

    It holds a multiple of 64, as rows of logits are, so that the product for the others begins at an aligned entry.
    """
    held = vocab * weight_bytes // logit_bytes
    return vocab - (held if vocab < _PITCH_FROM else held // _PITCH * _PITCH)


@dataclass(frozen=True)
class Sizes:
    """Widths, vocabulary, bytes of an element of the weights and of a logit, and which gradients are wanted.

    Attributes:
        ref_width: of the reference's hidden states; 0 where there is no reference.
        trained_width: of the parts of the policy's weight that want a gradient; None: `width`.
        is_half: the weights are float16, whose gradients are always summed in float32 (`half`).
        dz_in_place: dz can be written over the logits of its rows, though they are wider; where they are not, it always
            can.
    """

    vocab: int
    width: int
    ref_width: int
    weight_bytes: int
    logit_bytes: int
    needs_weight_grad: bool
    needs_grad: bool = True
    trained_width: int | None = None
    is_half: bool = False
    dz_in_place: bool = False

    @property
    def grad_width(self) -> int:
        """The width of dW; 0 for a frozen head."""
        if not self.needs_weight_grad:
            return 0
        return self.width if self.trained_width is None else self.trained_width

    @property
    def low_precision(self) -> bool:
        """Whether logits are wider than weights, so that sums need memory of their own."""
        return self.weight_bytes != self.logit_bytes

    @property
    def entry(self) -> int:
        """Bytes of a vocabulary entry of a row: both models' logits, and dz where it can't overwrite them."""
        beside = self.needs_grad and self.low_precision and not self.dz_in_place
        return self.logits_entry + (self.weight_bytes if beside else 0)

    @property
    def logits_entry(self) -> int:
        """Bytes of the logits of a vocabulary entry of a row, of both models where there is a reference."""
        return (2 if self.ref_width else 1) * self.logit_bytes

    @property
    def row(self) -> int:
        """Bytes of a row beside its logits: gathered hidden states and their gradient."""
        return self.weight_bytes * (2 * self.width + self.ref_width) + _ROW_OVERHEAD

    @property
    def whole_row(self) -> int:
        """Bytes of a row with its logits over the whole vocabulary."""
        return row_pitch(self.vocab) * self.entry + self.row

    @property
    def row_without_dz(self) -> int:
        """Bytes of a row with its logits over the whole vocabulary, where dz has memory elsewhere."""
        return row_pitch(self.vocab) * self.logits_entry + self.row

    @property
    def dz_row(self) -> int:
        """Bytes of a row's dz over the whole vocabulary, in the weights' precision."""
        return row_pitch(self.vocab) * self.weight_bytes

    @property
    def accumulated_weight(self) -> int:
        """Bytes of a dW in the precision that it is accumulated in; 0 for a frozen head."""
        return self.vocab * self.grad_width * self.logit_bytes

    @property
    def weight_sum(self) -> int:
        """Bytes beside dW of its float32 sum, which is needed where dW has low precision and is added to more than
        once. The memory of dW itself holds as much of the sum as it can (`weight_gradient.WholeWeightGradient`)."""
        if not self.low_precision:
            return 0
        return rows_beside(self.vocab, self.weight_bytes, self.logit_bytes) * self.grad_width * self.logit_bytes

    @property
    def weight_sum_of_one(self) -> int:
        """The same where dW is added to only once."""
        return self.weight_sum if self.is_half else 0
