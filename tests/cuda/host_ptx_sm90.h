// The instructions of sm_90a in csrc/cuda/ptx.cuh on the host model of a block, by the layouts of the PTX manual.
//
// TMA and wgmma act at once, where the hardware takes its time: what a missing wait or fence would break is not seen
// here. mbarriers do wait, and a ring that cannot go on is a deadlock.
#pragma once

#include "host_ptx.h"

namespace fastattn {
namespace cuda {

inline void named_barrier_sync(int id, int threads) {
  static host_cuda::Barrier barriers[16];
  barriers[id].size = threads;
  host_cuda::wait(barriers[id]);
}

template <int kRegisters>
inline void set_max_registers_down() {}
template <int kRegisters>
inline void set_max_registers_up() {}

struct HostBarrier {
  uint8_t count, pending;
  bool parity;
  int32_t bytes;
};
static_assert(sizeof(HostBarrier) == sizeof(uint64_t));

inline HostBarrier& host_barrier(uint64_t* barrier) { return *reinterpret_cast<HostBarrier*>(barrier); }

inline void mbarrier_count(uint64_t* barrier, int arrivals, int bytes) {
  HostBarrier& b = host_barrier(barrier);
  b.pending -= arrivals, b.bytes += bytes;
  if (b.pending != 0 || b.bytes != 0) return;
  b.parity = !b.parity, b.pending = b.count;
  ++host_cuda::progress;
}
inline void mbarrier_init(uint64_t* barrier, int count) {
  host_barrier(barrier) = {static_cast<uint8_t>(count), static_cast<uint8_t>(count), false, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_count(barrier, 1, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { mbarrier_count(barrier, 1, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  while (host_barrier(barrier).parity == static_cast<bool>(parity)) host_cuda::yield();
}

// A matrix of 16-bit elements and its box, extents and stride in elements.
struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;
};

// Bits 4 to 6 of an address in shared memory change by bits 7 to 9.
inline char* swizzled_128(int64_t address) { return dynamic_shared() + (address ^ (address >> 7 & 7) << 4); }

inline void tma_load_2d(void* to, const TensorMap& map, uint64_t* barrier, int column, int row) {
  const int64_t start = static_cast<char*>(to) - dynamic_shared();
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      const uint16_t x = inside ? map.data[(row + r) * map.stride + column + c] : 0;
      std::memcpy(swizzled_128(start + (r * map.box_columns + c) * 2), &x, sizeof x);
    }
  }
  mbarrier_count(barrier, 0, -map.box_rows * map.box_columns * 2);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {}

inline uint64_t wgmma_descriptor(const void* p, int leading, int stride) {
  const uint64_t address = static_cast<const char*>(p) - dynamic_shared();
  return address >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32;
}

// Element (line, k) of the operand that a descriptor describes.
template <class T>
inline float described(uint64_t descriptor, bool across, int line, int k) {
  const int64_t start = (descriptor & 0x3fff) << 4;
  const int64_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int64_t along = line / 8 * stride + line % 8 * 128 + k * 2;
  const int64_t over = line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2;
  T x;
  std::memcpy(&x, swizzled_128(start + (across ? over : along)), sizeof x);
  return widen(x);
}

template <class T, bool kAcrossA, bool kAcrossB, int kSums>
inline void wgmma(float (&d)[kSums], uint64_t a, uint64_t b) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      rows[half][k] = described<T>(a, kAcrossA, warp * 16 + lane / 4 + 8 * half, k);
    }
  }
  for (int i = 0; i < kSums / 2; ++i) {
    const int group = i / 2, e = i % 2;
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = described<T>(b, kAcrossB, group * 8 + lane % 4 * 2 + e, k);
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) d[group * 4 + half * 2 + e] += rows[half][k] * column[k];
    }
  }
}

}  // namespace cuda
}  // namespace fastattn
