// The operators of `ffn` on CUDA behind LibTorch's stable ABI.
#include "cuda/products.h"
#include "ops/ffn.h"

namespace fastattn {
namespace cuda {
namespace {

// With no outputs (O = 0) nothing but pre and gate is computed: what a backward that kept neither asks for.
FfnResults ffn_forward(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const OptionalTensor& w_gate,
                       const OptionalTensor& b_gate, const Tensor& w_out, const OptionalTensor& b_out,
                       const OptionalTensor& residual, int64_t activation, double dropout_p,
                       const OptionalTensor& rng_state, bool save_pre, bool /* reduced_precision, of float32 */) {
  const Products products(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const FfnWeights w = {x, w_in, w_gate, w_out};
  LinearParams hidden, result;
  const Tensor out = prepare_ffn_forward(w, b_in, b_gate, b_out, residual, {activation, dropout_p, rng_state},
                                         Rows::kStrided, &hidden, &result, allocator(x));
  const auto [pre, gate] = keep_preactivations(w, save_pre, &hidden, allocator(x));
  const bool needed = w.O() > 0;
  if (!needed && !save_pre) return {out, pre, gate};
  const Tensor activations = needed ? products.empty({w.M(), w.F()}) : products.empty({0});
  hidden.c = needed ? activations.mutable_data_ptr() : nullptr;
  products.run(hidden);
  result.product[0].a = hidden.c;
  products.run(result, residual.has_value() ? row_stride(*residual) : 0);
  return {out, pre, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& dout, const Tensor& x, const Tensor& w_in, const OptionalTensor& w_gate, const Tensor& w_out,
    const Tensor& pre, const Tensor& gate, int64_t activation, double dropout_p, const OptionalTensor& rng_state,
    bool x_grad, bool weight_grad, bool bias_grad, bool) {
  const Products products(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const FfnWeights w = {x, w_in, w_gate, w_out};
  FfnBackwardProducts p;
  const FfnGradients gradients = prepare_ffn_backward(w, dout, pre, gate, {activation, dropout_p, rng_state}, x_grad,
                                                      weight_grad, bias_grad, Rows::kStrided, &p, allocator(x));
  const Tensor dpre = products.empty({w.M(), w.F()});
  const Tensor dgate = w.gated() ? products.empty({w.M(), w.F()}) : products.empty({0});
  const Tensor hidden = weight_grad ? products.empty({w.M(), w.F()}) : products.empty({0});
  p.inner.dpre = dpre.mutable_data_ptr();
  p.inner.dgate = w.gated() ? dgate.mutable_data_ptr() : nullptr;
  p.inner.c = weight_grad ? hidden.mutable_data_ptr() : nullptr;
  products.run_gradient(p.inner, bias_grad ? gradients.db_in.mutable_data_ptr() : nullptr,
                        bias_grad && w.gated() ? gradients.db_gate.mutable_data_ptr() : nullptr);
  if (x_grad) {
    p.to_x.product[0].a = p.inner.dpre, p.to_x.product[1].a = p.inner.dgate;
    products.run(p.to_x);
  }
  if (weight_grad) {
    p.to_w_in.product[0].a = p.inner.dpre;
    products.run(p.to_w_in);
    if (w.gated()) {
      p.to_w_in.product[0].a = p.inner.dgate;
      p.to_w_in.c = gradients.dw_gate.mutable_data_ptr();
      products.run(p.to_w_in);
    }
    p.to_w_out.product[0].b = p.inner.c;
    products.run(p.to_w_out);
  }
  if (bias_grad) {
    products.column_sum(dout.const_data_ptr(), row_stride(dout), w.M(), w.O(), gradients.db_out.mutable_data_ptr());
  }
  return gradients.in_order();
}

}  // namespace
}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("ffn_forward", TORCH_BOX(&fastattn::cuda::ffn_forward));
  m.impl("ffn_backward", TORCH_BOX(&fastattn::cuda::ffn_backward));
}
