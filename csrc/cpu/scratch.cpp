#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace fastattn {
namespace {

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block block, call_block;

void* grow(Block& block, size_t bytes) {
  if (bytes > block.size) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, size);
    if (data == nullptr) throw std::bad_alloc();
    std::free(block.data);
    block.data = data;
    block.size = size;
  }
  return block.data;
}

}  // namespace

void* thread_scratch(size_t bytes) { return grow(block, bytes); }

CallScratch::CallScratch(size_t bytes) : data_(grow(call_block, bytes)) {}

CallScratch::~CallScratch() {
  if (call_block.size <= kCallScratchKept) return;
  std::free(call_block.data);
  call_block.data = nullptr;
  call_block.size = 0;
}

}  // namespace fastattn
