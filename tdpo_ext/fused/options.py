"""The options of the fused functions."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..divergence import check_options, check_shard
from ..ops.operators import RowOptions
from ..vocab_parallel import VocabShard
from .planning.plan import check_budget


@dataclass(frozen=True)
class FusedOptions:
    """The options of the public functions, as they were given; `linear_token_divergence` describes them."""

    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    kl_direction: str
    logits_budget: int | None
    shard: VocabShard | None

    def check(self) -> None:
        """Raises TypeError or ValueError naming the option that is of the wrong type or out of range."""
        check_options(self.ignore_index, self.temperature, self.softcap, self.kl_direction)
        checks.scale("logit_scale", self.logit_scale)
        checks.scale("ref_logit_scale", self.ref_logit_scale)
        for name, ratio in (
            ("temperature / logit_scale", self.temperature / self.logit_scale),
            ("softcap / logit_scale", (1.0 if self.softcap is None else self.softcap) / self.logit_scale),
            ("ref_logit_scale / logit_scale", self.ref_logit_scale / self.logit_scale),
        ):
            checks.scale(name, ratio)
        if self.logits_budget is not None:
            check_budget(self.logits_budget)
        check_shard(self.shard)

    def check_without_reference(self) -> None:
        """Raises ValueError naming an option that has no meaning without a reference."""
        for name, value, default in (
            ("ref_logit_scale", self.ref_logit_scale, 1.0),
            ("kl_direction", self.kl_direction, "forward"),
        ):
            if value != default:
                raise ValueError(f"{name} is {value!r}, but there is no reference: ref_hidden and ref_weight are None")

    def row_options(self, vocab_start: int, vocab_size: int) -> RowOptions:
        """For logits before the policy's `logit_scale`, which joins the temperature and the cap.

        The reference's logits must have been multiplied by `ref_logit_scale / logit_scale`.
        """
        return RowOptions(
            vocab_start=vocab_start,
            vocab_size=vocab_size,
            ignore_index=self.ignore_index,
            temperature=self.temperature / self.logit_scale,
            softcap=0.0 if self.softcap is None else self.softcap / self.logit_scale,
            reverse_kl=self.kl_direction == "reverse",
        )
