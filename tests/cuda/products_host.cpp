// The operators of csrc/cuda/{linear,ffn}.cu as torch.ops.fastattn_host.*, on CPU tensors: which product runs when,
// what is allocated, which pointer goes where. host_torch/ stands in for torch's CUDA side and the CUDA runtime.
// clang-format off
#include "cuda/operator.h"  // first: it gives the rest its CUDA words
#include "../../csrc/cuda/products.cu"
#include "../../csrc/cuda/gemm_sm80.cu"
#include "../../csrc/cuda/gemm_sm90.cu"
#include "../../csrc/cuda/linear.cu"
#include "../../csrc/cuda/ffn.cu"
// clang-format on

extern "C" void choose(int capability, bool deterministic) {
  fastattn::cuda::host_device.capability = capability;
  fastattn::cuda::host_deterministic = deterministic;
}
