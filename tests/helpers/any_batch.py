"""Random batches as training meets them, and the fused loss of each against float64: any lengths at any budget.

`checked_batches(seeds)` draws a batch for each seed, compares loss, sums and every gradient, and returns how often each
kind of plan, chunk and gradient product was met, so that a test can fail where one was never met.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import torch
from tdpo.loss.objectives import OBJECTIVES as NAMED
from tdpo.loss.objectives import ObjectiveOptions

from helpers.device import DEVICE
from helpers.paths_met import counting
from helpers.planning import plans_of_large_calls
from tdpo_ext import (
    MarginLoss,
    TokenDivergence,
    TokenRows,
    VocabShard,
    eager,
    linear_preference_loss,
    linear_token_loss,
    per_token,
)
from tdpo_ext.losses import is_reference_free, reference_free, sees_tokens


def squared_margin(chosen, rejected):
    """No MarginLoss, with a gradient of both KLs: pairs that don't fit the budget are streamed."""
    return (0.05 * (chosen.logratio - rejected.logratio) - 0.1 * chosen.kl - 0.2 * rejected.kl - 1.0) ** 2


@per_token
def bounded_tokens(chosen, rejected):
    """No MarginLoss either, on tokens: some have no gradient."""
    sides = [side.sum(side.columns["weight"] * side.logratio.tanh()) for side in (chosen, rejected)]
    return torch.nn.functional.softplus(-0.2 * (sides[0] - sides[1]))


def bounded_kl(sequences):
    """Of one sequence alone, and no MarginLoss."""
    return sequences.kl.log1p()


@per_token
def mean_kl(sequences):
    return sequences.mean(sequences.kl)


@reference_free
@per_token
def weighted_logps(sequences):
    return -sequences.mean(sequences.columns["weight"] * sequences.logps)


# Of sequences alone: these are given to linear_token_loss.
UNPAIRED = {
    "bounded KL": bounded_kl,
    "mean KL": MarginLoss(mean_kl, lambda mean: mean),
    "weighted log-probabilities": MarginLoss(weighted_logps, torch.nn.functional.softplus),
}
OBJECTIVES = {name: named.build(ObjectiveOptions()) for name, named in NAMED.items()}
OBJECTIVES["squared margin"] = squared_margin
OBJECTIVES["bounded tokens"] = bounded_tokens
OBJECTIVES |= UNPAIRED

# Relative errors that rounding explains: of a sequence's dhidden and of dW.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Of float16: about what a GradScaler brings the largest entry of the gradients to; and the rounding of the smallest.
_SCALED_GRADIENT, _LEAST_ROUNDING = 2.0**12, 2.0**-25


@dataclass
class Batch:
    """2B sequences, chosen before rejected unless each is alone, in rows one after the other.

    Attributes:
        lengths: rows of each sequence, ignored ones among them.
        tensors: the arguments of the fused loss, packed: hidden (N, D), labels (N,), ...
        trained: names of the tensors that require a gradient.
        layout: "padded", "cu_seqlens" or "row_lengths".
        has_reference: whether the fused loss gets the reference, which an objective may not read.
        parts: widths of the parts that the fused loss gets of the policy's weight.
        frozen: columns of the weight whose part gets no gradient.
        column_major: matrices lie column after column.
    """

    lengths: list[int]
    tensors: dict[str, torch.Tensor]
    trained: list[str]
    weights: torch.Tensor
    objective: str
    layout: str
    options: dict
    budget: int
    streaming_rows: int
    has_reference: bool
    parts: list[int]
    frozen: int
    column_major: bool

    @property
    def sides(self) -> int:
        """Of what the objective takes together: two of a pair, or one."""
        return 1 if self.objective in UNPAIRED else 2

    @property
    def vocab(self) -> int:
        return len(self.tensors["weight"])

    def __str__(self) -> str:
        tensors = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors.items() if name != "labels"}
        return (
            f"lengths {self.lengths}, {tensors}, gradients of {self.trained}, {self.objective}, {self.layout}, "
            f"{self.options}, logits_budget {self.budget}, streaming rows {self.streaming_rows}, parts {self.parts}, "
            f"frozen {self.frozen}, column major {self.column_major}"
        )


def draw_batch(draw) -> Batch:
    """A batch from a `random.Random`."""
    torch.manual_seed(draw.randrange(1 << 30))
    dtype = draw.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16])
    ref_dtype = draw.choice([dtype, dtype, torch.float32, torch.bfloat16])
    vocab, width = draw.choice([(2, 8), (97, 400), (97, 400), (97, 400), (300, 8), (300, 200), (1100, 32), (1100, 32)])
    ref_width = draw.choice([width, 24])
    longest = draw.choice([6, 60, 60, 150])
    pairs = draw.choice([1, draw.randint(2, 8), draw.randint(2, 8)])
    ratio = draw.choice([50, 50, 2])  # of the longest to the shortest, about
    lengths = [int(longest / ratio ** draw.random()) for _ in range(2 * pairs)]
    for _ in range(draw.choice([0, 1, 2, 3])):  # a long response among short ones
        lengths[draw.randrange(len(lengths))] = draw.randint(longest, 2 * longest)
    rows = sum(lengths)
    spread = draw.choice([0.03, 0.3, 1.0])  # the reference beside the policy
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) / width**0.5
    same_width = ref_width == width
    ref_hidden = hidden + spread * torch.randn(rows, width) if same_width else torch.randn(rows, ref_width)
    ref_weight = weight if same_width else torch.randn(vocab, ref_width) / ref_width**0.5
    tensors = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "ref_hidden": ref_hidden.to(ref_dtype),
        "ref_weight": ref_weight.to(ref_dtype),
        "labels": torch.randint(vocab, (rows,)),
    }
    if draw.random() < 0.4:
        tensors["bias"], tensors["ref_bias"] = torch.randn(vocab).to(dtype), torch.randn(vocab).to(ref_dtype)
    tensors["labels"][torch.rand(rows) < draw.choice([0.0, 0.1, 0.9])] = -100
    trained = draw.choice([["hidden", "weight"], ["hidden", "weight"], ["hidden"], ["weight"], []])
    if "bias" in tensors and draw.random() < 0.7:
        trained = [*trained, "bias"]
    options = {"kl_direction": draw.choice(["forward", "reverse"])}
    if draw.random() < 0.3:
        options |= {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7, "ref_logit_scale": 0.6}
    row_bytes = vocab * (16 if dtype == torch.float64 else 9 if DEVICE == "cpu" else 11) + 8 * (2 * width + ref_width)
    budget = int((rows * row_bytes + 1000) * 10 ** draw.uniform(-3.5, 0.5)) + 1
    any_of_frozen = trained == ["hidden"] and draw.random() < 0.7  # a long pair's dhidden is kept in two parts
    objective = draw.choice(
        list(OBJECTIVES) if not any_of_frozen else ["squared margin", "bounded tokens", "bounded KL"]
    )
    longest_pair = max(lengths)  # or sequence, where each is alone
    if objective not in UNPAIRED:
        longest_pair = max(map(sum, zip(lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :])))
    if draw.random() < 0.7:  # room for some rows, but hardly for more than the longest pair
        fewest = min(66, longest_pair)
        budget = row_bytes * draw.choice([fewest, draw.randint(fewest, longest_pair)]) + 1
    if any_of_frozen:  # room for both, and for dz beside the logits
        budget = 66 * (row_bytes + vocab * 8) + longest_pair * width * (16 if dtype == torch.float64 else 8)
    first = draw.randint(1, width - 1)
    parts = draw.choice([[width], [width], [first, width - first]])
    return Batch(
        lengths=lengths,
        tensors=tensors,
        trained=trained,
        weights=torch.rand(rows) * (torch.rand(rows) < draw.choice([0.0, 0.8, 0.8, 0.8])),
        objective=objective,
        layout=draw.choice(["padded", "cu_seqlens", "row_lengths"]),
        options=options,
        budget=budget,
        streaming_rows=draw.choice([4096, 40]),
        has_reference=draw.random() < 0.5 or not is_reference_free(OBJECTIVES[objective]),
        parts=parts,
        frozen=draw.choice([0, first]) if len(parts) > 1 and "weight" in trained else 0,
        column_major=draw.random() < 0.2,
    )


@dataclass
class Result:
    """Loss, sums of the chosen and the rejected sequences or of all, and gradients; that of hidden is packed, (N, D).

    `summed` are the root sums of squares of the rows' shares of dW and dbias: rows may cancel, but the rounding of each
    does not.
    """

    loss: torch.Tensor
    sides: tuple[TokenDivergence, ...]
    gradients: dict[str, torch.Tensor]
    summed: dict[str, torch.Tensor] = field(default_factory=dict)


def float64_result(batch: Batch) -> Result:
    """Materialised logits and autograd in float64."""
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in batch.tensors.items()}
    leaves = {name: doubles[name].clone().requires_grad_() for name in batch.trained}
    tensors, options = {**doubles, **leaves}, dict(batch.options)
    scales = options.pop("logit_scale", 1.0), options.pop("ref_logit_scale", 1.0)
    linear = torch.nn.functional.linear
    logits = scales[0] * linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
    ref_logits = scales[1] * linear(tensors["ref_hidden"], tensors["ref_weight"], tensors.get("ref_bias"))
    values = eager.token_divergence(logits, ref_logits, tensors["labels"], **options)
    of_sequences = list(zip(*(value.split(batch.lengths) for value in values)))
    weights = batch.weights.double().split(batch.lengths)
    sums = TokenDivergence._make(torch.stack([field.sum() for field in fields]) for fields in zip(*of_sequences))
    objective, pairs = OBJECTIVES[batch.objective], len(batch.lengths) // batch.sides
    sides = sums = sums.chunk(batch.sides)
    if sees_tokens(objective):
        sides = [
            TokenRows(
                **{name: torch.cat(column) for name, column in zip(TokenDivergence._fields, zip(*of_sequences[half]))},
                columns={"weight": torch.cat(weights[half])},
                rows_of_pair=torch.tensor(batch.lengths[half]),
            )
            for half in (slice(first, first + pairs) for first in range(0, len(batch.lengths), pairs))
        ]
    loss = objective(*sides).mean()
    grads, summed = dict.fromkeys(leaves), {}
    if leaves and loss.requires_grad:
        dz, *found = torch.autograd.grad(loss, [logits, *leaves.values()], allow_unused=True, materialize_grads=True)
        grads = dict(zip(leaves, found))
        rows = scales[0] * dz.norm(dim=-1)
        summed = {"weight": (rows * tensors["hidden"].norm(dim=-1)).norm(), "bias": rows.norm()}
    return Result(loss.detach(), tuple(side.detach() for side in sums), grads, summed)


def fused_result(batch: Batch, shard: VocabShard | None = None, loss_scale: float = 1.0) -> Result:
    """Of `linear_preference_loss` or `linear_token_loss`; with a shard, this rank's rows of the heads.

    The loss is multiplied by `loss_scale`, as a GradScaler does, and its gradients are divided again.
    """
    tensors = dict(batch.tensors)
    if shard is not None:
        for name in tensors:
            if name.endswith(("weight", "bias")):
                tensors[name] = tensors[name][shard.start : shard.stop]
    if batch.column_major:
        tensors = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    leaves = {name: tensors[name].clone().requires_grad_() for name in batch.trained}
    arguments = {**tensors, **leaves}
    if len(batch.parts) > 1:
        pieces = [piece.clone() for piece in tensors["weight"].split(batch.parts, dim=1)]
        arguments["weight"] = [piece.requires_grad_("weight" in leaves) for piece in pieces]
        pieces[0].requires_grad_("weight" in leaves and not batch.frozen)
        leaves.pop("weight", None)
        leaves |= {f"weight[{part}]": piece for part, piece in enumerate(pieces) if piece.requires_grad}
    columns = {"weight": batch.weights}
    offsets = torch.tensor([0, *batch.lengths]).cumsum(0)
    layout = {"cu_seqlens": {"cu_seqlens": offsets}, "row_lengths": {"row_lengths": batch.lengths}}.get(
        batch.layout, {}
    )
    if batch.layout == "padded":
        for name in ("hidden", "ref_hidden"):
            arguments[name] = _padded(arguments[name], batch.lengths, math.nan)
        arguments["labels"] = _padded(arguments["labels"], batch.lengths, -100)
        columns["weight"] = _padded(columns["weight"], batch.lengths, math.nan)
    options = dict(batch.options)
    if not batch.has_reference:
        arguments |= {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
        options = {name: value for name, value in options.items() if name not in ("kl_direction", "ref_logit_scale")}
    loss, *sides = (linear_preference_loss if batch.sides == 2 else linear_token_loss)(
        OBJECTIVES[batch.objective],
        **arguments,
        **layout,
        **options,
        token_columns=columns if sees_tokens(OBJECTIVES[batch.objective]) else None,
        logits_budget=batch.budget,
        shard=shard,
    )
    grads = {}
    if leaves:
        scaled = torch.autograd.grad(loss_scale * loss, list(leaves.values()))
        grads = {name: grad.double() / loss_scale for name, grad in zip(leaves, scaled)}
        of_parts = [grads.pop(name) for name in list(grads) if name.startswith("weight[")]
        if of_parts:
            grads["weight"] = torch.cat(of_parts, dim=1)
    return Result(loss.detach(), tuple(sides), grads)


def _padded(rows, lengths, value):
    longest = max(lengths)
    return torch.stack(
        [
            torch.cat([part, part.new_full((longest - len(part), *part.shape[1:]), value)])
            for part in rows.split(lengths)
        ]
    )


def check(batch: Batch, shard: VocabShard | None = None) -> None:
    """Raises AssertionError where the fused loss is not that of float64."""
    truth, dtype, loss_scale = float64_result(batch), batch.tensors["hidden"].dtype, 1.0
    largest_entry = max((float(grad.abs().max()) for grad in truth.gradients.values() if grad.numel()), default=0.0)
    if dtype == torch.float16 and largest_entry > 0:
        loss_scale = 2.0 ** round(math.log2(_SCALED_GRADIENT / largest_entry))
    with plans_of_large_calls(batch.streaming_rows):
        ours = fused_result(batch, shard, loss_scale)
    exact = dtype == torch.float64
    scale = 1 + max(value.abs().max().item() for side in truth.sides for value in side)  # of what the loss is made of
    assert abs(ours.loss.double() - truth.loss) <= (1e-10 if exact else 1e-5) * scale, (ours.loss, truth.loss)
    for side, true_side in zip(ours.sides, truth.sides):
        for name, value, expected in zip(TokenDivergence._fields, side, true_side):
            if name in ("ref_logps", "kl") and not batch.has_reference:
                assert (value.isnan() | (expected == 0)).all()  # those of a sequence without tokens are 0
            elif name != "correct":  # the most likely token may be another one by a rounding
                error = (value.double() - expected).abs().max()
                assert error <= (1e-10 if exact else 2e-5) * scale, (name, error)
    tolerance = TOLERANCES[dtype]
    for name, expected in truth.gradients.items():
        grad = ours.gradients[name]
        if name == "weight":
            expected = expected[:, batch.frozen :]
        parts = [(name, grad, expected)]
        if name == "hidden":  # each sequence by itself: one of a few rows is nothing beside the others
            parts = list(
                zip(
                    map("hidden of sequence {}".format, range(100)), *(g.split(batch.lengths) for g in (grad, expected))
                )
            )
        elif shard is not None:
            parts = [(name, grad, expected[shard.start : shard.stop])]
        largest = torch.maximum(expected.norm(), 50 * truth.summed.get(name, expected.new_zeros(())))
        for what, got, right in parts:
            floor = 1e-2 * tolerance * largest
            if dtype == torch.float16:
                floor = floor + _LEAST_ROUNDING / loss_scale * right.numel() ** 0.5
            assert (got - right).norm() <= tolerance * right.norm() + floor, (
                f"d{what}: error {(got - right).norm():.2e} beside {right.norm():.2e}"
            )


def checked_batches(seeds, shard_of=lambda batch, draw: None) -> Counter[str]:
    """How often each of KINDS was met by the batches of these seeds.

    Args:
        shard_of: shard_of(batch, draw), the same on all ranks but for the rank's place.

    Raises:
        AssertionError: a batch failed; the message says which.
    """
    met: Counter[str] = Counter()
    with counting(met):
        for seed in seeds:
            draw = random.Random(seed)
            batch = draw_batch(draw)
            try:
                check(batch, shard_of(batch, draw))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {batch}: {type(error).__name__}: {error}") from error
    return met
