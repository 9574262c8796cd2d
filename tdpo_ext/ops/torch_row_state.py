"""The arithmetic of csrc/row_state.h in plain torch: for many rows at once, in the same terms and in the same order.

Tensors of entries are (rows, V) and those of rows (rows, 1), both float32, or float64 for float64 logits. torch has no
fused multiply-add, so an exponent z log2(e) - z_max is taken from the difference of the logits, which is exact where it
matters, and from what the rounding of z_max left over.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
_SMALL_GAP = 0.18  # below it, 2^d - 1 - d log(2) and log1p(x) - x are formed by their series
_MODERATE = 0.5  # x below which a KL is formed from `bregman`, which has kept its digits
_HUGE_GAP = 1e30  # instead of an infinite gap, where it counts for nothing
_FAR = 16.0  # maxima this far apart are centered first


def wide_dtype(like: Tensor) -> torch.dtype:
    """What numbers of a row are computed in: float64, which Apple's GPUs do not have."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def largest_exponent(dtype: torch.dtype) -> float:
    """Beyond it, a maximum (in base 2) is refused."""
    return 2.0**59 if dtype == torch.float64 else 2.0**30


def _lowest_finite_exponent(dtype: torch.dtype) -> float:
    """An exponent whose power of two is exactly 0."""
    return -1100.0 if dtype == torch.float64 else -200.0


class Scale(NamedTuple):
    """1 / temperature, of natural and of base-2 exponents, rounded to the dtype of the rows."""

    natural: float
    base2: float

    @classmethod
    def of(cls, temperature: float, dtype: torch.dtype) -> Scale:
        rounded = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
        return cls(rounded(1 / temperature).value, rounded(LOG2_E / temperature).value)


def _excess(d: Tensor) -> Tensor:
    """(2^d - 1 - d log(2)) / d for small d."""
    terms = 13 if d.dtype == torch.float64 else 4  # a relative error of 7e-7 at most in float32
    factors = [LN_2**n / math.factorial(n) for n in range(2, 2 + terms)]
    tail = d * factors[-1]
    for factor in factors[-2::-1]:
        tail.add_(factor).mul_(d)
    return tail


def keep_rows(values: Tensor, kept: Tensor) -> Tensor:
    """Sets rows of `values` (rows, n) to 0, whatever they hold, but for those that `kept` (rows, 1) names.

    By bits: torch.where takes ten times as long on a CPU.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    values.view(integers).bitwise_and_(-kept.to(integers))
    return values


class RowStates(NamedTuple):
    """The numbers of the states of rows, in the order of struct RowState: the policy's z and the reference's r."""

    z_max: Tensor
    r_max: Tensor
    z_sum: Tensor
    r_sum: Tensor
    gap: Tensor
    bregman: Tensor
    z_dot: Tensor
    z_label: Tensor
    r_label: Tensor

    @classmethod
    def unstack(cls, states: Tensor) -> RowStates:
        """From (..., STATE_SIZE)."""
        return cls(*states.unbind(-1))

    def stacked(self) -> Tensor:
        """(..., STATE_SIZE)."""
        return torch.stack(self, dim=-1)

    @classmethod
    def columns(cls, states: Tensor) -> RowStates:
        """From (rows, STATE_SIZE), each (rows, 1)."""
        return cls(*states.split(1, dim=1))

    def weight_sum(self, reverse_kl: bool) -> Tensor:
        """Of the row that weights the KL: r's or, where it is reversed, z's."""
        return self.z_sum if reverse_kl else self.r_sum

    def other_sum(self, reverse_kl: bool) -> Tensor:
        return self.r_sum if reverse_kl else self.z_sum

    def is_out_of_range(self) -> Tensor:
        """Whether a row's largest logit is too far from 0 for its exponents; not where all are -inf."""
        largest = largest_exponent(self.z_max.dtype)
        z, r = ((top.abs() >= largest) & (top != -math.inf) for top in (self.z_max, self.r_max))
        return z | r


def finite_max(top: Tensor) -> Tensor:
    """The maximum to subtract: 0 where all is -inf."""
    return top.masked_fill(top == -math.inf, 0.0)


def row_max(logits: Tensor, base2: float) -> Tensor:
    """The maximum of the exponents, (rows, 1). NaN is passed over, and what is far below 0 counts as without mass."""
    top = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(dim=1, keepdim=True) * base2
    lowest = -largest_exponent(top.dtype)
    return torch.where((top < lowest) & (top != -math.inf), lowest, top)


class Shifts(NamedTuple):
    """What is subtracted from the entries of rows, each (rows, 1): see struct Shifts."""

    z_top: Tensor  # from the logits; then times base2 and plus the rest is the exponent of e_z
    z_rest: Tensor
    r_top: Tensor
    r_rest: Tensor
    z_center: Tensor  # from the logits, before their difference is formed
    r_center: Tensor
    gap_top: Tensor  # from that difference; then times base2 and plus the rest is the gap
    gap_rest: Tensor

    @classmethod
    def of(cls, z_max: Tensor, r_max: Tensor, base2: float) -> Shifts:
        real, wide = z_max.dtype, wide_dtype(z_max)

        def split(exponent: Tensor) -> tuple[Tensor, Tensor]:
            """A logit t and the rest, so that -exponent = -t base2 + rest."""
            top = (exponent / base2).to(real)
            return top, (top.to(wide) * base2 - exponent).to(real)

        z, r = finite_max(z_max), finite_max(r_max)
        # A multiple of what the largest logits are rounded to, so that taking it off is exact.
        larger = torch.maximum(z.abs(), r.abs()) / base2
        rounding = torch.copysign(larger, z - r)
        offset = ((z - r) / base2 + rounding) - rounding
        offset = torch.where((z - r).abs() > _FAR, offset, 0.0)
        z_is_larger = z.abs() > r.abs()
        gap = z.to(wide) - r.to(wide) - offset.to(wide) * base2
        return cls(
            *split(z.to(wide)),
            *split(r.to(wide)),
            torch.where(z_is_larger, offset, 0.0),
            torch.where(z_is_larger, 0.0, -offset),
            *split(gap),
        )

    def z_exponent(self, z: Tensor, base2: float) -> Tensor:
        return _exponent(z - self.z_top, self.z_rest, base2)

    def r_exponent(self, r: Tensor, base2: float) -> Tensor:
        return _exponent(r - self.r_top, self.r_rest, base2)

    def gap(self, z: Tensor, r: Tensor, base2: float, reverse_kl: bool) -> Tensor:
        """The gap d of entries, in base 2."""
        difference = (z - self.z_center).sub_(r - self.r_center).sub_(self.gap_top)
        d = torch.add(self.gap_rest, difference, alpha=base2)
        return d.neg_() if reverse_kl else d


def _exponent(difference: Tensor, rest: Tensor, base2: float) -> Tensor:
    return torch.add(rest, difference, alpha=base2).clamp_min_(_lowest_finite_exponent(difference.dtype))


def sums_of(z: Tensor, r: Tensor, base2: float, reverse_kl: bool) -> Tensor:
    """z_max, r_max and the five sums of rows of logits before the temperature: (rows, V) -> (rows, 7)."""
    z_max, r_max = row_max(z, base2), row_max(r, base2)
    shifts = Shifts.of(z_max, r_max, base2)
    z_log = shifts.z_exponent(z, base2)
    e_z, e_r = torch.exp2(z_log), shifts.r_exponent(r, base2).exp2_()
    weight, other = (e_z, e_r) if reverse_kl else (e_r, e_z)
    d = shifts.gap(z, r, base2, reverse_kl)
    # An entry without weight has no gap, whatever its logits: of -inf and underflow, 0 times inf is NaN, and so 0 here.
    weighted_d = (weight * d).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    # d apart: where it is not small, and where it is; 0 elsewhere.
    d.nan_to_num_(nan=0.0, posinf=_HUGE_GAP, neginf=-_HUGE_GAP)
    far = torch.nn.functional.hardshrink(d, _SMALL_GAP)
    near = d.sub_(far)
    bregman = (other - weight).sub_(weighted_d, alpha=LN_2).mul_(far.sign_().square_())
    bregman.add_(_excess(near).mul_(near).mul_(weight))
    sums = [term.sum(dim=1, keepdim=True) for term in (e_z, e_r, weighted_d, bregman, z_log.mul_(e_z))]
    return torch.cat([z_max, r_max, *sums], dim=1)


class RowGradient(NamedTuple):
    """What dL/dlogits of rows is formed from, each tensor (rows, 1); see struct RowGradient."""

    shifts: Shifts
    p_scale: Tensor
    kl_scale: Tensor
    mean_gap: Tensor
    has_kl: Tensor
    base2: float
    softcap: float
    reverse_kl: bool

    @classmethod
    def of(
        cls,
        states: Tensor,  # (rows, STATE_SIZE)
        logps_grad: Tensor,  # (rows, 1)
        kl_grad: Tensor,  # (rows, 1)
        scale: Scale,
        softcap: float,
        reverse_kl: bool,
    ) -> RowGradient:
        state = RowStates.columns(states)
        weight_sum = state.weight_sum(reverse_kl)
        return cls(
            Shifts.of(state.z_max, state.r_max, scale.base2),
            p_scale=((0 if reverse_kl else kl_grad) - logps_grad) * scale.natural / state.z_sum,
            kl_scale=kl_grad * (LN_2 if reverse_kl else -1.0) * scale.natural / weight_sum,
            mean_gap=state.gap / weight_sum,
            has_kl=kl_grad != 0,
            base2=scale.base2,
            softcap=softcap,
            reverse_kl=reverse_kl,
        )

    def at(self, z: Tensor, r: Tensor, label_extra: Tensor | None = None) -> Tensor:
        """Of some columns of the logits after a softcap, (rows, columns); `label_extra` (rows, 1) is added to each.

        The reference is not used where the KL has no gradient: it may be anything there.
        """
        e_z = self.shifts.z_exponent(z, self.base2).exp2_()
        if self.reverse_kl:
            d = self.shifts.gap(z, r, self.base2, self.reverse_kl)
            d.nan_to_num_(nan=0.0, posinf=_HUGE_GAP, neginf=-_HUGE_GAP)  # where e_z is 0, it counts for nothing
            of_kl = keep_rows(d.sub_(self.mean_gap).mul_(-self.kl_scale), self.has_kl)
            dz = of_kl.add_(self.p_scale).mul_(e_z)
        else:
            e_r = self.shifts.r_exponent(r, self.base2).exp2_()
            dz = keep_rows(e_r.mul_(self.kl_scale), self.has_kl).add_(e_z.mul_(self.p_scale))
        if label_extra is not None:
            dz.add_(label_extra)
        if self.softcap > 0:
            dz.mul_((z * (1 / self.softcap)).square_().neg_().add_(1))
        return dz


class _Rescale(NamedTuple):
    """Factors and terms that bring the sums of states to larger maxima; see struct Rescale."""

    z: Tensor
    r: Tensor
    z_hop: Tensor
    hop: Tensor
    growth: Tensor
    excess: Tensor

    @classmethod
    def between(cls, old: RowStates, z_max: Tensor, r_max: Tensor, reverse_kl: bool) -> _Rescale:
        z_hop = torch.where(old.z_max == -math.inf, 0.0, old.z_max - z_max)
        r_hop = torch.where(old.r_max == -math.inf, 0.0, old.r_max - r_max)
        hop = r_hop - z_hop if reverse_kl else z_hop - r_hop
        z, r = torch.exp2(z_hop), torch.exp2(r_hop)
        weight, other = (z, r) if reverse_kl else (r, z)
        small = hop.abs() < _SMALL_GAP
        natural_hop = weight * hop * LN_2
        excess = torch.where(small, weight * hop * _excess(hop), other - weight - natural_hop)
        growth = torch.where(small, natural_hop + excess, other - weight)
        return cls(z, r, z_hop, hop, growth, excess)


def _raised(state: RowStates, z_max: Tensor, r_max: Tensor, reverse_kl: bool) -> RowStates:
    """The states with maxima that are larger or the same."""
    by = _Rescale.between(state, z_max, r_max, reverse_kl)
    weight, other = (by.z, by.r) if reverse_kl else (by.r, by.z)
    weight_sum, other_sum = state.weight_sum(reverse_kl), state.other_sum(reverse_kl)
    # `bregman` is moved term by term or formed anew, whichever sums smaller numbers.
    gap = (state.gap + weight_sum * by.hop) * weight
    new_other, new_weight, natural_gap = other_sum * other, weight_sum * weight, gap * LN_2
    terms = (state.bregman * other, weight_sum * by.excess, state.gap * LN_2 * by.growth)
    moves = sum(term.abs() for term in terms) <= new_other + new_weight + natural_gap.abs()
    bregman = torch.where(moves, sum(terms), new_other - new_weight - natural_gap)
    no_weight = weight == 0  # then there is no gap either, not even an infinite one
    raised = state._replace(
        z_max=z_max,
        r_max=r_max,
        z_sum=state.z_sum * by.z,
        r_sum=state.r_sum * by.r,
        gap=torch.where(no_weight, 0.0, gap),
        bregman=torch.where(no_weight, new_other, bregman),
        z_dot=(state.z_dot + state.z_sum * by.z_hop) * by.z,
    )
    same = (state.z_max == z_max) & (state.r_max == r_max)
    return RowStates(*(torch.where(same, old, new) for old, new in zip(state, raised)))


def merged(state: RowStates, other: RowStates, reverse_kl: bool) -> RowStates:
    """The states of two slices together."""
    z_max = torch.where(other.z_max > state.z_max, other.z_max, state.z_max)
    r_max = torch.where(other.r_max > state.r_max, other.r_max, state.r_max)
    a, b = (_raised(one, z_max, r_max, reverse_kl) for one in (state, other))
    return RowStates(z_max, r_max, *(x + y for x, y in zip(a[2:], b[2:])))


def finalized(state: RowStates, base2: float, reverse_kl: bool) -> Tensor:
    """Values of rows in the order of struct TokenValues: (TOKEN_VALUES, ...)."""
    real = state.z_max.dtype
    wide = RowStates(*(number.to(wide_dtype(number)) for number in state))
    weight, other = wide.weight_sum(reverse_kl), wide.other_sum(reverse_kl)
    gap = (state.gap * LN_2).to(weight.dtype)
    x = (gap + wide.bregman) / weight
    near = (wide.bregman / weight + _log1p_minus(x)).clamp_min(0)
    kl = torch.where(x.abs() < _MODERATE, near, torch.log(other / weight) - gap / weight)
    log_z, log_r = torch.log2(wide.z_sum), torch.log2(wide.r_sum)
    values = (
        (wide.z_label * base2 - finite_max(wide.z_max) - log_z) * LN_2,
        (wide.r_label * base2 - finite_max(wide.r_max) - log_r) * LN_2,
        kl,
        (log_z - wide.z_dot / wide.z_sum) * LN_2,
        state.z_label * base2 >= state.z_max,
        torch.ones_like(kl),
    )
    return torch.stack([value.to(real) for value in values])


def _log1p_minus(x: Tensor) -> Tensor:
    """log1p(x) - x, of small x by a series: with s = x / (2 + x), log1p(x) = 2 s + 2 s^3 / 3 + ..., 2 s - x = -x s."""
    s = x / (2 + x)
    s2 = s.square()
    odd = torch.zeros_like(x)
    for n in range(17, 2, -2):
        odd = odd * s2 + 2 / n
    return torch.where(x.abs() < _SMALL_GAP, odd * s2 * s - x * s, torch.log1p(x) - x)
