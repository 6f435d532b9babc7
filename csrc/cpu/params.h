// What travels from csrc/ops to a kernel: one plain struct per operation and direction. Raw pointers, strides in elements.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kBool };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The dtype of statistics and accumulators.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulate<T>::type;

// A half-open range of work items; what an item is, each kernel says.
struct Range {
  int64_t begin, end;
};

// Dropout (docs/numerics.md): element (row, column) of a call is dropped iff its Philox word is below `threshold` = round(p * 2^32);
// what is kept is multiplied by `scale` = 1 / (1 - p). threshold == 0 means no dropout.
struct Dropout {
  uint64_t seed = 0;
  uint32_t offset = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

// y[b,h,n,:] = x[b,h,n,:] with the first 2*half_dim channels rotated by the angles of row n. Work item: (b, h, n) flattened.
struct RopeParams {
  DType dtype;
  int64_t batch, heads, rows, head_dim, half_dim;
  const void* x;  // (batch, heads, rows, head_dim), last stride 1
  int64_t x_stride[3];
  void* y;  // same shape, own strides
  int64_t y_stride[3];
  const void *cos, *sin;  // (1 | batch, rows, half_dim) in the accumulation dtype, contiguous; batch stride 0 if shared
  int64_t angle_stride_batch;
  bool interleaved;  // pairs (2i, 2i+1) instead of (i, i + half_dim)
  bool conjugate;    // rotate by the negative angle: the gradient
};

// c (M, N) (+)= a (M, K) · b through the micro-kernel, for tests and tuning: b is (K, N), or (N, K) if transposed. a is
// in the operand dtype's storage (rounded to `dtype`), c in the accumulation dtype.
struct GemmParams {
  DType dtype;
  int64_t M, N, K, lda, ldb, ldc;
  const void *a, *b;
  void* c;
  bool transposed, accumulate;
  int64_t repeats;  // products after one packing
};

}  // namespace fastattn
