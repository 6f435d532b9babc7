// The operators of csrc/cuda/attention.cu as torch.ops.fastattn_host.*, on CPU tensors in bfloat16: which kernels run,
// what is allocated, filled and zeroed, which pointer goes where. host_torch/ stands in for torch's CUDA side.
#define FASTATTN_CUDA_SM90
// clang-format off
#include "cuda/operator.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_decode.cuh"
#include "cuda/attention_sm80_backward_launch.cuh"
#include "cuda/attention_sm80_forward.cuh"
#include "cuda/attention_sm90_backward_sums.cuh"
#include "../../csrc/cuda/attention.cu"
#include "../../csrc/cuda/attention_backward_rows.cu"
// clang-format on

namespace fastattn {
namespace cuda {

// The Hopper kernels that gave gradients last.
const char* hopper_backward = "none";

void launch_attention_decode(const DecodeParams& p, const StreamLaunch& launch) {
  launch_attention_decode<BFloat16>(p, launch);
}
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch) {
  launch_attention_sm80_forward<BFloat16, 64>(p, launch);
}
void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  launch_attention_sm80_backward<BFloat16>(p, launch);
}

// Forward by mma.sync there too: which kernel computes it, attention.cu decides as it does here.
bool attention_forward_sm90_takes(const AttentionParams&) { return false; }
void launch_attention_forward_sm90(const AttentionParams&, int, const StreamLaunch&) {}
bool attention_backward_sm90_takes(const AttentionBackwardParams& p) { return attention_sm90_backward_takes(p); }
bool attention_backward_sm90_sums_takes(const AttentionBackwardParams& p) {
  return attention_sm90_backward_sums_takes(p);
}
int64_t attention_backward_sm90_sums(const AttentionBackwardParams& p) { return attention_sm90_backward_sums(p); }
void launch_attention_backward_sm90(const AttentionBackwardParams& p, const StreamLaunch& launch) {
  hopper_backward = "in order";
  launch_attention_sm90_backward<BFloat16>(p, boxes_map, launch);
}
void launch_attention_backward_sm90_sums(const AttentionBackwardParams& p, float* dq_sums, const StreamLaunch& launch) {
  hopper_backward = "by sums";
  launch_attention_sm90_backward_sums<BFloat16>(p, dq_sums, boxes_map, launch);
}

}  // namespace cuda
}  // namespace fastattn

extern "C" void choose(int capability, bool deterministic) {
  fastattn::cuda::host_device.capability = capability;
  fastattn::cuda::host_deterministic = deterministic;
  fastattn::cuda::hopper_backward = "none";
}
extern "C" const char* hopper_backward() { return fastattn::cuda::hopper_backward; }
