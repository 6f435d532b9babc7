// The functions of csrc/cuda/ptx.cuh over the host model of a block. A copy of cp.async moves its bytes at its start,
// or (host_cuda::schedule) when its thread waits for the group; from its start until then they are NaN.
#pragma once

// clang-format off
#include "host_cuda.h"  // first: it gives the rest its CUDA words
#include "cuda/common.cuh"
// clang-format on

#include <deque>

namespace host_cuda {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// A thread's groups of copies, the last one still open.
struct Copies {
  int64_t block = 0;
  std::deque<std::vector<Copy>> groups;
};
inline Copies copies[kMostFibers];

// What a block left under way is lost with its shared memory.
inline std::deque<std::vector<Copy>>& own_copies() {
  Copies& own = copies[current];
  if (own.block != blocks_run) own = {blocks_run, {{}}};
  return own.groups;
}

inline void arrive(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

// Element (row, column) of the 8 x 8 matrix whose rows begin where lanes 8 matrix, 8 matrix + 1, ... say.
inline uint32_t element(const Given<const void*>& rows, unsigned matrix, unsigned row, unsigned column) {
  return static_cast<const uint16_t*>(rows[8 * matrix + row])[column];
}

inline void aligned_or_abort(const void* at, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % 16 == 0) return;
  std::fprintf(stderr, "%s: %p is no multiple of 16\n", what, at);
  std::abort();
}

}  // namespace host_cuda

namespace fastattn {
namespace cuda {

inline char* dynamic_shared() { return host_cuda::dynamic_start(); }

inline int cluster_rank() { return static_cast<int>(host_cuda::rank()); }
inline int cluster_blocks() { return static_cast<int>(host_cuda::block_barriers.size()); }
inline void cluster_sync() { host_cuda::wait(host_cuda::cluster_barrier); }
template <class A>
inline A cluster_load(const A* at, int rank) {
  const int64_t offset = reinterpret_cast<const char*>(at) - dynamic_shared();
  A x;
  std::memcpy(&x, host_cuda::dynamic_start(static_cast<unsigned>(rank)) + offset, sizeof x);
  return x;
}

// Grids run one after another.
inline void let_next_grid_start() {}
inline void wait_for_previous_grid() {}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void cp_async16(void* to, const void* from, int bytes) {
  host_cuda::aligned_or_abort(to, "cp.async"), host_cuda::aligned_or_abort(from, "cp.async");
  const host_cuda::Copy copy{to, from, bytes};
  if (!host_cuda::late_copy()) return host_cuda::arrive(copy);
  std::memset(to, host_cuda::kUntouched, 16);
  host_cuda::own_copies().back().push_back(copy);
}

inline void cp_async_commit() { host_cuda::own_copies().push_back({}); }

template <int kPending>
inline void cp_async_wait() {
  auto& groups = host_cuda::own_copies();
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const host_cuda::Copy& copy : groups.front()) host_cuda::arrive(copy);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  host_cuda::aligned_or_abort(row, "ldmatrix");
  const auto rows = host_cuda::give(row);
  const unsigned lane = host_cuda::current % 32, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    r[i] = host_cuda::element(rows, i, g, 2 * t) | host_cuda::element(rows, i, g, 2 * t + 1) << 16;
  }
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  host_cuda::aligned_or_abort(row, "ldmatrix");
  const auto rows = host_cuda::give(row);
  const unsigned lane = host_cuda::current % 32, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    r[i] = host_cuda::element(rows, i, 2 * t, g) | host_cuda::element(rows, i, 2 * t + 1, g) << 16;
  }
}

// One half of a register of 16-bit values.
template <class T>
inline float half_of(uint32_t pair, int half) {
  T x;
  x.bits = static_cast<uint16_t>(pair >> (16 * half));
  return widen(x);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = host_cuda::current % 32;
  float left[2][16], right[2][16];  // rows g and g + 8 of a, columns 2 t and 2 t + 1 of b
  for (int i = 0; i < 4; ++i) {
    const auto given = host_cuda::give(a[i]);
    for (unsigned t = 0; t < 4; ++t) {
      for (int half = 0; half < 2; ++half) {
        left[i % 2][i / 2 * 8 + static_cast<int>(t) * 2 + half] = half_of<T>(given[lane / 4 * 4 + t], half);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const auto given = host_cuda::give(b[i]);
    for (unsigned column = 0; column < 2; ++column) {
      for (unsigned t = 0; t < 4; ++t) {
        for (int half = 0; half < 2; ++half) {
          right[column][i * 8 + static_cast<int>(t) * 2 + half] =
              half_of<T>(given[(lane % 4 * 2 + column) * 4 + t], half);
        }
      }
    }
  }
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 16; ++k) d[e] += left[e / 2][k] * right[e % 2][k];
  }
}

}  // namespace cuda
}  // namespace fastattn
