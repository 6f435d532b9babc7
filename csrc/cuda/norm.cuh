// Layer and RMS normalization on CUDA: the kernels and how they are launched. Formulas in cpu/norm-inl.h, contract in
// cpu/params.h.
//
// Rows have fewer than 2^31 - 2^16 columns. A row belongs to a group of threads: a warp (four rows to a block) or a
// block. Thread t holds the 16-byte vectors t, t + kThreads, ... of it in registers (Group::kVectors of them), so that
// memory is read once; rows too long for that are read again per pass (from L2, mostly). Every sum has a fixed order:
// results do not depend on the run.
#pragma once

#include "cuda/common.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// kVectors == 0: any number, not kept.
template <int kThreadsInGroup, int kVectorsInThread>
struct Group {
  static constexpr int kThreads = kThreadsInGroup, kVectors = kVectorsInThread;
  static constexpr int kBlock = kThreads < 128 ? 128 : kThreads, kInBlock = kBlock / kThreads;
  static constexpr int kKept = kVectors > 0 ? kVectors : 1;
};

// f(Group) for rows of `vectors` 16-byte vectors, the fewest threads that hold them.
template <int kVectors, class F>
inline void choose_group(int64_t vectors, F&& f) {
  if (vectors <= 32 * kVectors) {
    f(Group<32, kVectors>{});
  } else if (vectors <= 128 * kVectors) {
    f(Group<128, kVectors>{});
  } else if (vectors <= 512 * kVectors) {
    f(Group<512, kVectors>{});
  } else {
    f(Group<512, 0>{});
  }
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float>    ? DType::kFloat32
                           : std::is_same_v<T, double> ? DType::kFloat64
                           : std::is_same_v<T, Half>   ? DType::kFloat16
                                                       : DType::kBFloat16;

// The parameters of one vector of columns: `fill` where there are none. They come in T or in float32.
template <class T, class A>
__device__ inline void load_parameters(const void* values, DType dtype, A fill, int i, int n, bool aligned, A* out) {
  constexpr int kSize = Packed<T>::kSize;
  if (values == nullptr) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) out[e] = fill;
  } else if (dtype == kDTypeOf<T>) {
    load_widened<kSize>(static_cast<const T*>(values), i, n, aligned, out);
  } else {
    load_widened<kSize>(static_cast<const float*>(values), i, n, aligned, out);
  }
}

template <class T, class G>
__global__ void __launch_bounds__(G::kBlock, 1) norm_forward_kernel(NormForwardParams p, bool aligned) {
  using A = Acc<T>;
  constexpr int kSize = Packed<T>::kSize;
  const int n = static_cast<int>(p.columns), step = G::kThreads * kSize, first = threadIdx.x % G::kThreads * kSize;
  const int passes = G::kVectors > 0 ? G::kVectors : (n + step - 1) / step;
  int64_t row = static_cast<int64_t>(blockIdx.x) * G::kInBlock + threadIdx.x / G::kThreads;
  for (; row < p.rows; row += static_cast<int64_t>(gridDim.x) * G::kInBlock) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* h = p.h != nullptr ? static_cast<T*>(p.h) + row * n : nullptr;
    Packed<T> kept[G::kKept];
    A sum[1] = {0};
#pragma unroll
    for (int k = 0; k < passes; ++k) {
      const int i = first + k * step;
      Packed<T> value = load_packed(x, i, n, aligned);
      if (h != nullptr) {
        A factor[kSize];
        if (p.dropout.threshold > 0) dropout_factors<kSize>(p.dropout, row, i, factor);
        Packed<T> addend = {};
        if (p.residual != nullptr) {
          addend = load_packed(static_cast<const T*>(p.residual) + row * p.residual_stride, i, n, aligned);
        }
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A dropped = p.dropout.threshold > 0 ? widen(value.value[e]) * factor[e] : widen(value.value[e]);
          narrow(dropped + widen(addend.value[e]), &value.value[e]);
        }
        store_packed(value, h, i, n, aligned);
      }
      if constexpr (G::kVectors > 0) kept[k] = value;
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum[0] += widen(value.value[e]);
    }
    const T* source = h != nullptr ? h : x;
    A mean = 0;
    if (!p.rms) {
      row_sum<G::kThreads>(sum);
      mean = sum[0] / static_cast<A>(n);
    }
    // The deviations would add up to zero for an exact mean: they correct it.
    A deviations[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < passes; ++k) {
      const int i = first + k * step;
      const Packed<T> value = G::kVectors > 0 ? kept[G::kVectors > 0 ? k : 0] : load_packed(source, i, n, aligned);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A d = i + e < n ? widen(value.value[e]) - mean : A(0);
        deviations[0] += d;
        deviations[1] += d * d;
      }
    }
    row_sum<G::kThreads>(deviations);
    const A error = p.rms ? A(0) : deviations[0] / static_cast<A>(n);
    mean += error;
    const A variance = deviations[1] / static_cast<A>(n) - error * error;
    const A rstd = A(1) / sqrt(variance + static_cast<A>(p.eps));
    if (first == 0) {
      if (!p.rms) static_cast<A*>(p.mean)[row] = mean;
      static_cast<A*>(p.rstd)[row] = rstd;
    }
    T* y = static_cast<T*>(p.y) + row * n;
#pragma unroll
    for (int k = 0; k < passes; ++k) {
      const int i = first + k * step;
      Packed<T> value = G::kVectors > 0 ? kept[G::kVectors > 0 ? k : 0] : load_packed(source, i, n, aligned);
      A weight[kSize], bias[kSize];
      load_parameters<T>(p.weight, p.weight_dtype, A(1), i, n, aligned, weight);
      load_parameters<T>(p.bias, p.weight_dtype, A(0), i, n, aligned, bias);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        narrow((widen(value.value[e]) - mean) * rstd * weight[e] + bias[e], &value.value[e]);
      }
      store_packed(value, y, i, n, aligned);
    }
  }
}

template <int kSize, class A>
__device__ inline void store_sums(const A (&sums)[kSize], A* line, int i, int n) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    if (i + e < n) line[i + e] = sums[e];
  }
}

// A group takes the rows of one chunk, and keeps its columns' sums in registers over them (in its line of the partial
// sums where rows are not kept).
template <class T, class G>
__global__ void __launch_bounds__(G::kBlock, 1) norm_backward_kernel(NormBackwardParams p, bool aligned) {
  using A = Acc<T>;
  constexpr int kSize = Packed<T>::kSize;
  // 512 threads have 128 registers each: the sums of two vectors, but not the rows too, which the first cache still
  // has.
  constexpr bool kKeeps = G::kVectors > 0 && G::kThreads < 512;
  const int n = static_cast<int>(p.columns), step = G::kThreads * kSize, first = threadIdx.x % G::kThreads * kSize;
  const int passes = G::kVectors > 0 ? G::kVectors : (n + step - 1) / step;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * G::kInBlock + threadIdx.x / G::kThreads;
  const int64_t row_begin = chunk * p.chunk_rows;
  const int64_t row_end = row_begin + p.chunk_rows < p.rows ? row_begin + p.chunk_rows : p.rows;
  if (row_begin >= p.rows) return;
  A* dweight = p.partial_dweight != nullptr ? static_cast<A*>(p.partial_dweight) + chunk * n : nullptr;
  A* dbias = p.partial_dbias != nullptr ? static_cast<A*>(p.partial_dbias) + chunk * n : nullptr;
  A weight_sum[G::kKept][kSize] = {}, bias_sum[G::kKept][kSize] = {};
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
    const A mean = p.rms ? A(0) : static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
    Packed<T> kept_dy[kKeeps ? G::kKept : 1], kept_h[kKeeps ? G::kKept : 1];
    A sum[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < passes; ++k) {
      const int i = first + k * step;
      const Packed<T> upstream = load_packed(dy, i, n, aligned), value = load_packed(h, i, n, aligned);
      if constexpr (kKeeps) kept_dy[k] = upstream, kept_h[k] = value;
      A weight[kSize];
      load_parameters<T>(p.weight, p.weight_dtype, A(1), i, n, aligned, weight);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A g = widen(upstream.value[e]) * weight[e];
        sum[0] += g;
        sum[1] += g * (widen(value.value[e]) - mean);
      }
    }
    row_sum<G::kThreads>(sum);
    const A c1 = p.rms ? A(0) : sum[0] / static_cast<A>(n), c2 = sum[1] * rstd / static_cast<A>(n);
#pragma unroll
    for (int k = 0; k < passes; ++k) {
      const int i = first + k * step;
      const int slot = G::kVectors > 0 ? k : 0;
      const Packed<T> upstream = kKeeps ? kept_dy[kKeeps ? slot : 0] : load_packed(dy, i, n, aligned);
      const Packed<T> value = kKeeps ? kept_h[kKeeps ? slot : 0] : load_packed(h, i, n, aligned);
      Packed<T> out = {};
      if (p.dh != nullptr) out = load_packed(static_cast<const T*>(p.dh) + row * p.dh_stride, i, n, aligned);
      A weight[kSize], factor[kSize];
      load_parameters<T>(p.weight, p.weight_dtype, A(1), i, n, aligned, weight);
      if (G::kVectors == 0 && row > row_begin) {
        if (dweight != nullptr) load_widened<kSize>(dweight, i, n, false, weight_sum[0]);
        if (dbias != nullptr) load_widened<kSize>(dbias, i, n, false, bias_sum[0]);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A upstream_e = widen(upstream.value[e]), xhat = (widen(value.value[e]) - mean) * rstd;
        const A before = G::kVectors > 0 || row > row_begin ? weight_sum[slot][e] : A(0);
        weight_sum[slot][e] = before + upstream_e * xhat;
        bias_sum[slot][e] = (G::kVectors > 0 || row > row_begin ? bias_sum[slot][e] : A(0)) + upstream_e;
        narrow(widen(out.value[e]) + rstd * (upstream_e * weight[e] - c1 - xhat * c2), &out.value[e]);
      }
      store_packed(out, static_cast<T*>(p.dh_total) + row * n, i, n, aligned);
      if (p.dropout.threshold > 0) {
        dropout_factors<kSize>(p.dropout, row, i, factor);
#pragma unroll
        for (int e = 0; e < kSize; ++e) narrow(widen(out.value[e]) * factor[e], &out.value[e]);
      }
      if (p.dx != nullptr) store_packed(out, static_cast<T*>(p.dx) + row * n, i, n, aligned);
      if constexpr (G::kVectors == 0) {
        if (dweight != nullptr) store_sums<kSize>(weight_sum[0], dweight, i, n);
        if (dbias != nullptr) store_sums<kSize>(bias_sum[0], dbias, i, n);
      }
    }
  }
  if constexpr (G::kVectors > 0) {
#pragma unroll
    for (int k = 0; k < G::kVectors; ++k) {
      if (dweight != nullptr) store_sums<kSize>(weight_sum[k], dweight, first + k * step, n);
      if (dbias != nullptr) store_sums<kSize>(bias_sum[k], dbias, first + k * step, n);
    }
  }
}

// out[column] = Σ_chunks partial[chunk][column]: 32 threads to a column, each every 32nd chunk, then those 32 sums in
// order.
template <class A, class W>
__global__ void __launch_bounds__(1024) norm_reduce_kernel(const A* partial, int64_t chunks, int64_t n, W* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int part = threadIdx.x / 32;
  __shared__ A part_sum[32][33];
  A sum = 0;
  for (int64_t chunk = part; chunk < chunks && column < n; chunk += 32) sum += partial[chunk * n + column];
  part_sum[part][threadIdx.x % 32] = sum;
  __syncthreads();
  if (part == 0 && column < n) {
    for (int other = 1; other < 32; ++other) sum += part_sum[other][threadIdx.x];
    narrow(sum, out + column);
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Rows of a chunk, a function of the shape alone: 256 blocks' worth of groups, which fill the largest device and leave
// few partial sums.
inline int64_t norm_chunk_rows(int64_t rows, int64_t columns, int element_size) {
  int64_t groups = 256;
  choose_group<2>((columns * element_size + 15) / 16, [&](auto group) { groups *= decltype(group)::kInBlock; });
  return std::max<int64_t>((rows + groups - 1) / groups, 1);
}

template <class Launch>
inline void launch_norm_forward(const NormForwardParams& p, Launch&& launch) {
  if (p.rows == 0 || p.columns == 0) return;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kSize = Packed<T>::kSize;
    const bool aligned = p.columns % kSize == 0 && p.x_stride % kSize == 0 && p.residual_stride % kSize == 0 &&
                         is_aligned(p.x) && is_aligned(p.residual) && is_aligned(p.weight) && is_aligned(p.bias) &&
                         is_aligned(p.y) && is_aligned(p.h);
    choose_group<4>((p.columns + kSize - 1) / kSize, [&](auto group) {
      using G = decltype(group);
      const int64_t blocks = std::min<int64_t>((p.rows + G::kInBlock - 1) / G::kInBlock, INT32_MAX);
      launch("norm_forward", norm_forward_kernel<T, G>, LaunchConfig{blocks, G::kBlock}, p, aligned);
    });
  });
}

// p.chunk_rows is norm_chunk_rows'.
template <class Launch>
inline void launch_norm_backward(const NormBackwardParams& p, Launch&& launch) {
  if (p.columns == 0) return;
  const int64_t chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    constexpr int64_t kSize = Packed<T>::kSize;
    const bool aligned = p.columns % kSize == 0 && p.dy_stride % kSize == 0 && p.dh_stride % kSize == 0 &&
                         p.h_stride % kSize == 0 && is_aligned(p.dy) && is_aligned(p.dh) && is_aligned(p.h) &&
                         is_aligned(p.weight) && is_aligned(p.dh_total) && is_aligned(p.dx);
    if (p.rows > 0) {
      choose_group<2>((p.columns + kSize - 1) / kSize, [&](auto group) {
        using G = decltype(group);
        const int64_t blocks = (chunks + G::kInBlock - 1) / G::kInBlock;
        launch("norm_backward", norm_backward_kernel<T, G>, LaunchConfig{blocks, G::kBlock}, p, aligned);
      });
    }
    const auto reduce = [&](const void* partial, void* out) {
      if (out == nullptr) return;
      const LaunchConfig config{(p.columns + 31) / 32, 1024};
      const A* sums = static_cast<const A*>(partial);
      if (p.weight_dtype == kDTypeOf<T>) {
        launch("norm_reduce", norm_reduce_kernel<A, T>, config, sums, chunks, p.columns, static_cast<T*>(out));
      } else {
        launch("norm_reduce", norm_reduce_kernel<A, float>, config, sums, chunks, p.columns, static_cast<float*>(out));
      }
    };
    reduce(p.partial_dweight, p.dweight);
    reduce(p.partial_dbias, p.dbias);
  });
}

}  // namespace cuda
}  // namespace fastattn
