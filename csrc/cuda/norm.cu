// The norms' CUDA operators behind LibTorch's stable ABI.
#include "cuda/norm.cuh"
#include "cuda/operator.h"
#include "ops/norm.h"

namespace fastattn {
namespace cuda {
NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state) {
  FASTATTN_CHECK(x.is_cuda(), "norm: x is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormForwardParams p;
  const NormResults results =
      prepare_norm_forward(x, residual, weight, bias, eps, rms, make_dropout(dropout_p, rng_state), &p, allocator(x));
  launch_norm_forward(p, StreamLaunch{current_stream(x.get_device_index())});
  return results;
}

NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad) {
  FASTATTN_CHECK(h.is_cuda(), "norm: h is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  NormBackwardParams p;
  std::tuple<Tensor, Tensor> partials;
  const NormResults results =
      prepare_norm_backward(dy, dh, h, weight, mean, rstd, rms, make_dropout(dropout_p, rng_state), weight_grad,
                            bias_grad, &p, &partials, allocator(h), norm_chunk_rows);
  launch_norm_backward(p, StreamLaunch{current_stream(h.get_device_index())});
  return results;
}

}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&fastattn::cuda::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&fastattn::cuda::norm_backward));
}
