"""The planner's cost model: seconds that a plan's matrix products take, and those of the bytes moved for them.

    seconds = multiply-adds / products + bytes of weights read / weights + bytes of sums moved / memory

Every product reads a whole weight matrix, whatever the number of its rows: that is what small blocks cost. What all
plans do alike, the row kernels over the logits, is left out, but for the second pass that streaming takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Sizes


@dataclass(frozen=True)
class MachineRates:
    """What the model knows of a device; only ratios matter.

    Attributes:
        products: multiply-adds a second of matrix products.
        weights: bytes of a weight a second that a product reads and, on a CPU, packs.
        memory: bytes a second that are read or written where sums are accumulated.
    """

    products: float
    weights: float
    memory: float


# CPU: benchmarks/results/bench_rates.json (2 cores of an AMD EPYC with AVX-512), by whether weights have low precision;
# the rate of memory is that of the bfloat16 fit: in float32 its cost is lost in the noise.
# GPU: an H100's data sheet; float32 products as bfloat16 ones in TF32, at half the rate.
RATES = {
    ("cpu", True): MachineRates(products=486e9, weights=39e9, memory=46e9),
    ("cpu", False): MachineRates(products=222e9, weights=43e9, memory=46e9),
    ("cuda", True): MachineRates(products=350e12, weights=3e12, memory=3e12),
    ("cuda", False): MachineRates(products=175e12, weights=3e12, memory=3e12),
}


def rates_of(device_type: str, sizes: Sizes) -> MachineRates:
    """The rates of a device; those of a GPU for one that is not known."""
    return RATES.get((device_type, sizes.low_precision), RATES["cuda", sizes.low_precision])


@dataclass(frozen=True)
class Work:
    """What a plan does.

    Attributes:
        products: multiply-adds.
        weights: bytes of weights read by products.
        moved: bytes of sums and logits moved beside.
    """

    products: float
    weights: float
    moved: float

    def seconds(self, rates: MachineRates) -> float:
        return self.products / rates.products + self.weights / rates.weights + self.moved / rates.memory


@dataclass(frozen=True)
class ForwardSteps:
    """How often a plan that forms gradients in the forward pass takes its products.

    Attributes:
        blocks: of rows whose logits are there together.
        gradient_products: for dhidden and for dW, each of some rows whose dz is kept.
        pairs_apart: pairs whose dW is summed apart.
        separate_rows: rows whose dhidden is formed in two parts, by two products.
    """

    blocks: int
    gradient_products: int
    pairs_apart: int
    separate_rows: int = 0


def forward_work(sizes: Sizes, rows: int, steps: ForwardSteps) -> Work:
    """Of a plan that forms gradients in the forward pass."""
    heads = sizes.vocab * (sizes.width + sizes.ref_width) * sizes.weight_bytes
    weights = steps.blocks * heads
    products = rows * sizes.vocab * (sizes.width + sizes.ref_width)
    if sizes.needs_grad:
        products += (rows + steps.separate_rows) * sizes.vocab * sizes.width
        weights += steps.gradient_products * sizes.vocab * sizes.width * sizes.weight_bytes
    products += rows * sizes.vocab * sizes.grad_width
    return Work(products, weights, _moved_for_weight_gradient(sizes, steps))


# Bytes that rounding the float32 sum of a low-precision dW moves, for each of the sum: half of it lies in dW's memory,
# and is copied before it is rounded.
_ROUNDING = 2.0


def _moved_for_weight_gradient(sizes: Sizes, steps: ForwardSteps) -> float:
    """Bytes of dW that are written, added to, scaled and rounded."""
    if not sizes.needs_weight_grad or steps.gradient_products == 0:
        return 0
    products, apart = steps.gradient_products, steps.pairs_apart
    if products == 1:
        return sizes.vocab * sizes.grad_width * sizes.weight_bytes
    # Every product but the first reads and writes the sum. A pair that is summed apart is read once more, and the total
    # read and written.
    moved = (2 * products - 1 + 3 * apart) * sizes.accumulated_weight
    return moved + (_ROUNDING * sizes.accumulated_weight if sizes.low_precision else 0)


# Rows whose reference logits streaming computes again: half for TDPO2, whose chosen responses need none; all for TDPO1,
# none for DPO.
_RECOMPUTED_REFERENCE = 0.5


def streaming_work(sizes: Sizes, rows: int, blocks: int, slices: int) -> Work:
    """Of a plan that computes logits once for the row states and, where a gradient is wanted, again for dz."""
    policy, reference = sizes.vocab * sizes.width, sizes.vocab * sizes.ref_width
    products: float = rows * (policy + reference)
    weights: float = blocks * (policy + reference) * sizes.weight_bytes
    moved = 0.0
    if sizes.needs_grad:
        products += rows * (2 * policy + _RECOMPUTED_REFERENCE * reference)
        weights += blocks * (2 * policy + _RECOMPUTED_REFERENCE * reference) * sizes.weight_bytes
        # Logits are written and read again; each slice reads and writes the float32 dhidden.
        moved += rows * sizes.vocab * 2 * (1 + _RECOMPUTED_REFERENCE) * sizes.logit_bytes
        moved += 2 * slices * rows * sizes.width * sizes.logit_bytes
    if sizes.needs_weight_grad:
        products += rows * sizes.vocab * sizes.grad_width
        moved += 2 * blocks * sizes.accumulated_weight
    return Work(products, weights, moved)
