// Layer and RMS normalization on CUDA: the kernels and how they are launched. Formulas in cpu/norm-inl.h, contract in
// cpu/params.h.
//
// Rows have fewer than 2^31 - 2^16 columns. A row belongs to a group of threads: a warp (four rows to a block), a
// block, or on sm_90 a cluster of blocks. Thread t holds the 16-byte vectors t, t + threads, ... of it in registers
// (Group::kVectors of them), so that memory is read once; rows too long for that are read again per pass (from L2,
// mostly). Every sum has a fixed order: results do not depend on the run.
//
//   a row's bytes, forward    up to 2 KiB   8 KiB   32 KiB   256 KiB (sm_90)   beyond
//                 backward          1       4       16       128
//   group                     32 threads    128     512      2, 4 or 8 x 512   512, rows not kept
//
// The weight gradients are summed per chunk of rows in registers, and over the chunks by a second kernel, which on
// sm_90 starts while the first runs out. (The last block of the first could do it alone, but one multiprocessor reads
// the 256 chunks' sums for longer than a launch takes, and its counter of blocks would have to be set to zero by a
// launch too.)
#pragma once

#include "cuda/common.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

// kVectors == 0: any number, not kept. kClustered: kThreads of every block of a cluster.
template <int kThreadsInGroup, int kVectorsInThread, bool kOfCluster = false>
struct Group {
  static constexpr int kThreads = kThreadsInGroup, kVectors = kVectorsInThread;
  static constexpr bool kClustered = kOfCluster;
  static constexpr int kBlock = kThreads < 128 ? 128 : kThreads, kInBlock = kBlock / kThreads;
  static constexpr int kKept = kVectors > 0 ? kVectors : 1;
  // Values of shared memory: two sums of each warp, two of the block for the cluster, twice.
  static constexpr int kWarpSums = kThreads > 32 ? 2 * kThreads / 32 : 0, kShared = kWarpSums + (kClustered ? 4 : 0);
};

constexpr int kForwardVectors = 4, kBackwardVectors = 2, kMostThreads = 512;

// f(Group) for rows of `vectors` 16-byte vectors, the fewest threads that hold them.
template <int kVectors, class F>
inline void choose_group(int64_t vectors, F&& f) {
  if (vectors <= 32 * kVectors) {
    f(Group<32, kVectors>{});
  } else if (vectors <= 128 * kVectors) {
    f(Group<128, kVectors>{});
  } else if (vectors <= kMostThreads * kVectors) {
    f(Group<kMostThreads, kVectors>{});
  } else {
    f(Group<kMostThreads, 0>{});
  }
}

// Blocks of the smallest cluster that holds such a row and that one block does not; 0 if there is none.
inline int norm_cluster(int64_t columns, int element_size, int vectors) {
  const int64_t row = (columns * element_size + 15) / 16, block = kMostThreads * vectors;
  if (row <= block) return 0;
  for (int blocks : {2, 4, 8}) {
    if (row <= blocks * block) return blocks;
  }
  return 0;
}

// The thread among those of its row, and the row's group among those of the grid.
template <class G>
struct Place {
  int thread, threads;
  int64_t group, groups;
};

template <class G>
__device__ inline Place<G> place_of_thread() {
  if constexpr (G::kClustered) {
    const int rank = cluster_rank(), blocks = cluster_blocks();
    return {rank * G::kThreads + static_cast<int>(threadIdx.x), blocks * G::kThreads, blockIdx.x / blocks,
            gridDim.x / blocks};
  } else {
    return {static_cast<int>(threadIdx.x) % G::kThreads, G::kThreads,
            static_cast<int64_t>(blockIdx.x) * G::kInBlock + threadIdx.x / G::kThreads,
            static_cast<int64_t>(gridDim.x) * G::kInBlock};
  }
}

// Sums over the threads of a row, each in every thread and in the same order.
template <class G, class A>
class GroupSum {
 public:
  __device__ GroupSum() : scratch_(reinterpret_cast<A*>(dynamic_shared())) {
    note_dynamic_shared<G::kShared* static_cast<int>(sizeof(A))>();
  }

  // The blocks of a cluster read each other's sums. What they read stays until the next but one sum, which no block
  // begins before all have come to the next: two places suffice.
  template <int kValues>
  __device__ void operator()(A (&x)[kValues]) {
    static_assert(kValues <= 2, "Group::kShared");
    row_sum<G::kThreads>(x, scratch_);
    if constexpr (G::kClustered) {
      A* own = scratch_ + G::kWarpSums + 2 * turn_;
      turn_ ^= 1;
      if (threadIdx.x == 0) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) own[v] = x[v];
      }
      cluster_sync();
#pragma unroll
      for (int v = 0; v < kValues; ++v) x[v] = 0;
      for (int rank = 0; rank < cluster_blocks(); ++rank) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) x[v] += cluster_load(own + v, rank);
      }
    }
  }

  // Before a block ends: others may still read its shared memory.
  __device__ void leave() const {
    if constexpr (G::kClustered) cluster_sync();
  }

 private:
  A* scratch_;
  int turn_ = 0;
};

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
  const Place<G> place = place_of_thread<G>();
  const int n = static_cast<int>(p.columns), step = place.threads * kSize, first = place.thread * kSize;
  const int passes = G::kVectors > 0 ? G::kVectors : (n + step - 1) / step;
  GroupSum<G, A> group_sum;
  for (int64_t row = place.group; row < p.rows; row += place.groups) {
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
      group_sum(sum);
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
    group_sum(deviations);
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
  group_sum.leave();
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
  let_next_grid_start();
  const Place<G> place = place_of_thread<G>();
  const int n = static_cast<int>(p.columns), step = place.threads * kSize, first = place.thread * kSize;
  const int passes = G::kVectors > 0 ? G::kVectors : (n + step - 1) / step;
  GroupSum<G, A> group_sum;
  const int64_t chunk = place.group, row_begin = chunk * p.chunk_rows;
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
    group_sum(sum);
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
  group_sum.leave();
}

// out[column] = Σ_chunks partial[chunk][column]: 32 threads to a column, each every 32nd chunk, then those 32 sums in
// order. The blocks of the second result, if there is one, follow those of the first.
template <class A, class W>
__global__ void __launch_bounds__(1024)
    norm_reduce_kernel(const A* first, const A* second, int64_t chunks, int64_t n, W* first_out, W* second_out) {
  const int64_t blocks = (n + 31) / 32;
  const bool of_first = blockIdx.x < blocks;
  const A* partial = of_first ? first : second;
  const int64_t column = (of_first ? blockIdx.x : blockIdx.x - blocks) * 32 + threadIdx.x % 32;
  const int part = threadIdx.x / 32;
  __shared__ A part_sum[32][33];
  A sum = 0;
  wait_for_previous_grid();
  for (int64_t chunk = part; chunk < chunks && column < n; chunk += 32) sum += partial[chunk * n + column];
  part_sum[part][threadIdx.x % 32] = sum;
  __syncthreads();
  if (part == 0 && column < n) {
    for (int other = 1; other < 32; ++other) sum += part_sum[other][threadIdx.x];
    narrow(sum, (of_first ? first_out : second_out) + column);
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether 16-byte accesses are possible throughout.
inline bool is_aligned(const NormForwardParams& p, int64_t size) {
  return p.columns % size == 0 && p.x_stride % size == 0 && p.residual_stride % size == 0 && is_aligned(p.x) &&
         is_aligned(p.residual) && is_aligned(p.weight) && is_aligned(p.bias) && is_aligned(p.y) && is_aligned(p.h);
}
inline bool is_aligned(const NormBackwardParams& p, int64_t size) {
  return p.columns % size == 0 && p.dy_stride % size == 0 && p.dh_stride % size == 0 && p.h_stride % size == 0 &&
         is_aligned(p.dy) && is_aligned(p.dh) && is_aligned(p.h) && is_aligned(p.weight) && is_aligned(p.dh_total) &&
         is_aligned(p.dx);
}

// Rows of a chunk, a function of the shape alone: 256 blocks' worth of groups, which fill the largest device and leave
// few partial sums.
inline int64_t norm_chunk_rows(int64_t rows, int64_t columns, int element_size) {
  int64_t groups = 256;
  choose_group<kBackwardVectors>((columns * element_size + 15) / 16,
                                 [&](auto group) { groups *= decltype(group)::kInBlock; });
  return std::max<int64_t>((rows + groups - 1) / groups, 1);
}

// `groups` of G, each of `cluster` blocks if G is clustered.
template <class G, class A>
inline LaunchConfig norm_config(int64_t groups, int cluster = 1) {
  LaunchConfig config;
  config.blocks_x = std::min<int64_t>((groups + G::kInBlock - 1) / G::kInBlock, INT32_MAX / 8) * cluster;
  config.threads = G::kBlock, config.shared = G::kShared * static_cast<int64_t>(sizeof(A)), config.cluster = cluster;
  return config;
}

template <class Launch>
inline void launch_norm_forward(const NormForwardParams& p, const Launch& launch) {
  if (p.rows == 0 || p.columns == 0) return;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kSize = Packed<T>::kSize;
    choose_group<kForwardVectors>((p.columns + kSize - 1) / kSize, [&](auto group) {
      using G = decltype(group);
      launch("norm_forward", norm_forward_kernel<T, G>, norm_config<G, Acc<T>>(p.rows), p, is_aligned(p, kSize));
    });
  });
}

// The same by clusters of `blocks` (norm_cluster with kForwardVectors).
template <class Launch>
inline void launch_norm_forward_in_clusters(const NormForwardParams& p, int blocks, const Launch& launch) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using G = Group<kMostThreads, kForwardVectors, true>;
    const LaunchConfig config = norm_config<G, Acc<T>>(p.rows, blocks);
    launch("norm_forward", norm_forward_kernel<T, G>, config, p, is_aligned(p, Packed<T>::kSize));
  });
}

inline int64_t norm_chunks(const NormBackwardParams& p) { return (p.rows + p.chunk_rows - 1) / p.chunk_rows; }

// p.chunk_rows is norm_chunk_rows'.
template <class Launch>
inline void launch_norm_backward(const NormBackwardParams& p, const Launch& launch) {
  if (p.rows == 0 || p.columns == 0) return;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kSize = Packed<T>::kSize;
    choose_group<kBackwardVectors>((p.columns + kSize - 1) / kSize, [&](auto group) {
      using G = decltype(group);
      const LaunchConfig config = norm_config<G, Acc<T>>(norm_chunks(p));
      launch("norm_backward", norm_backward_kernel<T, G>, config, p, is_aligned(p, kSize));
    });
  });
}

// The same by clusters of `blocks` (norm_cluster with kBackwardVectors).
template <class Launch>
inline void launch_norm_backward_in_clusters(const NormBackwardParams& p, int blocks, const Launch& launch) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using G = Group<kMostThreads, kBackwardVectors, true>;
    const LaunchConfig config = norm_config<G, Acc<T>>(norm_chunks(p), blocks);
    launch("norm_backward", norm_backward_kernel<T, G>, config, p, is_aligned(p, Packed<T>::kSize));
  });
}

// What follows either: the chunks' sums, added up. `overlapped`: runs_sm90.
template <class Launch>
inline void launch_norm_reduce(const NormBackwardParams& p, bool overlapped, const Launch& launch) {
  const bool both = p.dweight != nullptr && p.dbias != nullptr;
  if (p.columns == 0 || (p.dweight == nullptr && p.dbias == nullptr)) return;
  LaunchConfig config;
  config.blocks_x = (p.columns + 31) / 32 * (both ? 2 : 1), config.threads = 1024, config.overlapped = overlapped;
  const void* partial = p.dweight != nullptr ? p.partial_dweight : p.partial_dbias;
  void* out = p.dweight != nullptr ? p.dweight : p.dbias;
  dispatch(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    const auto reduce = [&](auto* of) {
      using W = std::remove_pointer_t<decltype(of)>;
      launch("norm_reduce", norm_reduce_kernel<A, W>, config, static_cast<const A*>(partial),
             static_cast<const A*>(p.partial_dbias), norm_chunks(p), p.columns, static_cast<W*>(out),
             static_cast<W*>(p.dbias));
    };
    if (p.weight_dtype == kDTypeOf<T>) {
      reduce(static_cast<T*>(nullptr));
    } else {
      reduce(static_cast<float*>(nullptr));
    }
  });
}

}  // namespace cuda
}  // namespace fastattn
