"""TDPO from hidden states as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from . import checks
from .compilation import runs_eagerly
from .divergence import TokenDivergence
from .fused.call import fused_loss
from .fused.heads import CallTensors
from .fused.options import FusedOptions
from .fused.rows import sequences_of
from .losses import dpo_margin_loss, tdpo_margin_loss, weighted_tokens
from .plain_checks import VARIANTS
from .vocab_parallel import VocabShard


class LinearTDPOLoss(nn.Module):
    """TDPO, or DPO, from hidden states: `linear_preference_loss` with that objective, as a module without parameters.

        loss_fn = LinearTDPOLoss(beta=0.1)
        loss, chosen, rejected = loss_fn(hidden, lm_head.weight, ref_hidden, ref_lm_head.weight, labels)

    It prints its options, and can be copied and pickled where it has no `shard`.

    Args:
        beta: strength of the KL constraint, > 0.
        alpha: weight of the sequence-KL difference in "tdpo2", >= 0; not used by "tdpo1" and "dpo".
        variant: "tdpo2" or "tdpo1" (`tdpo_loss`), or "dpo" (`dpo_loss`, which has label smoothing too).
        logits_budget: bytes that temporaries may take (default: by device). It changes memory and time, never results
            beyond rounding.
        shard: the rows of both heads that this rank holds, where the vocabulary is sharded over a process group.
        ignore_index: label of rows that contribute exactly 0 to values and gradients.
        temperature: both models' logits are divided by it.
        softcap: if given, both models' logits become softcap * tanh(logits / softcap) first.
        logit_scale, ref_logit_scale: each model's logits are multiplied by its own before the cap and the temperature.
        kl_direction: "forward" for KL(reference || policy), TDPO's, or "reverse" for KL(policy || reference).

    Raises:
        ValueError, TypeError: an option out of range or of the wrong type, named in the message.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: str = "tdpo2",
        logits_budget: int | None = None,
        shard: VocabShard | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ref_logit_scale: float = 1.0,
        kl_direction: str = "forward",
    ) -> None:
        super().__init__()
        checks.choice("variant", variant, (*VARIANTS, "dpo"))
        checks.real("alpha", alpha, least=0)
        self.beta, self.alpha, self.variant = beta, alpha, variant
        if variant == "dpo":
            self.objective = dpo_margin_loss(beta=beta)
        else:
            self.objective = tdpo_margin_loss(beta=beta, alpha=alpha, variant=variant)
        self.weighted_objective = weighted_tokens(self.objective)
        self.options = FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            kl_direction=kl_direction,
            logits_budget=logits_budget,
            shard=shard,
        )
        self.options.check()

    def extra_repr(self) -> str:
        options = {"beta": self.beta, "alpha": self.alpha, "variant": self.variant, **vars(self.options)}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    @runs_eagerly
    def forward(
        self,
        hidden: Tensor,  # (2B, T, D), or packed (N, D)
        weight: Tensor,  # (V, D)
        ref_hidden: Tensor,  # (2B, T, D_ref), or packed (N, D_ref)
        ref_weight: Tensor,  # (V, D_ref)
        labels: Tensor,  # (2B, T), or packed (N,)
        *,
        bias: Tensor | None = None,  # (V,)
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        row_lengths: Sequence[int] | None = None,  # 2B
        token_columns: Mapping[str, Tensor] | None = None,  # each of labels' shape
    ) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
        """The mean loss over B pairs, and sums of the chosen and the rejected responses.

        Args:
            hidden, weight, bias: the policy's hidden states and LM head; the first B sequences are chosen responses.
            ref_hidden, ref_weight, ref_bias: the reference's.
            labels: int64, aligned with `hidden` (see `shift_labels`), `ignore_index` where a token does not count.
            cu_seqlens, row_lengths: of packed rows, as in `linear_preference_loss`.
            token_columns: {"weight": numbers}: every token's log-probabilities and KL count as often in the loss as its
                number says (the sums that are returned are not weighted). A weight that requires a gradient gets it.

        Returns:
            (loss, chosen, rejected): the scalar loss, and detached per-sequence sums (B,) for metrics.

        Raises:
            ValueError, TypeError, IndexError: a bad argument, named in the message.
        """
        if isinstance(token_columns, Mapping) and token_columns and set(token_columns) != {"weight"}:
            raise ValueError(f"token_columns has {', '.join(map(repr, token_columns))}; this loss reads 'weight' alone")
        loss, (chosen, rejected) = fused_loss(
            "LinearTDPOLoss",
            self.weighted_objective if token_columns else self.objective,
            CallTensors.of_call(
                hidden, weight, bias, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
            ),
            sequences=sequences_of(cu_seqlens, row_lengths, sides=2),
            token_columns=token_columns,
            options=self.options,
        )
        return loss, chosen, rejected
