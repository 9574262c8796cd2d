"""Changes of the CPU's kernels and operators that Python tests must notice: name, file, text, replacement, tests.

`make kernel-mutations` applies them one at a time, and builds the extension after each.
"""

STATE = "csrc/row_state.h"
OPS, PEAKED, REVERSE, PRODUCTS = (
    [f"library/test_{name}.py"] for name in ("ops", "peaked_rows", "reverse_kl", "products")
)
ROWS, BRGEMM, PACKING = (f"csrc/cpu/{name}" for name in ("row_kernels.cpp", "brgemm.cpp", "packing.h"))

MUTATIONS = [
    (
        "far maxima always moved",
        STATE,
        "moved_size <= other_sum + weight_sum + size_of(natural_gap)",
        "moved_size >= X{}",
        PEAKED,
    ),
    (
        "top of masked entries",
        STATE,
        "return masked ? -kLargestExponent<Real> : top;",
        "return masked ? top : top;",
        PEAKED,
    ),
    (
        "peaked rows not noticed",
        STATE,
        "return std::fabs(z - r) > Real(16);",
        "return std::fabs(z - r) > Real(1600);",
        PEAKED,
    ),
    (
        "gap in float32",
        STATE,
        "gap = Real(double(z) - double(r) - double(offset) * double(inv_temp.base2));",
        "gap = z - r - offset * inv_temp.base2;",
        PEAKED,
    ),
    ("the smaller of two logits first", STATE, "if (std::fabs(z) > std::fabs(r))", "if (false)", PEAKED),
    (
        "forward hop in the reverse KL",
        STATE,
        "hop = kReverse ? r_hop - z_hop : z_hop - r_hop;",
        "hop = z_hop - r_hop;",
        REVERSE,
    ),
    (
        "no mean gap in the reverse KL",
        STATE,
        "mean_gap(kReverse ? state.sums.gap / state.sums.weight_sum() : Real(0))",
        "mean_gap(0)",
        REVERSE,
    ),
    ("reverse KL in base 2", STATE, "kReverse ? kLn2 : -1", "kReverse ? 1 : -1", REVERSE),
    (
        "a slice's first label missed",
        ROWS,
        "if (label >= begin && label < end) {",
        "if (label > begin && label < end) {",
        OPS,
    ),
    (
        "labels unchecked in the gradient",
        "csrc/cpu/operators.cpp",
        "  check_label_range(inputs.params);\n  const auto gradient",
        "  const auto gradient",
        OPS,
    ),
    (
        "blocks of a product overwritten",
        BRGEMM,
        "out.at(m.begin, n.begin, k > 0)",
        "out.at(m.begin, n.begin, false)",
        PRODUCTS,
    ),
    ("a thread's share of a product lost", BRGEMM, "thread < threads; ++thread)", "thread < 1; ++thread)", PRODUCTS),
    ("depths of dhidden overwritten", BRGEMM, "sum.at(0, n, block > first)", "sum.at(0, n, false)", PRODUCTS),
    ("depths of dW overwritten", BRGEMM, "out.at(m.begin, 0, k > 0)", "out.at(m.begin, 0, false)", PRODUCTS),
    ("blocks of dW overwritten", BRGEMM, "out.at(0, 0, i > 0)", "out.at(0, 0, false)", PRODUCTS),
    (
        "the last odd row of a block left out",
        PACKING,
        "i + 1 < k.size ? *b.at(k.begin + i + 1, n.begin + j) : T(0)",
        "T(0)",
        PRODUCTS,
    ),
    (
        "depths of exchanged operands overwritten",
        BRGEMM,
        "height, k > 0, weight.at(n, k)",
        "height, false, weight.at(n, k)",
        PRODUCTS,
    ),
    ("rounded towards zero", PACKING, "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", PRODUCTS),
    (
        "slices of a row that is overwritten",
        "csrc/cpu/operators.cpp",
        "Tasks(inputs.params, /*whole_rows=*/narrows)",
        "Tasks(inputs.params)",
        OPS,
    ),
    (
        "rows of a narrower output elsewhere",
        "csrc/checks.h",
        "out.size(dim) == 1 || out.stride(dim)",
        "true || out.stride(dim)",
        OPS,
    ),
    (
        "partly overlapping output accepted",
        "csrc/checks.h",
        "check_value(in_place || !may_overlap(out, logits),",
        "check_value(true,",
        OPS,
    ),
    (
        "mass below a peak of the policy forgotten",
        STATE,
        "sums.bregman = sums.other_sum() * other;",
        "sums.bregman = X{};",
        PEAKED,
    ),
    ("a gap without mass left", STATE, "sums.gap = X{};", "", PEAKED),
    ("a KL below zero", STATE, "kl = kl < 0 ? 0 : kl;", "", PEAKED),
    (
        "a reference that rises alone",
        ROWS,
        "if (z_max > state.z_max || r_max > state.r_max)",
        "if (z_max > state.z_max)",
        PEAKED,
    ),
    (
        "a policy that rises alone",
        ROWS,
        "if (z_max > state.z_max || r_max > state.r_max)",
        "if (r_max > state.r_max)",
        PEAKED,
    ),
    (
        "rows without upstream gradient computed",
        ROWS,
        "if (params.labels[row] == params.ignore_index || (logps_grad == Real(0) && kl_grad == Real(0))) {",
        "if (params.labels[row] == params.ignore_index) {",
        ["library/test_divergence.py"],
    ),
    (
        "blocks of any size reused",
        "csrc/cpu/memory.cpp",
        "block->bytes >= bytes && block->bytes <= 2 * bytes &&",
        "block->bytes >= bytes &&",
        ["library/test_plan.py"],
    ),
    (
        "float16 ties rounded up",
        "csrc/cpu/simd.h",
        "bits + 0xfffu + ((bits >> 13) & 1u) -",
        "bits + 0x1000u -",
        ["library/test_build.py::test_cpp_tests"],
    ),
]
