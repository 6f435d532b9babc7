// The launches of attention_backward_rows.cuh.
#include "cuda/attention_backward_rows.cuh"
#include "cuda/attention_launch.h"

namespace fastattn {
namespace cuda {

void launch_attention_delta(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16 ? launch_attention_delta<Half>(p, launch) : launch_attention_delta<BFloat16>(p, launch);
}

void launch_attention_row_sums(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  launch_attention_row_sum(p, launch);
}

template __global__ void attention_delta_kernel<BFloat16>(const __grid_constant__ AttentionBackwardParams,
                                                          AttentionTiling, bool);
template __global__ void attention_delta_kernel<Half>(const __grid_constant__ AttentionBackwardParams, AttentionTiling,
                                                      bool);
template __global__ void attention_row_sum_kernel<kRowThreads>(const __grid_constant__ AttentionBackwardParams);

}  // namespace cuda
}  // namespace fastattn
