// The instructions of sm_90a in csrc/cuda/ptx.cuh on the host model of a block, by the layouts of the PTX manual.
//
// The hardware takes its time with TMA and wgmma. Here (host_cuda::schedule) a copy lands at its start, or when no
// thread can go on before it does, and is NaN until then; a product is computed at its start, or when its warp waits
// for it and no other warp can go on. mbarriers do wait, and a ring that cannot go on is a deadlock. What a missing
// fence would break is not seen.
#pragma once

#include <functional>

// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
#include "cuda/ptx.cuh"
// clang-format on

namespace fastattn {
namespace cuda {

inline host_cuda::Barrier& named_barrier(int id, int threads) {
  if (id < 0 || id >= 16 || threads % 32 != 0) std::abort();
  host_cuda::named_barriers[id].size = threads;
  return host_cuda::named_barriers[id];
}
inline void named_barrier_sync(int id, int threads) { host_cuda::wait(named_barrier(id, threads)); }
inline void named_barrier_arrive(int id, int threads) {
  host_cuda::Barrier& barrier = named_barrier(id, threads);
  if (++barrier.arrived == barrier.size) host_cuda::release(barrier);
  host_cuda::yield();
}

inline int warpgroup_thread() { return static_cast<int>(threadIdx.x % 128); }

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
  if (b.pending < arrivals) host_cuda::fail("more arrivals at an mbarrier than its count");
  b.pending -= arrivals, b.bytes += bytes;
  if (b.pending != 0 || b.bytes != 0) return;
  b.parity = !b.parity, b.pending = b.count;
  ++host_cuda::events;
}
inline void mbarrier_init(uint64_t* barrier, int count) {
  host_barrier(barrier) = {static_cast<uint8_t>(count), static_cast<uint8_t>(count), false, 0};
}
inline void mbarrier_init_fence() {}
// Whoever waited for it may go on before its thread does.
inline void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_count(barrier, 1, 0);
  host_cuda::yield();
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { mbarrier_count(barrier, 1, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  host_cuda::wait_until(
      [](const void* at, int64_t phase) {
        return static_cast<const HostBarrier*>(at)->parity != static_cast<bool>(phase);
      },
      barrier, parity);
}

// Copies under way, in the order of their starts.
inline std::deque<std::function<void()>> host_copies;

inline bool land_copy() {
  if (host_copies.empty()) return false;
  const unsigned which = host_cuda::chance(static_cast<unsigned>(host_copies.size()));
  const auto land = std::move(host_copies[which]);
  host_copies.erase(host_copies.begin() + which);
  land();
  return true;
}

// A tensor of 16-bit elements and its box, extents and strides in elements, innermost first.
struct TensorMap {
  const uint16_t* data;
  int64_t extents[5], strides[5];
  int box[5];
};

inline TensorMap matrix_map(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                            int box_columns) {
  return {static_cast<const uint16_t*>(data),
          {columns, rows, 1, 1, 1},
          {1, stride, 0, 0, 0},
          {box_columns, box_rows, 1, 1, 1}};
}

inline TensorMap boxes_map(const TensorBoxes<5>& x) {
  TensorMap map;
  map.data = static_cast<const uint16_t*>(x.data);
  std::memcpy(map.extents, x.extents, sizeof x.extents);
  std::memcpy(map.strides, x.strides, sizeof x.strides);
  std::memcpy(map.box, x.box, sizeof x.box);
  return map;
}

// Bits 4 to 6 of an address in shared memory change by bits 7 to 9.
inline char* swizzled_128(int64_t address, char* memory = dynamic_shared()) {
  return memory + (address ^ (address >> 7 & 7) << 4);
}

inline void tma_load_5d(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
  const int64_t start = static_cast<char*>(to) - dynamic_shared(), corner[5] = {c0, c1, c2, c3, c4};
  int64_t count = 1;
  for (const int n : map.box) count *= n;
  if (start % 1024 != 0 || map.box[0] * 2 > 128 || reinterpret_cast<uintptr_t>(map.data) % 16 != 0) {
    std::fprintf(stderr, "TMA: the tile is not at a multiple of 1024 bytes, or its rows exceed the swizzle's\n");
    std::abort();
  }
  const bool late = host_cuda::late_copy();
  if (late) {
    for (int64_t i = 0; i < count; ++i) std::memset(swizzled_128(start + i * 2), host_cuda::kUntouched, 2);
  }
  char* const memory = dynamic_shared();
  const auto land = [=] {
    for (int64_t i = 0; i < count; ++i) {
      bool inside = true;
      int64_t offset = 0, rest = i;
      for (int dim = 0; dim < 5; rest /= map.box[dim], ++dim) {
        const int64_t at = corner[dim] + rest % map.box[dim];
        inside &= at >= 0 && at < map.extents[dim];
        offset += at * map.strides[dim];
      }
      const uint16_t x = inside ? map.data[offset] : 0;
      std::memcpy(swizzled_128(start + i * 2, memory), &x, sizeof x);
    }
    mbarrier_count(barrier, 0, static_cast<int>(-count * 2));
  };
  late ? host_copies.push_back(land) : land();
}

inline void tma_load_2d(void* to, const TensorMap& map, uint64_t* barrier, int column, int row) {
  tma_load_5d(to, map, barrier, column, row, 0, 0, 0);
}

// A thread's additions to global memory under way. What they add is read at their start, or when the thread waits for
// that and no other can go on; memory has it when the thread waits for that.
struct HostAddition {
  float* to;
  const void* from;
  std::vector<float> terms;
  bool committed = false, read = false;

  void take() {
    std::memcpy(terms.data(), from, terms.size() * sizeof(float));
    read = true;
  }
};
inline std::vector<HostAddition> host_additions[1024];

inline void bulk_add(float* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    std::fprintf(stderr, "a bulk copy is not of multiples of 16 bytes\n");
    std::abort();
  }
  HostAddition addition{to, from, std::vector<float>(static_cast<size_t>(bytes) / sizeof(float))};
  if (!host_cuda::late_copy()) addition.take();
  host_additions[host_cuda::current].push_back(std::move(addition));
}
inline void bulk_commit() {
  for (HostAddition& addition : host_additions[host_cuda::current]) addition.committed = true;
}
inline void bulk_wait_read() {
  for (const HostAddition& addition : host_additions[host_cuda::current]) {
    if (!addition.committed || addition.read) continue;
    host_cuda::yield_to_all();
    break;
  }
  for (HostAddition& addition : host_additions[host_cuda::current]) {
    if (addition.committed && !addition.read) addition.take();
  }
}
inline void bulk_wait() {
  bulk_wait_read();
  auto& additions = host_additions[host_cuda::current];
  for (const HostAddition& addition : additions) {
    for (size_t i = 0; addition.committed && i < addition.terms.size(); ++i) addition.to[i] += addition.terms[i];
  }
  additions.clear();
}

inline void fence_async_shared() {}

// Products of a thread that were started, by group; the last group is open.
inline std::deque<std::vector<std::function<void()>>> host_products[1024];

// What a block left under way is lost with its shared memory, but for copies, which must have been waited for.
inline void end_of_block_sm90() {
  if (!host_copies.empty()) host_cuda::fail("copies under way at the end of a block");
  for (auto& additions : host_additions) additions.clear();
  for (auto& groups : host_products) groups.clear();
}
inline const bool host_registered =
    (host_cuda::land_one = land_copy, host_cuda::end_of_block = end_of_block_sm90, true);

template <class F>
inline void start_product(const F& product) {
  auto& groups = host_products[host_cuda::current];
  if (groups.empty()) groups.emplace_back();
  bool behind = false;  // products of a warp end in their order
  for (const auto& group : groups) behind |= !group.empty();
  if (!behind && !host_cuda::late_product()) return product();
  groups.back().push_back(product);
}

inline void wgmma_fence() {}
inline void wgmma_commit() { host_products[host_cuda::current].emplace_back(); }
template <int kPending>
inline void wgmma_wait() {
  auto& groups = host_products[host_cuda::current];
  bool waits = false;
  for (size_t i = 0; i + kPending + 1 < groups.size(); ++i) waits |= !groups[i].empty();
  if (waits) host_cuda::yield_to_all();
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
}
template <int kSums>
inline void wgmma_fence_sums(float (&)[kSums]) {}

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

// d = or += rows b, where a lane has its two lines of 16 terms and b is described.
template <class T, int kSums>
inline void multiply_lines(float (&d)[kSums], const float (&rows)[2][16], uint64_t b, bool across, bool add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < kSums / 2; ++i) {
    const int group = i / 2, e = i % 2;
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = described<T>(b, across, group * 8 + lane % 4 * 2 + e, k);
    for (int half = 0; half < 2; ++half) {
      float& sum = d[group * 4 + half * 2 + e];
      if (!add) sum = 0;
      for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
    }
  }
}

template <class T, int kSums>
inline void wgmma_described(float (&d)[kSums], uint64_t a, uint64_t b, bool across_a, bool across_b, bool add) {
  start_product([=, &d] {
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    float rows[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        rows[half][k] = described<T>(a, across_a, warp * 16 + lane / 4 + 8 * half, k);
      }
    }
    multiply_lines<T>(d, rows, b, across_b, add);
  });
}

template <class T, bool kAcrossA, bool kAcrossB, int kSums>
inline void wgmma(float (&d)[kSums], uint64_t a, uint64_t b) {
  wgmma_described<T>(d, a, b, kAcrossA, kAcrossB, true);
}

template <class T, int kSums>
inline void wgmma_scores(float (&d)[kSums], uint64_t a, uint64_t b, bool add) {
  wgmma_described<T>(d, a, b, false, false, add);
}

// The registers of a are exchanged at the start; that they must not change before the wait is not seen.
template <class T, int kSums>
inline void wgmma_values(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  struct Lines {
    float of[2][16];
  } lines;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const auto given = host_cuda::give(a[i]);
    for (int t = 0; t < 4; ++t) {
      for (int half = 0; half < 2; ++half) {
        lines.of[i % 2][i / 2 * 8 + t * 2 + half] = half_of<T>(given[lane / 4 * 4 + t], half);
      }
    }
  }
  start_product([=, &d] { multiply_lines<T>(d, lines.of, b, true, true); });
}

}  // namespace cuda
}  // namespace fastattn
