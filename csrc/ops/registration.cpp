// The catalogue: which C++ function implements which operator on the CPU. Schemas are in fastattn/ops/_library.py.
#include "ops/tensor.h"

namespace fastattn {
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate);

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const OptionalTensor& residual,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double eps, bool rms, double dropout_p,
                                                        const OptionalTensor& rng_state);
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                                                         const OptionalTensor& weight, const Tensor& mean,
                                                         const Tensor& rstd, bool rms, double dropout_p,
                                                         const OptionalTensor& rng_state, bool weight_grad,
                                                         bool bias_grad);
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("rope", TORCH_BOX(&fastattn::rope));

  m.impl("norm_forward", TORCH_BOX(&fastattn::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&fastattn::norm_backward));
}
