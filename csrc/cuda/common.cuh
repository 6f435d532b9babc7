// What every row-wise kernel needs: 16-byte access to a row, sums over the threads of a row, dropout's random words.
//
// All of it is arithmetic, intrinsics and __syncthreads, so that tests/cuda/host_cuda.h can compile and run it on a
// CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastattn {
namespace cuda {

#include "cpu/convert-inl.h"

#if defined(__CUDACC__)
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, double* out) { *out = x; }
__device__ inline void narrow(double x, float* out) { *out = static_cast<float>(x); }
__device__ inline void narrow(float x, Half* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void narrow(float x, BFloat16* out) { out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
template <class T>
inline Acc<T> widen(T x) {
  return to_acc(x);
}
template <class A, class T>
inline void narrow(A x, T* out) {
  *out = from_acc<T>(x);
}
#endif

// A kernel's dynamic shared memory, left in its PTX as a comment (no instruction) where tests/cuda/compiled.py holds it
// against what the device has.
template <int kBytes>
__device__ inline void note_dynamic_shared() {
#if defined(__CUDA_ARCH__)
  asm volatile("// dynamic shared memory: %0 bytes" ::"n"(kBytes));
#endif
}

// 16 bytes of a row: what one memory instruction moves.
template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Elements [i, i + kSize) of a row of n. `aligned`: the row starts at a multiple of 16 bytes and n is a multiple of
// kSize; otherwise element by element. What lies beyond n loads as zero.
template <class T>
__device__ inline Packed<T> load_packed(const T* row, int i, int n, bool aligned) {
  Packed<T> x = {};
  if (aligned) {
    if (i < n) x = *reinterpret_cast<const Packed<T>*>(row + i);
  } else {
#pragma unroll
    for (int e = 0; e < Packed<T>::kSize; ++e) {
      if (i + e < n) x.value[e] = row[i + e];
    }
  }
  return x;
}

template <class T>
__device__ inline void store_packed(const Packed<T>& x, T* row, int i, int n, bool aligned) {
  if (aligned) {
    if (i < n) *reinterpret_cast<Packed<T>*>(row + i) = x;
  } else {
#pragma unroll
    for (int e = 0; e < Packed<T>::kSize; ++e) {
      if (i + e < n) row[i + e] = x.value[e];
    }
  }
}

// Whether all rows of a tensor of 16-bit values begin at multiples of 16 bytes.
inline bool rows_aligned(const void* data, const int64_t* stride, int strides) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < strides; ++i) aligned = aligned && stride[i] % 8 == 0;
  return aligned;
}

// Where chunk `chunk` (of 16 bytes, kChunks to a row) of row `row` lies in a tile of shared memory, in chunks. Eight
// consecutive rows at one chunk, and eight neighbouring chunks of one row, are in different banks.
template <int kChunks>
__host__ __device__ inline int swizzled_chunk(int row, int chunk) {
  static_assert(kChunks % 4 == 0, "rows of multiples of 64 bytes");
  return row * kChunks + (kChunks % 8 == 0 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4));
}

// out[e] = values[i + e] for e in [0, kCount), widened; zero beyond n.
template <int kCount, class W, class A>
__device__ inline void load_widened(const W* values, int i, int n, bool aligned, A* out) {
  if constexpr (kCount % Packed<W>::kSize == 0) {
#pragma unroll
    for (int part = 0; part < kCount; part += Packed<W>::kSize) {
      const Packed<W> x = load_packed(values, i + part, n, aligned);
#pragma unroll
      for (int e = 0; e < Packed<W>::kSize; ++e) out[part + e] = static_cast<A>(widen(x.value[e]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = i + e < n ? static_cast<A>(widen(values[i + e])) : A(0);
  }
}

// x[v] becomes its sum over the kThreads threads of a row, in every one of them and in the same order. kThreads is 32
// (a warp to a row), or the whole block: then every thread of the block must call, with kValues * kThreads / 32 values
// of shared memory as `scratch`.
template <int kThreads, int kValues, class A>
__device__ inline void row_sum(A (&x)[kValues], A* scratch) {
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x[v] += __shfl_xor_sync(0xffffffffu, x[v], distance);
  }
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) scratch[v * kWarps + threadIdx.x / 32] = x[v];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      x[v] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x[v] += scratch[v * kWarps + w];
    }
    __syncthreads();
  }
}

// Philox-4x32-10 as in cpu/philox-inl.h: the four words of counter (c0, c1, c2, c3).
__device__ inline void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t (&words)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u,
                   product2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product2);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// factor[e] = scale or 0 for columns [i, i + kCount) of a matrix's row; i is a multiple of kCount, kCount divides or is
// divided by 4.
template <int kCount, class A>
__device__ inline void dropout_factors(const Dropout& dropout, int64_t row, int i, A (&factor)[kCount]) {
  const uint32_t y = static_cast<uint32_t>(row), z = static_cast<uint32_t>(row >> 32);
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    uint32_t words[4];
    philox(dropout.seed, static_cast<uint32_t>((i + e) / 4), y, z, dropout.offset, words);
#pragma unroll
    for (int w = 0; w < 4 && e + w < kCount; ++w) {
      const uint32_t word = kCount < 4 && i % 4 != 0 ? words[(w + 2) % 4] : words[w];
      factor[e + w] = word >= dropout.threshold ? static_cast<A>(dropout.scale) : A(0);
    }
  }
}

}  // namespace cuda
}  // namespace fastattn
