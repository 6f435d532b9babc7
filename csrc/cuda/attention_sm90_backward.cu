// Instantiations of attention_sm90_backward.cuh: two dtypes, rows and keys; of plain scores three widths of
// a head, of general ones two.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm90_backward.cuh"
#include "cuda/tensor_map.h"

namespace fastattn {
namespace cuda {

bool attention_backward_sm90_takes(const AttentionBackwardParams& p) { return attention_sm90_backward_takes(p); }

void launch_attention_backward_sm90(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16 ? launch_attention_sm90_backward<Half>(p, make_boxes_map<Half, 5>, launch)
                             : launch_attention_sm90_backward<BFloat16>(p, make_boxes_map<BFloat16, 5>, launch);
}

#define FASTATTN_BACKWARD(T, kD, kForKeys, Scores)                                                             \
  template __global__ void attention_sm90_backward_kernel<T, AttentionSm90BackwardTile<kD, kForKeys>, Scores>( \
      const __grid_constant__ AttentionSm90BackwardCall, const __grid_constant__ AttentionSm90BackwardMaps)
#define FASTATTN_BACKWARD_WIDTHS(T)                \
  FASTATTN_BACKWARD(T, 64, false, PlainScores);    \
  FASTATTN_BACKWARD(T, 64, true, PlainScores);     \
  FASTATTN_BACKWARD(T, 96, false, PlainScores);    \
  FASTATTN_BACKWARD(T, 96, true, PlainScores);     \
  FASTATTN_BACKWARD(T, 128, false, PlainScores);   \
  FASTATTN_BACKWARD(T, 128, true, PlainScores);    \
  FASTATTN_BACKWARD(T, 64, false, GeneralScores);  \
  FASTATTN_BACKWARD(T, 64, true, GeneralScores);   \
  FASTATTN_BACKWARD(T, 128, false, GeneralScores); \
  FASTATTN_BACKWARD(T, 128, true, GeneralScores)

FASTATTN_BACKWARD_WIDTHS(Half);
FASTATTN_BACKWARD_WIDTHS(BFloat16);

}  // namespace cuda
}  // namespace fastattn
