#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block block, call_block;

void* grow(Block& block, size_t bytes) {
  bytes += 64 * kScratchGap;  // callers that do not measure take fewer than 64 pieces
  if (bytes > block.size) {
    // From a megabyte on in 2 MiB pages where the system has them: what lies together in 4 KiB pages lies anywhere in
    // physical memory, and some processes then lost a fifth of their speed to conflicts in L2.
    const size_t page = bytes < (size_t{1} << 20) ? size_t{4096} : kHugePage, size = (bytes + page - 1) / page * page;
    void* data = std::aligned_alloc(page, size);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
    std::free(block.data);
    block.data = data;
    block.size = size;
  }
  return block.data;
}

}  // namespace

void* thread_scratch(size_t bytes) {
  void* data = grow(block, bytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(data, block.size);
#endif
  return data;
}

CallScratch::CallScratch(size_t bytes) : data_(grow(call_block, bytes)) {}

CallScratch::~CallScratch() {
  if (call_block.size <= kCallScratchKept) return;
  std::free(call_block.data);
  call_block.data = nullptr;
  call_block.size = 0;
}

}  // namespace fastattn
