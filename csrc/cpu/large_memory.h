// Tensors as large as logits, weights and their gradients, in memory that is used again.
#pragma once

#include <ATen/ATen.h>

namespace tdpo {

// An uninitialised CPU tensor. At 4 KiB a page fault, fresh memory of this size costs more to touch than the arithmetic
// on it; so large blocks are made of huge pages where the system has them and, once a tensor has let go of one, kept
// for the next (kCachedBytes at most), as torch's allocator keeps CUDA memory.
at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Frees the blocks that no tensor uses.
void release_large_memory();

constexpr int64_t kLargeBytes = 8 << 20;  // smaller tensors come from torch's own allocator
constexpr int64_t kCachedBytes = int64_t(1) << 30;

}  // namespace tdpo
