// What backward computes of rows alone, before and after the products: delta, and the gradients of sinks and slopes
// from what each row gave them. Contract in cpu/params.h (AttentionBackwardParams).
#pragma once

#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

constexpr int kRowThreads = 256, kDeltaRows = 64;

// delta[row] = dout.out - dlse, a row to a warp.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p, AttentionTiling tiling, bool aligned) {
  const AttentionTile own = attention_tile(p, tiling, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = own.batch * p.row_stride[0] + own.group * p.row_stride[1] + own.q_begin;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < tiling.tile_lines; i += kRowThreads / 32) {
    const int row = own.first_line + i, place = own.q_begin + row, channels = static_cast<int>(p.head_dim_v);
    if (row >= own.rows) return;
    const T* out = static_cast<const T*>(p.out) + own.batch * p.out_stride[0] + own.group * p.out_stride[1] +
                   place * p.out_stride[2];
    const T* dout = static_cast<const T*>(p.dout) + own.batch * p.dout_stride[0] + own.group * p.dout_stride[1] +
                    place * p.dout_stride[2];
    float total[1] = {0};
    for (int channel = 8 * lane; channel < channels; channel += 256) {
      const Packed<T> x = load_packed(out, channel, channels, aligned);
      const Packed<T> dx = load_packed(dout, channel, channels, aligned);
#pragma unroll
      for (int e = 0; e < 8; ++e) total[0] = fmaf(widen(x.value[e]), widen(dx.value[e]), total[0]);
    }
    row_sum<32>(total, static_cast<float*>(nullptr));
    if (p.dlse != nullptr) total[0] -= static_cast<const float*>(p.dlse)[at + row];
    if (lane == 0) static_cast<float*>(p.delta)[at + row] = total[0];
  }
}

// dsinks and dslopes from the rows' parts: block (head, 0) has dsinks, and (head, b) dslopes, of sequence b or (b = 0)
// of all that share a slope.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_row_sum_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const int64_t head = blockIdx.x % p.heads, first = blockIdx.x / p.heads;
  const bool sinks = first == 0 && p.dsinks != nullptr;
  const bool apart = p.slopes_stride_batch != 0;
  const float sink = sinks ? static_cast<const float*>(p.sinks)[head] : 0.0f;
  float total[2] = {0, 0};
  for (int64_t b = sinks || !apart ? 0 : first; b < p.batch; ++b) {
    const Sequence own = p.sequences != nullptr ? p.sequences[b] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
    const int64_t at = b * p.row_stride[0] + head * p.row_stride[1] + own.q_begin;
    for (int64_t row = threadIdx.x; row < own.rows; row += kThreads) {
      const float lse = static_cast<const float*>(p.lse)[at + row];
      if (sinks && lse != kHidden) {
        total[0] -= exp2_fast((sink - lse) * kLog2E) * static_cast<const float*>(p.delta)[at + row];
      }
      if (p.dslopes != nullptr && (!apart || b == first)) total[1] += static_cast<const float*>(p.slope_rows)[at + row];
    }
  }
  __shared__ float scratch[2 * kThreads / 32];
  row_sum<kThreads>(total, scratch);
  if (threadIdx.x != 0) return;
  if (sinks) static_cast<float*>(p.dsinks)[head] = total[0];
  if (p.dslopes != nullptr) static_cast<float*>(p.dslopes)[first * p.slopes_stride_batch + head] = total[1];
}

template <class T, class Launch>
void launch_attention_delta(const AttentionBackwardParams& p, const Launch& launch) {
  const AttentionTiling tiling = attention_tiling(p, kDeltaRows, 1);
  if (tiling.tiles() == 0) return;
  const bool aligned =
      rows_aligned(p.out, p.out_stride, 3) && rows_aligned(p.dout, p.dout_stride, 3) && p.head_dim_v % 8 == 0;
  launch("attention_delta", attention_delta_kernel<T>, LaunchConfig{tiling.tiles(), kRowThreads}, p, tiling, aligned);
}

template <class Launch>
void launch_attention_row_sum(const AttentionBackwardParams& p, const Launch& launch) {
  if (p.heads == 0 || (p.dsinks == nullptr && p.dslopes == nullptr)) return;
  const int64_t sums = p.dslopes != nullptr && p.slopes_stride_batch != 0 ? p.batch : 1;
  if (sums == 0) return;
  launch("attention_row_sum", attention_row_sum_kernel<kRowThreads>, LaunchConfig{p.heads * sums, kRowThreads}, p);
}

}  // namespace cuda
}  // namespace fastattn
