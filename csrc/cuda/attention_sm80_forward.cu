// The launches of attention_sm80_forward.cuh.
#include "cuda/attention_launch.h"
#include "cuda/attention_sm80_forward.cuh"

namespace fastattn {
namespace cuda {

void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch) {
  p.dtype == DType::kFloat16 ? launch_attention_sm80_forward<Half>(p, launch)
                             : launch_attention_sm80_forward<BFloat16>(p, launch);
}

#define FASTATTN_FORWARD(T, kD)                                                 \
  template __global__ void attention_sm80_forward_kernel<T, kD, PlainScores>(   \
      const __grid_constant__ AttentionSm80Call);                               \
  template __global__ void attention_sm80_forward_kernel<T, kD, PagedScores>(   \
      const __grid_constant__ AttentionSm80Call);                               \
  template __global__ void attention_sm80_forward_kernel<T, kD, GeneralScores>( \
      const __grid_constant__ AttentionSm80Call)
#define FASTATTN_FORWARDS(T) \
  FASTATTN_FORWARD(T, 64);   \
  FASTATTN_FORWARD(T, 96);   \
  FASTATTN_FORWARD(T, 128);  \
  FASTATTN_FORWARD(T, 192);  \
  FASTATTN_FORWARD(T, 256)

FASTATTN_FORWARDS(BFloat16);
FASTATTN_FORWARDS(Half);

}  // namespace cuda
}  // namespace fastattn
