// The operators of csrc/cuda/attention.cu as torch.ops.fastattn_host.*, on CPU tensors in bfloat16: which kernels run,
// what is allocated, filled and zeroed, which pointer goes where. host_torch/ stands in for torch's CUDA side.
// clang-format off
#include "cuda/operator.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_decode.cuh"
#include "cuda/attention_sm80_backward_launch.cuh"
#include "cuda/attention_sm80_forward.cuh"
#include "../../csrc/cuda/attention.cu"
#include "../../csrc/cuda/attention_backward_rows.cu"
// clang-format on

namespace fastattn {
namespace cuda {

void launch_attention_decode(const DecodeParams& p, const StreamLaunch& launch) {
  launch_attention_decode<BFloat16>(p, launch);
}
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch) {
  launch_attention_sm80_forward<BFloat16, 64>(p, launch);
}
void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  launch_attention_sm80_backward<BFloat16>(p, launch);
}

}  // namespace cuda
}  // namespace fastattn
