// The norms' CUDA operators behind LibTorch's stable ABI.
#include "cuda/norm_sm90.h"
#include "cuda/operator.h"
#include "ops/norm.h"

namespace fastattn {
namespace cuda {
namespace {

// Blocks of a cluster to a row on this device, 0 where a block takes it.
int cluster_for(int device, int64_t columns, const Tensor& rows, int vectors) {
  return runs_sm90(device) ? norm_cluster(columns, static_cast<int>(rows.element_size()), vectors) : 0;
}

}  // namespace

NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state) {
  FASTATTN_CHECK(x.is_cuda(), "norm: x is not on a CUDA device");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  NormForwardParams p;
  const NormResults results =
      prepare_norm_forward(x, residual, weight, bias, eps, rms, make_dropout(dropout_p, rng_state), &p, allocator(x));
  const StreamLaunch launch{current_stream(device)};
  if (const int blocks = cluster_for(device, p.columns, x, kForwardVectors)) {
    norm_forward_in_clusters(p, blocks, launch);
  } else {
    launch_norm_forward(p, launch);
  }
  return results;
}

NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad) {
  FASTATTN_CHECK(h.is_cuda(), "norm: h is not on a CUDA device");
  const int32_t device = h.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  NormBackwardParams p;
  std::tuple<Tensor, Tensor> partials;
  const NormResults results =
      prepare_norm_backward(dy, dh, h, weight, mean, rstd, rms, make_dropout(dropout_p, rng_state), weight_grad,
                            bias_grad, &p, &partials, allocator(h), norm_chunk_rows);
  const StreamLaunch launch{current_stream(device)};
  if (const int blocks = cluster_for(device, p.columns, h, kBackwardVectors)) {
    norm_backward_in_clusters(p, blocks, launch);
  } else {
    launch_norm_backward(p, launch);
  }
  launch_norm_reduce(p, runs_sm90(device), launch);
  return results;
}

}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&fastattn::cuda::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&fastattn::cuda::norm_backward));
}
