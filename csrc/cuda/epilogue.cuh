// What follows a matrix product, written once for three ways of computing it: mma.sync and wgmma accumulators before
// they are rounded (finish_tile), and a product in memory, cuBLAS's or the slices of one cut along K (epilogue_kernel).
//
// Forward, with pre = product + bias (and gate likewise):
//   c = pre + residual,   c = dropout(act(pre)),   or with a gate   c = dropout(act(gate) · pre)
// Gradient, from dhidden (the product) and the saved pre, gate; d = dhidden times the dropout factor:
//   dpre = d · act'(pre),   or with a gate   dpre = d · act(gate), dgate = d · pre · act'(gate);   c, for dW, again
// The sums of dpre and dgate over each tile's rows (bias gradients) are taken in the same pass, in float32 before
// rounding and in a fixed order: rows of a thread, of a warp, of the warps of a tile.
//
// A thread finishes kUnit = 8 consecutive columns of a row at a time: 16-byte accesses, two draws of dropout's words.
// Accumulators reach that shape through 4 KiB of shared memory a warp, 16 rows x 64 columns at a time: the code after
// it exists once, however many accumulators a warp has, so a kernel can hold every activation.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Adds (N,) in T to x, nothing if it is null.
template <class T>
__device__ inline void add_columns(const void* values, int column, const GemmCall& p, float (&x)[kUnit]) {
  if (values == nullptr) return;
  const Packed<T> addend = load_packed(static_cast<const T*>(values), column, static_cast<int>(p.N), p.aligned);
#pragma unroll
  for (int e = 0; e < kUnit; ++e) x[e] += widen(addend.value[e]);
}

template <class T>
__device__ inline void store_unit(const float (&x)[kUnit], void* out, int64_t row, int column, const GemmCall& p) {
  if (out == nullptr) return;
  Packed<T> rounded;
#pragma unroll
  for (int e = 0; e < kUnit; ++e) narrow(x[e], &rounded.value[e]);
  store_packed(rounded, static_cast<T*>(out) + row * p.N, column, static_cast<int>(p.N), p.aligned);
}

template <class T>
__device__ inline void load_unit(const void* x, int64_t row, int column, const GemmCall& p, float (&out)[kUnit]) {
  const Packed<T> value = load_packed(static_cast<const T*>(x) + row * p.N, column, static_cast<int>(p.N), p.aligned);
#pragma unroll
  for (int e = 0; e < kUnit; ++e) out[e] = widen(value.value[e]);
}

// Dropout's factors of a unit; a dropped element is zero even where x is not finite.
struct UnitDropout {
  float factor[kUnit];
  bool drops;
  __device__ UnitDropout(const GemmCall& p, int64_t row, int column) : drops(p.dropout.threshold > 0) {
    if (drops) dropout_factors<kUnit>(p.dropout, p.first_row + row, column, factor);
  }
  __device__ void apply(float (&x)[kUnit]) const {
    if (!drops) return;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) x[e] = factor[e] == 0.0f ? 0.0f : x[e] * factor[e];
  }
};

// Sums of a unit's columns over the rows that a thread has finished.
struct UnitSums {
  float pre[kUnit], gate[kUnit];
  __device__ void clear() {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) pre[e] = gate[e] = 0.0f;
  }
};

template <class T>
__device__ inline void finish_store(const GemmCall& p, int64_t slice, int64_t row, int column, float (&x)[kUnit]) {
  if (p.parts != nullptr) {
    float* line = p.parts + (static_cast<int64_t>(slice) * p.M + row) * p.N;
#pragma unroll
    for (int e = 0; e < kUnit; e += 4) {
      const Packed<float> part = {x[e], x[e + 1], x[e + 2], x[e + 3]};
      store_packed(part, line, column + e, static_cast<int>(p.N), p.N % 4 == 0);
    }
    return;
  }
  add_columns<T>(p.bias[0], column, p, x);
  if (p.residual != nullptr) {
    add_columns<T>(static_cast<const T*>(p.residual) + row * p.residual_stride, column, p, x);
  }
  store_unit<T>(x, p.c, row, column, p);
}

template <class T, bool kGated>
__device__ inline void finish_activation(const GemmCall& p, int64_t row, int column, float (&pre)[kUnit],
                                         float (&gate)[kUnit]) {
  float value[kUnit], slope[kUnit];
  add_columns<T>(p.bias[0], column, p, pre);
  store_unit<T>(pre, p.pre, row, column, p);
  if constexpr (kGated) {
    add_columns<T>(p.bias[1], column, p, gate);
    store_unit<T>(gate, p.gate, row, column, p);
    if (p.c == nullptr) return;
    activate(p.activation, gate, value, slope);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) value[e] *= pre[e];
  } else {
    if (p.c == nullptr) return;
    activate(p.activation, pre, value, slope);
  }
  UnitDropout(p, row, column).apply(value);
  store_unit<T>(value, p.c, row, column, p);
}

template <class T>
__device__ inline void finish_activation_grad(const GemmCall& p, int64_t row, int column, float (&d)[kUnit],
                                              UnitSums* sums) {
  float pre[kUnit], gate[kUnit], value[kUnit], slope[kUnit];
  load_unit<T>(p.pre, row, column, p, pre);
  const UnitDropout dropout(p, row, column);
  dropout.apply(d);
  if (p.gate != nullptr) {
    load_unit<T>(p.gate, row, column, p, gate);
    activate(p.activation, gate, value, slope);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float hidden = value[e] * pre[e];
      gate[e] = d[e] * pre[e] * slope[e];
      d[e] *= value[e];
      value[e] = hidden;
      sums->gate[e] += gate[e];
    }
    store_unit<T>(gate, p.dgate, row, column, p);
  } else {
    activate(p.activation, pre, value, slope);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) d[e] *= slope[e];
  }
#pragma unroll
  for (int e = 0; e < kUnit; ++e) sums->pre[e] += d[e];
  store_unit<T>(d, p.dpre, row, column, p);
  if (p.c != nullptr) {
    dropout.apply(value);
    store_unit<T>(value, p.c, row, column, p);
  }
}

template <class T, Epilogue kEpilogue, bool kGated>
__device__ inline void finish_unit(const GemmCall& p, int64_t slice, int64_t row, int column, float (&pre)[kUnit],
                                   float (&gate)[kUnit], UnitSums* sums) {
  if constexpr (kEpilogue == Epilogue::kStore) {
    finish_store<T>(p, slice, row, column, pre);
  } else if constexpr (kEpilogue == Epilogue::kActivation) {
    finish_activation<T, kGated>(p, row, column, pre, gate);
  } else {
    finish_activation_grad<T>(p, row, column, pre, sums);
  }
}

// A warp's staging buffer: 16 rows of 64 columns, or of 32 of the product and 32 of the gate's.
constexpr int kStageRows = 16, kStageFloats = 1024;
constexpr int kWarpStageBytes = kStageFloats * 4;

// Where unit `unit` of row `row` lies in it, in floats. Four rows of accumulator pairs meet different banks.
template <int kColumns>
__host__ __device__ inline int stage_offset(int row, int unit) {
  return row * kColumns + (unit ^ (row % 4)) * kUnit;
}

// Where a tile and its warps are. Warps [warp_row] of one tile column share column sums; `stages` are the buffers of
// all warps of the tile, those of one column side by side.
struct TileContext {
  int64_t row, column;  // of the warp's first accumulator
  int64_t row_block, slice;
  int warp_row, warp_column;
  float* stages;
};

// The column sums of 64 columns at `column` over the rows of the tile, into line row_block of p.dpre_sums,
// p.dgate_sums.
template <int kWarpRows, class Sync>
__device__ inline void store_tile_sums(const GemmCall& p, const TileContext& at, int64_t column, UnitSums& sums,
                                       const Sync& sync) {
  float* first = at.stages + at.warp_column * kWarpRows * kStageFloats;
  const int lane = threadIdx.x % 32;
  float* own = first + at.warp_row * kStageFloats;
  const bool gated = p.gate != nullptr;
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
#pragma unroll
    for (int distance = 8; distance < 32; distance *= 2) {
      sums.pre[e] += __shfl_xor_sync(0xffffffffu, sums.pre[e], distance);
      if (gated) sums.gate[e] += __shfl_xor_sync(0xffffffffu, sums.gate[e], distance);
    }
    if (lane < 8) {
      own[lane * kUnit + e] = sums.pre[e];
      own[64 + lane * kUnit + e] = sums.gate[e];
    }
  }
  sync();
  if (at.warp_row == 0) {
    for (int i = lane; i < (gated ? 128 : 64); i += 32) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarpRows; ++w) total += first[w * kStageFloats + i];
      float* line = static_cast<float*>(i < 64 ? p.dpre_sums : p.dgate_sums) + at.row_block * p.N;
      if (column + i % 64 < p.N) line[column + i % 64] = total;
    }
  }
  sync();
}

// The epilogue of a warp's accumulators, 16 · kSlices rows by 8 · kGroups columns, as both mma.m16n8 and wgmma leave
// them: accumulator(product, slice, group, e), product 1 being the gate's, is column 8 group + 2 (lane % 4) + e % 2 of
// row 16 slice + lane / 4 + 8 (e / 2). kWarpRows warps lie above each other in a tile; sync() is a barrier of all its
// warps.
template <class T, Epilogue kEpilogue, bool kGated, int kSlices, int kGroups, int kWarpRows, class Accumulator,
          class Sync>
__device__ inline void finish_tile(const GemmCall& p, const TileContext& at, const Accumulator& accumulator,
                                   const Sync& sync) {
  constexpr int kColumns = kGated ? 32 : 64, kUnits = kColumns / kUnit, kColumnParts = kGroups / kUnits;
  static_assert(kColumnParts * kUnits == kGroups, "parts are 64 columns wide, 32 with a gate");
  constexpr bool kSums = kEpilogue == Epilogue::kActivationGrad;
  const int lane = threadIdx.x % 32;
  float* stage = at.stages + (at.warp_column * kWarpRows + at.warp_row) * kStageFloats;
  UnitSums sums;
#pragma unroll 1
  for (int part = 0; part < kColumnParts * kSlices; ++part) {
    const int slice = part % kSlices;
    const int64_t row = at.row + slice * kStageRows, column = at.column + part / kSlices * kColumns;
    if (kSums && slice == 0) sums.clear();
    // Registers have no index: every part is written out, one is taken.
#pragma unroll
    for (int candidate = 0; candidate < kColumnParts * kSlices; ++candidate) {
      if (candidate != part) continue;
#pragma unroll
      for (int i = 0; i < kUnits * 2 * (kGated ? 2 : 1); ++i) {
        const int half = i % 2, unit = i / 2 % kUnits, product = i / 2 / kUnits;
        float* to =
            stage + product * kStageRows * kColumns + stage_offset<kColumns>(lane / 4 + 8 * half, unit) + lane % 4 * 2;
        const int group = candidate / kSlices * kUnits + unit;
        to[0] = accumulator(product, candidate % kSlices, group, 2 * half);
        to[1] = accumulator(product, candidate % kSlices, group, 2 * half + 1);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < kStageRows * kUnits; i += 32) {
      const int r = i / kUnits, unit = i % kUnits;
      const int64_t at_column = column + unit * kUnit;
      if (row + r >= p.M || at_column >= p.N) continue;
      const float* from = stage + stage_offset<kColumns>(r, unit);
      float pre[kUnit], gate[kUnit];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        pre[e] = from[e];
        gate[e] = kGated ? from[kStageRows * kColumns + e] : 0.0f;
      }
      finish_unit<T, kEpilogue, kGated>(p, at.slice, row + r, static_cast<int>(at_column), pre, gate, &sums);
    }
    __syncwarp();
    if constexpr (kSums) {
      if (slice == kSlices - 1 && p.dpre_sums != nullptr) store_tile_sums<kWarpRows>(p, at, column, sums, sync);
    }
  }
}

// The epilogue kernel: a block takes kRowsOfBlock rows by 128 columns, a thread one unit of every eighth row.
constexpr int kEpilogueThreads = 128, kRowsOfBlock = 64;
constexpr int kUnitsOfBlock = 16, kRowLanes = kEpilogueThreads / kUnitsOfBlock;

// The product at a unit: one matrix in S, or the sum of `slices` float32 ones, (M, N) each, in order.
template <class S>
__device__ inline void load_product(const GemmCall& p, const S* product, int64_t row, int column, float (&x)[kUnit]) {
  const int n = static_cast<int>(p.N);
  if constexpr (sizeof(S) == 2) {
    load_unit<S>(product, row, column, p, x);
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) x[e] = 0.0f;
    for (int slice = 0; slice < p.slices; ++slice) {
      float part[kUnit];
      load_widened<kUnit>(product + (static_cast<int64_t>(slice) * p.M + row) * p.N, column, n, n % 4 == 0, part);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) x[e] += part[e];
    }
  }
}

// p's epilogue of products in memory: in T, or in float32 the slices of one. p.c may be the product itself.
template <class T, class S, Epilogue kEpilogue, bool kGated>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_kernel(GemmCall p, const S* product, const S* gate_product) {
  __shared__ float block_sums[2][kRowLanes][kUnitsOfBlock * kUnit];
  const int64_t column_blocks = ceil_div(p.N, kUnitsOfBlock * kUnit);
  const int64_t row_block = blockIdx.x / column_blocks;
  const int64_t first_column = blockIdx.x % column_blocks * kUnitsOfBlock * kUnit;
  const int unit = threadIdx.x % kUnitsOfBlock, row_lane = threadIdx.x / kUnitsOfBlock;
  const int64_t column = first_column + unit * kUnit;
  UnitSums sums;
  sums.clear();
  for (int r = row_lane; r < kRowsOfBlock; r += kRowLanes) {
    const int64_t row = row_block * kRowsOfBlock + r;
    if (row >= p.M || column >= p.N) break;
    float pre[kUnit], gate[kUnit] = {};
    load_product(p, product, row, static_cast<int>(column), pre);
    if constexpr (kGated) load_product(p, gate_product, row, static_cast<int>(column), gate);
    finish_unit<T, kEpilogue, kGated>(p, 0, row, static_cast<int>(column), pre, gate, &sums);
  }
  if constexpr (kEpilogue == Epilogue::kActivationGrad) {
    if (p.dpre_sums == nullptr) return;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      block_sums[0][row_lane][unit * kUnit + e] = sums.pre[e];
      block_sums[1][row_lane][unit * kUnit + e] = sums.gate[e];
    }
    __syncthreads();
    const int64_t own = first_column + threadIdx.x;
    for (int which = 0; which < (p.gate != nullptr ? 2 : 1); ++which) {
      float total = 0.0f;
#pragma unroll
      for (int lane = 0; lane < kRowLanes; ++lane) total += block_sums[which][lane][threadIdx.x];
      float* line = static_cast<float*>(which == 0 ? p.dpre_sums : p.dgate_sums) + row_block * p.N;
      if (own < p.N) line[own] = total;
    }
  }
}

// out[n] = Σ x[m][n] over rows [chunk · rows_of_chunk, ...) of x (M, N), into line `chunk` of out (chunks, N). A block
// takes 128 columns of one chunk; 8 row lanes a column, then those in order.
template <class S, class D>
__global__ void __launch_bounds__(kEpilogueThreads)
    column_sum_kernel(const S* x, int64_t stride, int64_t M, int64_t N, int64_t rows_of_chunk, bool aligned, D* out) {
  __shared__ float lane_sums[kRowLanes][kUnitsOfBlock * kUnit];
  const int64_t column_blocks = ceil_div(N, kUnitsOfBlock * kUnit);
  const int64_t chunk = blockIdx.x / column_blocks;
  const int64_t first_column = blockIdx.x % column_blocks * kUnitsOfBlock * kUnit;
  const int unit = threadIdx.x % kUnitsOfBlock, row_lane = threadIdx.x / kUnitsOfBlock;
  const int64_t column = first_column + unit * kUnit;
  const int64_t begin = chunk * rows_of_chunk, end = begin + rows_of_chunk < M ? begin + rows_of_chunk : M;
  float sum[kUnit] = {};
  for (int64_t row = begin + row_lane; row < end && column < N; row += kRowLanes) {
    float value[kUnit];
    load_widened<kUnit>(x + row * stride, static_cast<int>(column), static_cast<int>(N), aligned, value);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) sum[e] += value[e];
  }
#pragma unroll
  for (int e = 0; e < kUnit; ++e) lane_sums[row_lane][unit * kUnit + e] = sum[e];
  __syncthreads();
  const int64_t own = first_column + threadIdx.x;
  float total = 0.0f;
#pragma unroll
  for (int lane = 0; lane < kRowLanes; ++lane) total += lane_sums[lane][threadIdx.x];
  if (own < N) narrow(total, out + chunk * N + own);
}

// Chunks of rows of a column sum, by the shape alone.
inline int64_t sum_chunks(int64_t rows) { return std::max<int64_t>(1, std::min<int64_t>(256, ceil_div(rows, 256))); }

inline LaunchConfig epilogue_config(const GemmCall& p) {
  return {ceil_div(p.M, kRowsOfBlock) * ceil_div(p.N, kUnitsOfBlock * kUnit), kEpilogueThreads};
}

// p's epilogue of products in memory.
template <class T, class Launch>
void launch_epilogue(const GemmCall& p, const T* product, const T* gate_product, const Launch& launch) {
  if (p.M == 0 || p.N == 0) return;
  const auto run = [&](auto* kernel) {
    launch("product_epilogue", kernel, epilogue_config(p), p, product, gate_product);
  };
  switch (p.epilogue) {
    case Epilogue::kStore:
      return run(epilogue_kernel<T, T, Epilogue::kStore, false>);
    case Epilogue::kActivation:
      return p.second_apart ? run(epilogue_kernel<T, T, Epilogue::kActivation, true>)
                            : run(epilogue_kernel<T, T, Epilogue::kActivation, false>);
    case Epilogue::kActivationGrad:
      return run(epilogue_kernel<T, T, Epilogue::kActivationGrad, false>);
  }
}

// Epilogue::kStore of the slices that the GEMM kernels left in p.parts.
template <class T, class Launch>
void launch_slice_sum(GemmCall p, const Launch& launch) {
  if (p.M == 0 || p.N == 0) return;
  const float* parts = p.parts;
  p.parts = nullptr;
  launch("product_epilogue", epilogue_kernel<T, float, Epilogue::kStore, false>, epilogue_config(p), p, parts, nullptr);
}

// sums (N,) in D = Σ over the M rows of x; partial: (sum_chunks(M), N) float32, read only if there are several.
template <class S, class D, class Launch>
void launch_column_sum(const S* x, int64_t stride, int64_t M, int64_t N, float* partial, D* sums,
                       const Launch& launch) {
  if (N == 0) return;
  const int64_t chunks = sum_chunks(M), column_blocks = ceil_div(N, kUnitsOfBlock * kUnit);
  const auto run = [&](const auto* from, int64_t pitch, int64_t rows, int64_t lines, auto* to) {
    using From = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    const bool aligned = N % 8 == 0 && pitch % Packed<From>::kSize == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    launch("column_sum", column_sum_kernel<From, std::remove_pointer_t<decltype(to)>>,
           LaunchConfig{column_blocks * lines, kEpilogueThreads}, from, pitch, rows, N,
           std::max<int64_t>(ceil_div(rows, lines), 1), aligned, to);
  };
  if (chunks == 1) return run(x, stride, M, 1, sums);
  run(x, stride, M, chunks, partial);
  run(static_cast<const float*>(partial), N, chunks, 1, sums);
}

}  // namespace cuda
}  // namespace fastattn
