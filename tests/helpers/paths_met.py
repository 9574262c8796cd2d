"""Which paths of the fused losses are met: `counting` counts them by name, and `KINDS` are all there are."""

import contextlib
from collections import Counter
from unittest import mock

import tdpo_ext.fused.call
from tdpo_ext.fused import chunked, run, streaming
from tdpo_ext.fused.planning.plan import LongPair


@contextlib.contextmanager
def counting(met: Counter[str]):
    """A context that counts which of KINDS the calls within it meet, by the functions that do them."""

    def counted(owner, name, kinds):
        original = getattr(owner, name)

        def wrapper(*arguments, **options):
            met.update(kinds(*arguments, **options))
            return original(*arguments, **options)

        return mock.patch.object(owner, name, wrapper)

    with (
        counted(tdpo_ext.fused.call, "chunked_loss", lambda loss, plan, *_: _kinds_of_plan(loss, plan)),
        counted(
            tdpo_ext.fused.call,
            "streamed_loss",
            lambda loss, *_: ["plan: streaming", *_kinds_of_heads(loss)],
        ),
        counted(chunked, "_whole_pairs", _kinds_of_whole_pairs),
        counted(chunked, "long_pair", _kinds_of_long_pair),
        counted(run.Run, "flush", _kinds_of_flush),
        counted(streaming, "_gradients", _kinds_of_streaming),
    ):
        yield


KINDS = {
    "plan: all at once",
    "plan: whole pairs in chunks",
    "plan: one long pair",
    "plan: long pairs alone",
    "plan: long pairs beside chunks of several pairs",
    "plan: streaming",
    "plan: rows in place",
    "head: several parts",
    "head: some of its parts frozen",
    "reference: none",
    "plan: sum of dW beside it",
    "plan: dz of several chunks kept",
    "whole pairs: one",
    "whole pairs: several",
    "whole pairs: without rows",
    "long pair: dz kept",
    "long pair: dW summed apart",
    "long pair: dW summed apart, several blocks at a time",
    "long pair: dW scaled in place",
    "long pair: frozen head, dz of a block",
    "long pair: any loss of a frozen head",
    "long pair: no gradient",
    "flush: one block",
    "flush: several blocks",
    "flush: with a pair's factor",
    "flush: factors of several pairs",
    "flush: blocks with and without a factor",
    "flush: rows without gradient dropped",
    "flush: into the sums of one pair",
    "flush: dz over wider logits",
    "flush: float16",
    "flush: float16 into the sums of one pair",
    "streaming: one slice",
    "streaming: several slices",
    "streaming: several blocks",
    "streaming: rows without KL",
    "streaming: dz over wider logits",
    "streaming: float16",
    "streaming: no rows",
}


def _kinds_of_heads(loss):
    trained = [weight.requires_grad for weight in loss.inputs.head.weights]
    kinds = ["reference: none"] * (not loss.inputs.has_reference)
    kinds += ["head: several parts"] * (len(trained) > 1)
    return kinds + ["head: some of its parts frozen"] * (len(set(trained)) > 1)


def _kinds_of_plan(loss, plan):
    long = [chunk for chunk in plan.chunks if isinstance(chunk, LongPair)]
    several = any(len(chunk.pairs) > 1 for chunk in plan.chunks)
    kinds = [*_kinds_of_heads(loss), *["plan: sum of dW beside it"] * plan.sums_weight]
    kinds += ["plan: rows in place"] * (loss.rows.every and len(plan.chunks) == 1)
    kinds += ["plan: dz of several chunks kept"] * (plan.keeps_dz and len(plan.chunks) > 1)
    if not long:
        return [*kinds, "plan: all at once" if len(plan.chunks) == 1 else "plan: whole pairs in chunks"]
    if len(plan.chunks) == 1:
        return [*kinds, "plan: one long pair"]
    return [*kinds, "plan: long pairs beside chunks of several pairs" if several else "plan: long pairs alone"]


def _kinds_of_whole_pairs(run, chunk):
    if chunk.count == 0:
        return ["whole pairs: without rows"]
    return ["whole pairs: one" if chunk.pairs == 1 else "whole pairs: several"]


def _kinds_of_long_pair(run, pair):
    if not run.wanted.any:
        return ["long pair: no gradient"]
    if run.plan.separates:
        return ["long pair: any loss of a frozen head"]
    if pair.count <= run.plan.dz_rows:
        return ["long pair: dz kept"]
    if not any(run.wanted.weights):
        return ["long pair: frozen head, dz of a block"]
    if not run.buffers.pair_weights:
        return ["long pair: dW scaled in place"]
    return ["long pair: dW summed apart" + ", several blocks at a time" * run.plan.keeps_dz]


def _kinds_of_flush(run, pair=None):
    if not run.kept:
        return []
    kinds = ["flush: one block" if len(run.kept) == 1 else "flush: several blocks"]
    factors = [kept.factor for kept in run.kept]
    given = {id(factor) for factor in factors if factor is not None}
    kinds += ["flush: with a pair's factor"] * (len(given) == 1)
    kinds += ["flush: factors of several pairs"] * (len(given) > 1)
    kinds += ["flush: blocks with and without a factor"] * (bool(given) and None in factors)
    kinds += ["flush: rows without gradient dropped"] * any(kept.counted is not None for kept in run.kept)
    kinds += ["flush: into the sums of one pair"] * (pair is not None)
    kinds += ["flush: dz over wider logits"] * (
        run.buffers.dz_in_place and run.inputs.weight_dtype != run.inputs.logit_dtype
    )
    kinds += ["flush: float16"] * run.inputs.is_half
    kinds += ["flush: float16 into the sums of one pair"] * (run.inputs.is_half and pair is not None)
    return kinds


def _kinds_of_streaming(inputs, rows, plan, wanted, buffers):
    if len(rows.index) == 0:
        return ["streaming: no rows"]
    kinds = ["streaming: one slice" if plan.columns >= inputs.vocab else "streaming: several slices"]
    kinds += ["streaming: several blocks"] * (len(rows.blocks(plan.rows)) > 2)
    kinds += ["streaming: dz over wider logits"] * (inputs.dz_in_place and inputs.weight_dtype != inputs.logit_dtype)
    kinds += ["streaming: float16"] * inputs.is_half
    kinds += ["streaming: rows without KL"] * (rows.with_kl < len(rows.index))
    return kinds
