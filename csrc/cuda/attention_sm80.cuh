// What the attention kernels on mma.sync (sm_80, 86, 89, 120; on sm_90 for calls that its own kernels do not take)
// share: tiles in shared memory, the products of fragments, and values that are not finite.
//
// A tile is kRows rows of kD channels of 16 bits, filled by cp.async, zero beyond a tensor's extents, in 16-byte chunks
// swizzled so that ldmatrix has no bank conflicts. A warp multiplies 16 lines with all rows of a tile:
//
//   multiply_rows     s += a tileᵀ   the lines' channels with the tile's
//   multiply_columns  d += s tile    s of the product before, rounded to 16 bits in registers
//
// Fragments of s are those of attention_score.cuh; lines are rows of q, or keys in the transposed products of backward.
#pragma once

#include "cuda/attention_softmax.cuh"

namespace fastattn {
namespace cuda {

template <class T, int kRows, int kD>
struct Tile {
  static constexpr int kChunks = kD / 8, kBytes = kRows * kD * 2;

  static __host__ __device__ int offset(int row, int chunk) { return swizzled_chunk<kChunks>(row, chunk) * 16; }

  // Starts the copies of all kThreads threads: row(r) is where row r begins, or null; `x` is any row that exists.
  template <int kThreads, class Row>
  static __device__ void load(char* tile, const T* x, const Row& row, int64_t channels, bool aligned) {
    constexpr int kCopies = kRows * kChunks;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kCopies; i += kThreads) {
      const int r = i / kChunks, chunk = i % kChunks;
      const T* from = row(r);
      const int left = from == nullptr ? 0 : static_cast<int>(channels) - chunk * 8;
      const int count = left <= 0 ? 0 : left < 8 ? left : 8;
      char* to = tile + offset(r, chunk);
      if (aligned) {
        cp_async16(to, count > 0 ? from + chunk * 8 : x, count * 2);
      } else {
        Packed<T> value = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < count) value.value[e] = from[chunk * 8 + e];
        }
        *reinterpret_cast<Packed<T>*>(to) = value;
      }
    }
  }

  // Channels [16 step, 16 step + 16) of lines [line, line + 16), as a left operand.
  static __device__ void lines(const char* tile, int line, int step, uint32_t (&a)[4]) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + offset(line + lane % 16, 2 * step + lane / 16));
  }
};

// s += a rowsᵀ, for kSlices slices of 16 lines from `line` on of the tile that `a` lies in.
template <class T, int kD, int kLines, int kRows, int kSlices>
__device__ inline void multiply_rows(const char* a_tile, int line, const char* rows, float (&s)[kSlices][kRows / 2]) {
  using A = Tile<T, kLines, kD>;
  using B = Tile<T, kRows, kD>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[kSlices][4];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) A::lines(a_tile, line + 16 * slice, step, a[slice]);
#pragma unroll
    for (int pair = 0; pair < kRows / 16; ++pair) {
      uint32_t b[4];
      ldmatrix_x4(b, rows + B::offset(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(s[slice][8 * pair]), a[slice], left);
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(s[slice][8 * pair + 4]), a[slice], right);
      }
    }
  }
}

// d += s rows
template <class T, int kD, int kRows, int kSlices>
__device__ inline void multiply_columns(const float (&s)[kSlices][kRows / 2], const char* rows,
                                        float (&d)[kSlices][kD / 2]) {
  using B = Tile<T, kRows, kD>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    uint32_t a[kSlices][4];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[slice][i] = pack_pair<T>(s[slice][8 * step + 2 * i], s[slice][8 * step + 2 * i + 1]);
    }
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, rows + B::offset(16 * step + lane % 16, 2 * pair + lane / 16));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(d[slice][8 * pair]), a[slice], left);
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(d[slice][8 * pair + 4]), a[slice], right);
      }
    }
  }
}

template <class T>
__host__ __device__ inline bool is_finite_pair(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7f80u : 0x7c00u;
  return (pair & kExponent) != kExponent && (pair >> 16 & kExponent) != kExponent;
}

// Rows of a tile, one bit each.
using RowBits = uint64_t;

// In a product 0 · NaN is NaN, so a row that a line does not see would reach it. Rows of a tile with a NaN or an
// infinity become zeros, and lines that do see such a row are to become NaN (poison_lines). All threads of the block
// call once the tile has arrived, and all get the same. `words`: one of shared memory for each warp.
template <class T, int kRows, int kD, int kThreads>
__device__ inline RowBits clear_broken(char* tile, uint32_t* words) {
  static_assert((kRows == 16 || kRows == 32 || kRows == 64) && kThreads % kRows == 0,
                "a warp reads 32 rows, or 16 twice");
  constexpr int kParts = kThreads / kRows;
  const int row = threadIdx.x % kRows, part = threadIdx.x / kRows;
  bool finite = true;
  for (int chunk = part; chunk < kD / 8; chunk += kParts) {
    uint32_t x[4];
    memcpy(x, tile + Tile<T, kRows, kD>::offset(row, chunk), sizeof x);
#pragma unroll
    for (int i = 0; i < 4; ++i) finite = finite && is_finite_pair<T>(x[i]);
  }
  uint32_t votes = __ballot_sync(0xffffffffu, !finite);
  if constexpr (kRows == 16) votes = (votes | votes >> 16) & 0xffffu;
  if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = votes;
  __syncthreads();
  RowBits broken = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) broken |= static_cast<RowBits>(words[warp]) << warp * 32 % kRows;
  if (broken == 0) return broken;
  for (int chunk = part; chunk < kD / 8; chunk += kParts) {
    if (broken >> row & 1) memset(tile + Tile<T, kRows, kD>::offset(row, chunk), 0, 16);
  }
  __syncthreads();
  return broken;
}

// The sums d of lines with a weight on a broken row become NaN.
template <int kRows, int kCount>
__device__ inline void poison_lines(const float (&weight)[kRows / 2], RowBits broken, float (&d)[kCount]) {
  broken >>= threadIdx.x % 4 * 2;
  bool poisoned[2] = {false, false};
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    if ((broken >> (i / 4 * 8 + i % 2) & 1) != 0 && weight[i] != 0) poisoned[i / 2 % 2] = true;
  }
  float add[2];
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    add[line] = quad_reduce(poisoned[line] ? NAN : 0.0f, [](float x, float y) { return x + y; });
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] += add[i / 2 % 2];
}

}  // namespace cuda
}  // namespace fastattn
