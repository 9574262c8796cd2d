"""Changes of the CUDA kernels that the emulator's tests must notice: name, file, text, replacement.

`make kernel-mutations` applies them one at a time.
"""

KERNELS = "csrc/cuda/row_kernels.cuh"

MUTATIONS = [
    (
        "misaligned wide loads, gradient",
        KERNELS,
        "const bool aligned = is_aligned(z + split.head, 16) && (!reads_reference || is_aligned(r + split.head, 16));",
        "const bool aligned = true;",
    ),
    ("misaligned wide loads, states", KERNELS, "with_constant(is_aligned(r + split.head, 16),", "with_constant(true,"),
    ("half-warp mask", KERNELS, "__shfl_down_sync(0xffffffffu,", "__shfl_down_sync(0x0000ffffu,"),
    (
        "shuffle in two branches",
        KERNELS,
        "to[i] = __shfl_down_sync(0xffffffffu, from[i], distance);",
        "to[i] = threadIdx.x % 32 < 16 ? __shfl_down_sync(0xffffffffu, from[i], distance)"
        " : __shfl_down_sync(0xffffffffu, from[i], distance);",
    ),
    ("dropped barrier", KERNELS, "    __syncthreads();\n", ""),
    (
        "stale shared memory",
        KERNELS,
        "if (threadIdx.x % kWarp == 0) warp_states",
        "if (threadIdx.x % kWarp == 0 && threadIdx.x < kGroup - kWarp) warp_states",
    ),
    ("last warp not merged", KERNELS, "other < kGroup / kWarp;", "other < kGroup / kWarp - 1;"),
    (
        "tail ends one entry early",
        KERNELS,
        "v = head + packs * kPack + lane; v < count;",
        "v = head + packs * kPack + lane; v < count - 1;",
    ),
    (
        "tail ends one entry late",
        KERNELS,
        "v = head + packs * kPack + lane; v < count;",
        "v = head + packs * kPack + lane; v <= count;",
    ),
    ("head and tail swapped", KERNELS, "head = int((bytes - address % bytes) % bytes)", "head = int(address % bytes)"),
    (
        "packs of a batch overlap",
        KERNELS,
        "z_pack[b] = load_pack<true>(z + v + b * kGroup * kPack);",
        "z_pack[b] = load_pack<true>(z + v + b * kPack);",
    ),
    ("wrong slice merged", KERNELS, "states[slice * rows + row]", "states[row * slices + slice]"),
    ("32-bit row offset", "csrc/params.h", "? row * inner_stride", "? int32_t(row * inner_stride)"),
    (
        "label of the wrong slice",
        KERNELS,
        "const int64_t at = label - params.vocab_start - part.begin;",
        "const int64_t at = label - params.vocab_start;",
    ),
    (
        "label of the wrong tile",
        KERNELS,
        "const int64_t label_at = label - params.vocab_start - part.begin;",
        "const int64_t label_at = label - params.vocab_start;",
    ),
    ("label written by another lane", KERNELS, "after_head / kPack : tail", "after_head : tail"),
    (
        "label's logits read after they are overwritten",
        KERNELS,
        "if (has_label) out[label_at] = at_label;",
        "if (has_label) out[label_at] = dz_at(label_at, std::true_type{});",
    ),
    ("every lane reports a bad label", KERNELS, "if (part.lane == 0 && part.index == 0) {", "{"),
    ("reference skipped where it counts", KERNELS, "kl_grad != Real(0);", "kl_grad > Real(0);"),
    (
        "infinite logits not tested",
        KERNELS,
        "!(fabs(sums.gap + sums.bregman + sums.z_dot) < std::numeric_limits<Real>::infinity())",
        "false",
    ),
    ("maxima far apart not noticed", KERNELS, "if (shifts.far_apart() ||", "if ("),
    (
        "the reverse KL's states merged as the forward one's",
        "csrc/cuda/launch.cu",
        "with_constant(kind.reverse_kl,",
        "with_constant(false,",
    ),
    ("softcap's polynomial too far", "csrc/cuda/device.h", "fabs(u) < 0.6f", "fabs(u) < 0.9f"),
    (
        "scaling misses the last entry",
        KERNELS,
        "i < count - packs * kPack; i += threads",
        "i < count - packs * kPack - 1; i += threads",
    ),
]
