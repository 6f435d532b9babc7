// Which kernels a backward pass on mma.sync takes, and how they are launched.
#pragma once

#include "cuda/attention_sm80_mask_gradient.cuh"

namespace fastattn {
namespace cuda {

template <class T, int kD, bool kGeneral, class Launch>
void launch_attention_sm80_gradients(AttentionSm80BackwardCall p, const Launch& launch) {
  using Shape = BackwardSm80<kD>;
  p.tiling = attention_tiling(p, Shape::kLines, 1);
  p.key_tiling = key_tiling(p, Shape::kLines);
  const LaunchConfig queries = {p.tiling.tiles(), Shape::kThreads, Shape::kSharedBytes};
  const LaunchConfig keys = {p.key_tiling.tiles(), Shape::kThreads, Shape::kSharedBytes};
  if (queries.blocks_x > 0) {
    launch("attention_sm80_backward", attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kQueries>, queries,
           p);
  }
  if (keys.blocks_x == 0) return;
  if constexpr (kD <= 128) {
    launch("attention_sm80_backward", attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kKeysAndValues>,
           keys, p);
  } else {
    launch("attention_sm80_backward", attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kKeys>, keys, p);
    launch("attention_sm80_backward", attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kValues>, keys, p);
  }
}

template <class T, int kD, class Launch>
void launch_attention_sm80_mask_gradient(const AttentionSm80BackwardCall& p, const Launch& launch) {
  using Shape = BackwardSm80<kD>;
  const MaskTiling tiling = mask_tiling<kD>(p);
  if (tiling.tiles() == 0) return;
  launch("attention_sm80_mask_gradient", attention_sm80_mask_gradient_kernel<T, kD>,
         LaunchConfig{tiling.tiles(), Shape::kThreads, Shape::kSharedBytes}, p, tiling);
}

// What is not common has fewer instantiations: 96 channels are padded to 128 and 192 to 256.
template <class T, class Launch>
void launch_attention_sm80_general_gradients(const AttentionSm80BackwardCall& p, const Launch& launch) {
  const auto run = [&](auto channels) {
    constexpr int kD = decltype(channels)::value;
    if (p.dq != nullptr) launch_attention_sm80_gradients<T, kD, true>(p, launch);
    if (p.dmask != nullptr) launch_attention_sm80_mask_gradient<T, kD>(p, launch);
  };
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  if (channels <= 64) return run(std::integral_constant<int, 64>());
  if (channels <= 128) return run(std::integral_constant<int, 128>());
  run(std::integral_constant<int, 256>());
}

// dq, dk, dv and, where p has a place for them, dmask and each row's part of the slopes' gradients; dq null: dmask
// alone. float16 or bfloat16, up to 256 channels, no pages; rows and keys that are no sequence's are left as they are,
// packed sequences follow one another. p.delta is filled.
template <class T, class Launch>
void launch_attention_sm80_backward(const AttentionBackwardParams& params, const Launch& launch) {
  AttentionSm80BackwardCall p{};
  static_cast<AttentionBackwardParams&>(p) = params;
  if (p.batch == 0 || p.heads == 0) return;
  p.q_aligned = rows_aligned(p.q, p.q_stride, 3), p.k_aligned = rows_aligned(p.k, p.k_stride, 3);
  p.v_aligned = rows_aligned(p.v, p.v_stride, 3), p.dout_aligned = rows_aligned(p.dout, p.dout_stride, 3);
  if (!PlainScores::takes(p)) return launch_attention_sm80_general_gradients<T>(p, launch);
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  if (channels <= 64) return launch_attention_sm80_gradients<T, 64, false>(p, launch);
  if (channels <= 96) return launch_attention_sm80_gradients<T, 96, false>(p, launch);
  if (channels <= 128) return launch_attention_sm80_gradients<T, 128, false>(p, launch);
  if (channels <= 192) return launch_attention_sm80_gradients<T, 192, false>(p, launch);
  launch_attention_sm80_gradients<T, 256, false>(p, launch);
}

// What the .cu of each type instantiates.
#define FASTATTN_GRADIENTS(T, kD, kGeneral)                                                               \
  template __global__ void attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kQueries>(       \
      const __grid_constant__ AttentionSm80BackwardCall);                                                 \
  template __global__ void attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kKeysAndValues>( \
      const __grid_constant__ AttentionSm80BackwardCall)
#define FASTATTN_WIDE_GRADIENTS(T, kD, kGeneral)                                                    \
  template __global__ void attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kQueries>( \
      const __grid_constant__ AttentionSm80BackwardCall);                                           \
  template __global__ void attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kKeys>(    \
      const __grid_constant__ AttentionSm80BackwardCall);                                           \
  template __global__ void attention_sm80_backward_kernel<T, kD, kGeneral, Sm80Gradient::kValues>(  \
      const __grid_constant__ AttentionSm80BackwardCall)
#define FASTATTN_MASK_GRADIENT(T, kD)                                  \
  template __global__ void attention_sm80_mask_gradient_kernel<T, kD>( \
      const __grid_constant__ AttentionSm80BackwardCall, MaskTiling)
#define FASTATTN_SM80_BACKWARD(T)         \
  FASTATTN_GRADIENTS(T, 64, false);       \
  FASTATTN_GRADIENTS(T, 96, false);       \
  FASTATTN_GRADIENTS(T, 128, false);      \
  FASTATTN_WIDE_GRADIENTS(T, 192, false); \
  FASTATTN_WIDE_GRADIENTS(T, 256, false); \
  FASTATTN_GRADIENTS(T, 64, true);        \
  FASTATTN_GRADIENTS(T, 128, true);       \
  FASTATTN_WIDE_GRADIENTS(T, 256, true);  \
  FASTATTN_MASK_GRADIENT(T, 64);          \
  FASTATTN_MASK_GRADIENT(T, 128);         \
  FASTATTN_MASK_GRADIENT(T, 256)

}  // namespace cuda
}  // namespace fastattn
