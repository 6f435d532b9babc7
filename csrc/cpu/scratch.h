// Per-thread scratch memory that outlives a call, so that no kernel allocates in its loop.
#pragma once

#include <cstddef>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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

// Under AddressSanitizer pieces lie this far apart, what is no piece is out of bounds, and a fresh piece holds NaN.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kScratchGap = 64;
#else
constexpr size_t kScratchGap = 0;
#endif

// Hands out consecutive 64-byte aligned pieces of one scratch block; from null it measures how large the block must be.
class ScratchCursor {
 public:
  explicit ScratchCursor(void* base) : next_(static_cast<char*>(base)), measures_(base == nullptr) {}
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    open(count * sizeof(T));
    next_ += (count * sizeof(T) + 63) / 64 * 64 + kScratchGap;
    return piece;
  }

 private:
  void open([[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    if (measures_) return;
    ASAN_UNPOISON_MEMORY_REGION(next_, bytes);
    std::memset(next_, 0xff, bytes);
#endif
  }

  char* next_;
  [[maybe_unused]] bool measures_;
};

}  // namespace fastattn
