// The launches of attention_sm80_backward_launch.cuh for bfloat16, and which file has which type.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm80_backward_launch.cuh"

namespace fastattn {
namespace cuda {

void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16 ? launch_attention_sm80_backward_float16(p, launch)
                             : launch_attention_sm80_backward<BFloat16>(p, launch);
}

FASTATTN_SM80_BACKWARD(BFloat16);

}  // namespace cuda
}  // namespace fastattn
