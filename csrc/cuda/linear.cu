// The operators of `linear` on CUDA behind LibTorch's stable ABI.
#include "cuda/products.h"

namespace fastattn {
namespace cuda {
namespace {

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      bool /* reduced_precision, of float32 */) {
  const Products products(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LinearParams p;
  const Tensor y = prepare_linear_forward(x, weight, bias, residual, Rows::kStrided, &p, allocator(x));
  products.run(p, residual.has_value() ? row_stride(*residual) : 0);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool x_grad,
                                                   bool weight_grad, bool bias_grad, bool) {
  const Products products(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LinearParams to_x, to_weight;
  const auto results = prepare_linear_backward(dy, x, weight, x_grad, weight_grad, bias_grad, Rows::kStrided, &to_x,
                                               &to_weight, allocator(x));
  if (x_grad) products.run(to_x);
  if (weight_grad) products.run(to_weight);
  if (bias_grad) {
    products.column_sum(dy.const_data_ptr(), row_stride(dy), dy.size(0), dy.size(1),
                        std::get<2>(results).mutable_data_ptr());
  }
  return results;
}

}  // namespace
}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("linear_forward", TORCH_BOX(&fastattn::cuda::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&fastattn::cuda::linear_backward));
}
