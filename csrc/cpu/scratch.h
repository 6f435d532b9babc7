// Per-thread scratch memory that outlives a call, so that no kernel allocates in its loop.
#pragma once

#include <cstddef>

namespace fastattn {

// At least `bytes` bytes aligned to 64, owned by the calling thread and valid until its next call. Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

// Hands out consecutive 64-byte aligned pieces of one scratch block.
class ScratchCursor {
 public:
  explicit ScratchCursor(void* base) : next_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* next_;
};

}  // namespace fastattn
