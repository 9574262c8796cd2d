// Scratch memory on the CPU: tensors as large as logits, weights and their gradients, in blocks that are reused.
//
// At 4 KiB per page fault, touching fresh memory of this size costs more than the arithmetic on it. Large blocks
// therefore use huge pages where the system has them and, once their tensor is freed, are kept for the next one, as
// torch's allocator keeps CUDA memory.
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "../stable.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace tdpo {
namespace {

constexpr int64_t kLargeBytes = 8 << 20;  // smaller tensors come from torch's own allocator
constexpr size_t kCachedBytes = size_t(1) << 30;
constexpr size_t kHugePage = 2 << 20;

struct OutOfMemory : std::bad_alloc {
  std::string message;

  explicit OutOfMemory(size_t bytes) : message(joined("tdpo_ext: not enough memory for ", bytes, " bytes")) {}
  const char* what() const noexcept override { return message.c_str(); }
};

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
    if (data == nullptr) throw OutOfMemory(rounded);
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

int64_t entry_bytes(ScalarType dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  return static_cast<int64_t>(aoti_torch_dtype_element_size(to<int32_t>(from(dtype))));
}

Tensor scratch_empty(const std::vector<int64_t>& size, ScalarType dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::vector<int64_t> strides(size.size());
  int64_t entries = 1;
  for (size_t dim = size.size(); dim-- > 0; entries *= size[dim]) strides[dim] = entries;
  const auto bytes = entries * entry_bytes(dtype);
  if (bytes < kLargeBytes) return torch::stable::empty(size, dtype, std::nullopt, cpu);
  const Block block = cache().take(bytes);
  return torch::stable::from_blob(block.data, size, strides, cpu, dtype, [block](void*) { cache().give_back(block); });
}

void release_scratch() { cache().release(); }

}  // namespace

// Without tensor arguments there is no backend to dispatch on, so the kernels are registered for all of them.
STABLE_TORCH_LIBRARY_IMPL(tdpo_ext, CompositeExplicitAutograd, m) {
  m.impl("scratch_empty", TORCH_BOX(&scratch_empty));
  m.impl("release_scratch", TORCH_BOX(&release_scratch));
}

}  // namespace tdpo
