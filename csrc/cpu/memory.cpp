// Scratch memory on the CPU: tensors as large as logits, weights and their gradients, in blocks that are reused.
//
// At 4 KiB per page fault, touching fresh memory of this size costs more than the arithmetic on it. Large blocks
// therefore use huge pages where the system has them and, once their tensor is freed, are kept for the next one, as
// torch's allocator keeps CUDA memory.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace tdpo {
namespace {

constexpr int64_t kLargeBytes = 8 << 20;  // smaller tensors come from torch's own allocator
constexpr size_t kCachedBytes = size_t(1) << 30;
constexpr size_t kHugePage = 2 << 20;

struct Block {
  void* data;
  size_t bytes;
};

class BlockCache {
 public:
  // The smallest cached block that fits and is at most twice as large, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
        if (block->bytes >= bytes && block->bytes <= 2 * bytes && (best == blocks_.end() || block->bytes < best->bytes))
          best = block;
      if (best != blocks_.end()) {
        const Block taken = *best;
        blocks_.erase(best);
        return taken;
      }
    }
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, rounded);
    if (data == nullptr) {  // the cached blocks may be using the memory that is missing
      release();
      data = std::aligned_alloc(kHugePage, rounded);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "tdpo_ext: not enough memory for ", rounded, " bytes");
#if defined(__linux__)
    madvise(data, rounded, MADV_HUGEPAGE);  // a hint, which the system may decline
#endif
    return {data, rounded};
  }

  // Caches the block; frees the oldest ones above the limit of kCachedBytes.
  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    size_t total = 0;
    for (const Block& cached : blocks_) total += cached.bytes;
    while (total > kCachedBytes) {
      total -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
  }

  std::mutex& mutex() { return mutex_; }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

// Never destroyed: tensors may outlive static objects at exit.
BlockCache& cache() {
  static BlockCache& instance = [&]() -> BlockCache& {
#if defined(__linux__)
    // A fork must not copy the lock while another thread holds it: the child would wait for it forever.
    pthread_atfork([] { cache().mutex().lock(); }, [] { cache().mutex().unlock(); }, [] { cache().mutex().unlock(); });
#endif
    return *new BlockCache;
  }();
  return instance;
}

at::Tensor scratch_empty(at::IntArrayRef size, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  const auto bytes = static_cast<int64_t>(c10::multiply_integers(size) * c10::elementSize(dtype));
  if (bytes < kLargeBytes) return at::empty(size, options);
  const Block block = cache().take(bytes);
  return at::from_blob(block.data, size, [block](void*) { cache().give_back(block); }, options);
}

void release_scratch() { cache().release(); }

}  // namespace

// Without tensor arguments there is no backend to dispatch on, so the kernels are registered for all of them.
TORCH_LIBRARY_IMPL(tdpo_ext, CompositeExplicitAutograd, m) {
  m.impl("scratch_empty", &scratch_empty);
  m.impl("release_scratch", &release_scratch);
}

}  // namespace tdpo
