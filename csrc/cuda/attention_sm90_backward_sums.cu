// Instantiations of attention_sm90_backward_sums.cuh: two dtypes, three widths of a head.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm90_backward_sums.cuh"
#include "cuda/tensor_map.h"

namespace fastattn {
namespace cuda {

bool attention_backward_sm90_sums_takes(const AttentionBackwardParams& p) {
  return attention_sm90_backward_sums_takes(p);
}

int64_t attention_backward_sm90_sums(const AttentionBackwardParams& p) { return attention_sm90_backward_sums(p); }

void launch_attention_backward_sm90_sums(const AttentionBackwardParams& p, float* dq_sums, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16
      ? launch_attention_sm90_backward_sums<Half>(p, dq_sums, make_boxes_map<Half, 5>, launch)
      : launch_attention_sm90_backward_sums<BFloat16>(p, dq_sums, make_boxes_map<BFloat16, 5>, launch);
}

#define FASTATTN_BACKWARD(T, kD)                                                                         \
  template __global__ void attention_sm90_sums_kernel<T, AttentionSm90SumsTile<kD>>(                     \
      const __grid_constant__ AttentionSm90SumsCall, const __grid_constant__ AttentionSm90BackwardMaps); \
  template __global__ void attention_sm90_convert_kernel<T, AttentionSm90SumsTile<kD>>(                  \
      const __grid_constant__ AttentionSm90SumsCall)

FASTATTN_BACKWARD(Half, 64);
FASTATTN_BACKWARD(Half, 96);
FASTATTN_BACKWARD(Half, 128);
FASTATTN_BACKWARD(BFloat16, 64);
FASTATTN_BACKWARD(BFloat16, 96);
FASTATTN_BACKWARD(BFloat16, 128);

#undef FASTATTN_BACKWARD

}  // namespace cuda
}  // namespace fastattn
