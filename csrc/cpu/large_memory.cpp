#include "large_memory.h"

#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tdpo {
namespace {

constexpr size_t kHugePage = 2 << 20;

struct Block {
  void* data;
  size_t bytes;
};

class Cache {
 public:
  // The smallest kept block that fits without wasting half of itself, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block)
        if (block->bytes >= bytes && block->bytes <= 2 * bytes && (best == kept_.end() || block->bytes < best->bytes))
          best = block;
      if (best != kept_.end()) {
        const Block found = *best;
        kept_.erase(best);
        return found;
      }
    }
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, rounded);
    if (data == nullptr) {  // what is kept may be what is missing
      release();
      data = std::aligned_alloc(kHugePage, rounded);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "tdpo_ext: not enough memory for ", rounded, " bytes");
#if defined(__linux__)
    madvise(data, rounded, MADV_HUGEPAGE);  // a hint: may be declined
#endif
    return {data, rounded};
  }

  // Keeps the block; the oldest leave where the limit would be passed.
  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    size_t total = 0;
    for (const Block& other : kept_) total += other.bytes;
    while (total > static_cast<size_t>(kCachedBytes)) {
      total -= kept_.front().bytes;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : kept_) std::free(block.data);
    kept_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<Block> kept_;
};

// Never destroyed: tensors may outlive static objects at exit.
Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  const auto bytes = static_cast<int64_t>(c10::multiply_integers(sizes) * c10::elementSize(dtype));
  if (bytes < kLargeBytes) return at::empty(sizes, options);
  const Block block = cache().take(bytes);
  return at::from_blob(block.data, sizes, [block](void*) { cache().give_back(block); }, options);
}

void release_large_memory() { cache().release(); }

TORCH_LIBRARY_FRAGMENT(tdpo_ext, m) {
  m.def("large_empty(int[] size, ScalarType dtype) -> Tensor", &large_empty);
  m.def("release_large_memory() -> ()", &release_large_memory);
}

}  // namespace tdpo
