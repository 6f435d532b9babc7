// The gradient of an additive mask, dS summed over all that the mask is broadcast along (attention_sm80_backward.cuh
// has the formulas, tiles and products). A block has a tile of the mask's own shape and walks, in a fixed order, the
// batch entries, heads, rows and keys that it stands for; dS is computed anew rather than stored for all pairs. One
// product's operands at a time: nothing is loaded ahead.
#pragma once

#include "cuda/attention_sm80_backward.cuh"

namespace fastattn {
namespace cuda {

// How many tiles the mask has along each axis, and how many steps a tile takes along it: one of them is 1.
struct MaskTiling {
  int blocks[4], steps[4];
  __host__ __device__ int64_t tiles() const { return int64_t{blocks[0]} * blocks[1] * blocks[2] * blocks[3]; }
};

template <int kD>
inline MaskTiling mask_tiling(const AttentionBackwardParams& p) {
  using Shape = BackwardSm80<kD>;
  const int64_t extent[4] = {p.batch, p.heads, (p.rows + Shape::kLines - 1) / Shape::kLines,
                             (p.keys + Shape::kRows - 1) / Shape::kRows};
  MaskTiling tiling;
  for (int i = 0; i < 4; ++i) {
    const bool full = p.mask_extent[i] > 1;
    tiling.blocks[i] = full ? static_cast<int>(extent[i]) : 1;
    tiling.steps[i] = full ? 1 : static_cast<int>(extent[i]);
  }
  return tiling;
}

// total (of the lines and columns of the block's tile) to dmask, summed over lines or columns where the mask has one.
template <class T, int kD>
__device__ inline void store_mask_gradient(const AttentionBackwardParams& p, const int (&block)[4], char* shared,
                                           const float (&total)[BackwardSm80<kD>::kRows / 2]) {
  using Shape = BackwardSm80<kD>;
  constexpr int kLines = Shape::kLines, kRows = Shape::kRows;
  static_assert(kLines * kRows * 4 <= 2 * Shape::kLineBytes, "sums take the place of the fixed tiles");
  float* const sums = reinterpret_cast<float*>(shared);
  const int line = static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x % 32) / 4;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    sums[(line + i / 2 % 2 * 8) * kRows + i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2] = total[i];
  }
  __syncthreads();
  const bool every_row = p.mask_extent[2] > 1, every_key = p.mask_extent[3] > 1;
  const int lines = every_row ? kLines : 1, columns = every_key ? kRows : 1;
  for (int i = static_cast<int>(threadIdx.x); i < lines * columns; i += Shape::kThreads) {
    const int64_t row = int64_t{block[2]} * kLines + i / columns, key = int64_t{block[3]} * kRows + i % columns;
    if (row >= p.mask_extent[2] || key >= p.mask_extent[3]) continue;
    float sum = 0;
    for (int l = every_row ? i / columns : 0, end = every_row ? l + 1 : kLines; l < end; ++l) {
      for (int c = every_key ? i % columns : 0, last = every_key ? c + 1 : kRows; c < last; ++c) {
        sum += sums[l * kRows + c];
      }
    }
    const int64_t at = ((block[0] * p.mask_extent[1] + block[1]) * p.mask_extent[2] + row) * p.mask_extent[3] + key;
    if (p.mask_dtype == DType::kFloat32) {
      static_cast<float*>(p.dmask)[at] = sum;
    } else {
      narrow(sum, static_cast<T*>(p.dmask) + at);
    }
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(BackwardSm80<kD>::kThreads)
    attention_sm80_mask_gradient_kernel(const __grid_constant__ AttentionSm80BackwardCall p, MaskTiling tiling) {
  using Shape = BackwardSm80<kD>;
  constexpr int kLines = Shape::kLines, kRows = Shape::kRows, kThreads = Shape::kThreads;
  note_dynamic_shared<Shape::kSharedBytes>();
  const BackwardTiles<kD> tiles{dynamic_shared()};
  const int warp_line = static_cast<int>(threadIdx.x) / 32 * 16, group = static_cast<int>(p.heads / p.heads_kv);
  int block[4];
  for (int i = 3, rest = static_cast<int>(blockIdx.x); i >= 0; rest /= tiling.blocks[i--])
    block[i] = rest % tiling.blocks[i];

  float total[kRows / 2] = {};
  const int steps = tiling.steps[0] * tiling.steps[1] * tiling.steps[2] * tiling.steps[3];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    int at[4];
    for (int i = 3, rest = step; i >= 0; rest /= tiling.steps[i--]) at[i] = block[i] + rest % tiling.steps[i];
    const Sequence sequence = p.sequences != nullptr ? p.sequences[at[0]] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
    const AttentionTile own = {at[0],
                               at[1],
                               at[2] * kLines,
                               static_cast<int>(sequence.q_begin),
                               static_cast<int>(sequence.rows),
                               static_cast<int>(sequence.k_begin),
                               static_cast<int>(sequence.keys),
                               sequence.diagonal};
    const int first_key = at[3] * kRows, past = own.first_line + kLines, last = (past < own.rows ? past : own.rows) - 1;
    if (own.first_line > last) continue;
    const KeyRange seen = keys_of_any(p, own, own.first_line, last);
    if (first_key >= seen.end || first_key + kRows <= seen.begin) continue;

    const Sm80Operands<T> operands{p, own};
    __syncthreads();
    operands.q(own.group).template load<kLines, kD, kThreads>(tiles.fixed(0), own.first_line);
    operands.dout(own.group).template load<kLines, kD, kThreads>(tiles.fixed(1), own.first_line);
    operands.k(own.group / group).template load<kRows, kD, kThreads>(tiles.moving(0, 0), first_key);
    operands.v(own.group / group).template load<kRows, kD, kThreads>(tiles.moving(0, 1), first_key);
    cp_async_commit();
    float lse2[2] = {0, 0}, delta[2] = {0, 0}, distances[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own.first_line + warp_line + static_cast<int>(threadIdx.x % 32) / 4 + 8 * half;
      if (row >= own.rows) continue;
      lse2[half] = lse_in_base_2(static_cast<const float*>(p.lse)[operands.statistics(own.group) + row]);
      delta[half] = static_cast<const float*>(p.delta)[operands.statistics(own.group) + row];
    }
    cp_async_wait<0>();
    __syncthreads();
    float s[1][kRows / 2] = {}, ds[1][kRows / 2] = {};
    multiply_rows<T, kD, kLines, kRows, 1>(tiles.fixed(0), warp_line, tiles.moving(0, 0), s);
    multiply_rows<T, kD, kLines, kRows, 1>(tiles.fixed(1), warp_line, tiles.moving(0, 1), ds);
    differentiate_pairs<true, false, true>(p, own, pair_place(p, own.batch, own.group), own.first_line + warp_line,
                                           first_key, true, lse2, delta, nullptr, nullptr, s[0], ds[0], distances);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) total[i] += ds[0][i];
  }
  store_mask_gradient<T, kD>(p, block, tiles.fixed(0), total);
}

}  // namespace cuda
}  // namespace fastattn
