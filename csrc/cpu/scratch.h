// Per-thread scratch memory that outlives a call, so that no kernel allocates in its loop.
#pragma once

#include <cstddef>

namespace fastattn {

// At least `bytes` bytes aligned to 64, owned by the calling thread and valid until its next call. Throws
// std::bad_alloc.
void* thread_scratch(size_t bytes);

// The same for what one operator call shares between its threads (packed weights, hidden activations): the calling
// thread owns it, separate from thread_scratch. Kept for the next call up to kCallScratchKept, since fresh pages cost
// as much as a pass over them.
constexpr size_t kCallScratchKept = size_t{128} << 20;
class CallScratch {
 public:
  explicit CallScratch(size_t bytes);
  ~CallScratch();
  CallScratch(const CallScratch&) = delete;
  CallScratch& operator=(const CallScratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

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
