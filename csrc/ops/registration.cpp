// The catalogue: which C++ function implements which operator on the CPU. Schemas are in fastattn/ops/_library.py.
#include <tuple>

#include "ops/norm.h"
#include "ops/tensor.h"

namespace fastattn {
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate);
void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate);

NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state);
Tensor norm_inference(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t columns,
                      double eps, bool rms);
NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad);

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const OptionalTensor& attn_mask,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     double softmax_scale, int64_t window_left, int64_t window_right,
                                                     int64_t diagonal, double softcap, double dropout_p,
                                                     const OptionalTensor& rng_state, const OptionalTensor& sequences,
                                                     const OptionalTensor& block_table, bool reduced_precision);
Tensor attention_inference(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask,
                           const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
                           int64_t window_left, int64_t window_right, int64_t diagonal, double softcap,
                           double dropout_p, const OptionalTensor& rng_state, const OptionalTensor& sequences,
                           const OptionalTensor& block_table, bool reduced_precision);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, double dropout_p, const OptionalTensor& rng_state, bool mask_grad, bool slopes_grad,
    bool sinks_grad, const OptionalTensor& sequences, const OptionalTensor& statistics, bool reduced_precision);

Tensor attention_weights(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& attn_mask,
                         const OptionalTensor& alibi_slopes, double softmax_scale, int64_t window_left,
                         int64_t window_right, int64_t diagonal, double softcap, double dropout_p,
                         const OptionalTensor& rng_state, bool average, bool reduced_precision);

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      bool reduced_precision);
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool x_grad,
                                                   bool weight_grad, bool bias_grad, bool reduced_precision);

std::tuple<Tensor, Tensor, Tensor> ffn_forward(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in,
                                               const OptionalTensor& w_gate, const OptionalTensor& b_gate,
                                               const Tensor& w_out, const OptionalTensor& b_out,
                                               const OptionalTensor& residual, int64_t activation, double dropout_p,
                                               const OptionalTensor& rng_state, bool save_pre, bool reduced_precision);
Tensor ffn_inference(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const OptionalTensor& w_gate,
                     const OptionalTensor& b_gate, const Tensor& w_out, const OptionalTensor& b_out,
                     const OptionalTensor& residual, int64_t activation, bool reduced_precision);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& dout, const Tensor& x, const Tensor& w_in, const OptionalTensor& w_gate, const Tensor& w_out,
    const Tensor& pre, const Tensor& gate, int64_t activation, double dropout_p, const OptionalTensor& rng_state,
    bool x_grad, bool weight_grad, bool bias_grad, bool reduced_precision);

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& class_weight, int64_t ignore_index,
                                                 double label_smoothing, double softcap, double z_loss,
                                                 int64_t reduction);
Tensor cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& class_weight, const Tensor& statistics, int64_t ignore_index,
                              double label_smoothing, double softcap, double z_loss, int64_t reduction);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, int64_t reduction, bool x_grad, bool weight_grad,
    bool bias_grad, bool reduced_precision);
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& dloss, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const Tensor& statistics, int64_t ignore_index, double label_smoothing, double softcap, double z_loss,
    int64_t reduction, bool x_grad, bool weight_grad, bool bias_grad, bool reduced_precision);
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::attention_forward));
  m.impl("attention_inference", TORCH_BOX(&fastattn::attention_inference));
  m.impl("attention_backward", TORCH_BOX(&fastattn::attention_backward));
  m.impl("attention_weights", TORCH_BOX(&fastattn::attention_weights));
  m.impl("rope", TORCH_BOX(&fastattn::rope));
  m.impl("rope_", TORCH_BOX(&fastattn::rope_));

  m.impl("norm_forward", TORCH_BOX(&fastattn::norm_forward));
  m.impl("norm_inference", TORCH_BOX(&fastattn::norm_inference));
  m.impl("norm_backward", TORCH_BOX(&fastattn::norm_backward));
  m.impl("linear_forward", TORCH_BOX(&fastattn::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&fastattn::linear_backward));
  m.impl("ffn_forward", TORCH_BOX(&fastattn::ffn_forward));
  m.impl("ffn_inference", TORCH_BOX(&fastattn::ffn_inference));
  m.impl("ffn_backward", TORCH_BOX(&fastattn::ffn_backward));

  m.impl("cross_entropy_forward", TORCH_BOX(&fastattn::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastattn::cross_entropy_backward));
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastattn::linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastattn::linear_cross_entropy_backward));
}
