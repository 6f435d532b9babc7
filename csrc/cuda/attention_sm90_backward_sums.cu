// Instantiations of attention_sm90_backward_sums.cuh: two dtypes; of plain scores three widths of a head, of
// general ones two.
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

#define FASTATTN_BACKWARD(T, kD, Scores)                                                     \
  template __global__ void attention_sm90_sums_kernel<T, AttentionSm90SumsTile<kD>, Scores>( \
      const __grid_constant__ AttentionSm90SumsCall, const __grid_constant__ AttentionSm90BackwardMaps)
#define FASTATTN_CONVERT(T, kD)                                                         \
  template __global__ void attention_sm90_convert_kernel<T, AttentionSm90SumsTile<kD>>( \
      const __grid_constant__ AttentionSm90SumsCall)
#define FASTATTN_BACKWARD_WIDTHS(T)         \
  FASTATTN_BACKWARD(T, 64, PlainScores);    \
  FASTATTN_BACKWARD(T, 96, PlainScores);    \
  FASTATTN_BACKWARD(T, 128, PlainScores);   \
  FASTATTN_BACKWARD(T, 64, GeneralScores);  \
  FASTATTN_BACKWARD(T, 128, GeneralScores); \
  FASTATTN_CONVERT(T, 64);                  \
  FASTATTN_CONVERT(T, 96);                  \
  FASTATTN_CONVERT(T, 128)

FASTATTN_BACKWARD_WIDTHS(Half);
FASTATTN_BACKWARD_WIDTHS(BFloat16);

}  // namespace cuda
}  // namespace fastattn
