// The launches of attention_sm80_backward_launch.cuh for float16.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm80_backward_launch.cuh"

namespace fastattn {
namespace cuda {

void launch_attention_sm80_backward_float16(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  launch_attention_sm80_backward<Half>(p, launch);
}

FASTATTN_SM80_BACKWARD(Half);

}  // namespace cuda
}  // namespace fastattn
