// Instantiations of attention_sm90_forward.cuh: two dtypes, five widths of a head, plain and general scores.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm90_forward.cuh"
#include "cuda/tensor_map.h"

namespace fastattn {
namespace cuda {

bool attention_forward_sm90_takes(const AttentionParams& p) { return attention_sm90_takes(p); }

void launch_attention_forward_sm90(const AttentionParams& p, int multiprocessors, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16
      ? launch_attention_sm90_forward<Half>(p, multiprocessors, make_boxes_map<Half, 5>, launch)
      : launch_attention_sm90_forward<BFloat16>(p, multiprocessors, make_boxes_map<BFloat16, 5>, launch);
}

#define FASTATTN_FORWARD(T, kD, Scores)                                                                       \
  template __global__ void attention_sm90_forward_kernel<T, AttentionSm90Tile<kD, Scores::kGeneral>, Scores>( \
      const __grid_constant__ AttentionSm90Call, const __grid_constant__ AttentionSm90Maps)
#define FASTATTN_FORWARD_WIDTHS(T, Scores) \
  FASTATTN_FORWARD(T, 64, Scores);         \
  FASTATTN_FORWARD(T, 96, Scores);         \
  FASTATTN_FORWARD(T, 128, Scores);        \
  FASTATTN_FORWARD(T, 192, Scores);        \
  FASTATTN_FORWARD(T, 256, Scores)

FASTATTN_FORWARD_WIDTHS(Half, PlainScores);
FASTATTN_FORWARD_WIDTHS(Half, GeneralScores);
FASTATTN_FORWARD_WIDTHS(BFloat16, PlainScores);
FASTATTN_FORWARD_WIDTHS(BFloat16, GeneralScores);

}  // namespace cuda
}  // namespace fastattn
