// Instantiations of attention_sm90_backward.cuh: two dtypes, rows and keys; of plain scores four widths of
// a head, of general ones three.
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

#define FASTATTN_BACKWARD(T, Scores, kD, kForKeys, ...)                                            \
  template __global__ void                                                                         \
  attention_sm90_backward_kernel<T, AttentionSm90BackwardTile<kD, kForKeys, __VA_ARGS__>, Scores>( \
      const __grid_constant__ AttentionSm90BackwardCall, const __grid_constant__ AttentionSm90BackwardMaps)
#define FASTATTN_BACKWARDS(T, Scores, kD, ...)          \
  FASTATTN_BACKWARD(T, Scores, kD, false, __VA_ARGS__); \
  FASTATTN_BACKWARD(T, Scores, kD, true, __VA_ARGS__)
#define FASTATTN_BACKWARD_WIDTHS(T)                 \
  FASTATTN_BACKWARDS(T, PlainScores, 64, 64, 2);    \
  FASTATTN_BACKWARDS(T, PlainScores, 96, 64, 2);    \
  FASTATTN_BACKWARDS(T, PlainScores, 128, 64, 2);   \
  FASTATTN_BACKWARDS(T, PlainScores, 256, 64, 1);   \
  FASTATTN_BACKWARDS(T, GeneralScores, 64, 64, 2);  \
  FASTATTN_BACKWARDS(T, GeneralScores, 128, 64, 2); \
  FASTATTN_BACKWARDS(T, GeneralScores, 256, 64, 1)

FASTATTN_BACKWARD_WIDTHS(Half);
FASTATTN_BACKWARD_WIDTHS(BFloat16);

}  // namespace cuda
}  // namespace fastattn
