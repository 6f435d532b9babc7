// The running softmax of the two lines of a lane (attention_score.cuh says which): maximum, sum, and what they do to
// the weighted sums of values.
#pragma once

#include "cuda/attention_score.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

// Over the four lanes of a line.
template <class F>
__device__ inline float quad_reduce(float x, const F& f) {
  x = f(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return f(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Two values as the halves of a register, the first in the lower.
template <class T>
__device__ inline uint32_t pack_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  T values[2];
  narrow(first, values), narrow(second, values + 1);
  return values[0].bits | static_cast<uint32_t>(values[1].bits) << 16;
#endif
}

// m: largest score so far; l: sum of 2^(unit (s - m)) over the lane's own keys.
struct SoftmaxState {
  float m[2] = {kHidden, kHidden}, l[2] = {0, 0};

  // s becomes 2^(unit (s - m)) for the new m; `factor`: what the sums of values before it are to be multiplied by.
  template <int kCount>
  __device__ void step(float (&s)[kCount], float unit, float (&factor)[2]) {
    float top[2] = {m[0], m[1]}, base[2], sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      top[line] = quad_reduce(top[line], [](float x, float y) { return fmaxf(x, y); });
      base[line] = top[line] == kHidden ? 0.0f : top[line] * unit;
      factor[line] = exp2_fast(fmaf(m[line], unit, -base[line]));
      m[line] = top[line];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = exp2_fast(fmaf(s[i], unit, -base[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int line = 0; line < 2; ++line) l[line] = fmaf(l[line], factor[line], sum[line]);
  }

  // After the last key: `factor` makes results of the sums of values, `lse` is natural; a line that saw nothing gives
  // zeros and -inf. A sink is a score without a value; null: none.
  __device__ void finish(float unit, const float* (&sink)[2], float (&factor)[2], float (&lse)[2]) {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      float total = quad_reduce(l[line], [](float x, float y) { return x + y; });
      const float seen = m[line] == kHidden ? kHidden : m[line] * unit;
      float top = seen;
      if (sink[line] != nullptr) top = fmaxf(top, *sink[line] * kLog2E);
      const float rescale = seen == kHidden ? 0.0f : exp2_fast(seen - top);
      total *= rescale;
      if (sink[line] != nullptr && top != kHidden) total += exp2_fast(*sink[line] * kLog2E - top);
      const bool empty = top == kHidden;
      factor[line] = empty ? 0.0f : rescale / total;
      lse[line] = empty ? kHidden : fmaf(kLn2, top, logf(total));
    }
  }
};

// Elements of a fragment times a factor of their line.
template <int kCount>
__device__ inline void scale_lines(float (&x)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor[i / 2 % 2];
}

// Four lanes, kStride apart, turn over a 4 x 4 matrix of which each has a row. Those of a line (1): a lane's pairs of
// four groups of eight columns, x[j] of columns 8 j + 2 t, become the eight columns of group t.
template <int kStride = 1>
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = (threadIdx.x & (distance * kStride)) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & distance) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? x[j] : x[j + distance], distance * kStride);
      if (upper) {
        x[j] = received;
      } else {
        x[j + distance] = received;
      }
    }
  }
}

// A line's results, each lane the eight channels of every fourth group.
template <class T, int kCount>
__device__ inline void store_line(const float (&acc)[kCount], int line, float factor, bool inside, T* out, int channels,
                                  bool aligned) {
#pragma unroll
  for (int group = 0; group < kCount / 4; group += 4) {
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = (group + j) * 4 + line * 2;
      x[j] = pack_pair<T>(acc[at] * factor, acc[at + 1] * factor);
    }
    transpose_quad(x);
    Packed<T> eight;
    memcpy(&eight, x, sizeof eight);
    if (inside) store_packed(eight, out, (group + static_cast<int>(threadIdx.x % 4)) * 8, channels, aligned);
  }
}

}  // namespace cuda
}  // namespace fastattn
