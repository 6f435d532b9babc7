// What the CPU and the CUDA operators of the feed-forward network do alike: check the tensors, allocate the results,
// fill params.h. What lies between two products (the hidden activations and their gradients) each allocates for itself.
#pragma once

#include <tuple>

#include "ops/linear.h"

namespace fastattn {

// x (M, K), M in as many dimensions as Rows allows; w_in, w_gate (F, K); w_out (O, F).
struct FfnWeights {
  const Tensor &x, &w_in;
  const OptionalTensor& w_gate;
  const Tensor& w_out;

  int64_t M() const { return rows_of(x); }
  int64_t K() const { return columns_of(x); }
  int64_t F() const { return w_in.size(0); }
  int64_t O() const { return w_out.size(0); }
  bool gated() const { return w_gate.has_value(); }
  ScalarType type() const { return x.scalar_type(); }
};

struct FfnOptions {
  int64_t activation;
  double dropout_p;
  const OptionalTensor& rng_state;
};

inline void check_ffn(const FfnWeights& w, const FfnOptions& options, Rows rows) {
  check_rows(w.x, w.type(), "ffn: x has no contiguous rows", rows);
  FASTATTN_CHECK(w.type() != ScalarType::Bool, "ffn: x is not floating");
  check_matrix(w.w_in, w.type(), "ffn: w_in is not a contiguous matrix of x's dtype", rows);
  check_matrix(w.w_out, w.type(), "ffn: w_out is not a contiguous matrix of x's dtype", rows);
  FASTATTN_CHECK(w.w_in.size(1) == w.K() && w.w_out.size(1) == w.F(), "ffn: the weights do not fit x");
  if (w.gated()) {
    check_matrix(*w.w_gate, w.type(), "ffn: w_gate is not a contiguous matrix of x's dtype", rows);
    FASTATTN_CHECK(w.w_gate->size(0) == w.F() && w.w_gate->size(1) == w.K(), "ffn: w_gate differs from w_in in shape");
  }
  FASTATTN_CHECK(options.activation >= 0 && options.activation <= static_cast<int>(Activation::kSilu),
                 "ffn: unknown activation");
}

inline void set_activation(LinearParams* p, const FfnOptions& options) {
  p->activation = static_cast<Activation>(options.activation);
  p->dropout = make_dropout(options.dropout_p, options.rng_state);
  p->dropout_scale = 1.0 / (1.0 - options.dropout_p);
}

using FfnResults = std::tuple<Tensor, Tensor, Tensor>;

// out. hidden: the first product (two with a gate) and its activation, c still to be set; result: the second product,
// whose A is that c.
template <class Allocate>
inline Tensor prepare_ffn_forward(const FfnWeights& w, const OptionalTensor& b_in, const OptionalTensor& b_gate,
                                  const OptionalTensor& b_out, const OptionalTensor& residual,
                                  const FfnOptions& options, Rows rows, LinearParams* hidden, LinearParams* result,
                                  Allocate&& allocate) {
  check_ffn(w, options, rows);
  check_bias(b_in, w.F(), w.type(), "ffn"), check_bias(b_gate, w.F(), w.type(), "ffn");
  check_bias(b_out, w.O(), w.type(), "ffn");
  check_residual(residual, w.x, w.O(), "ffn", rows);
  const DType dtype = dtype_of(w.x);
  const Tensor out = allocate(Shape(w.x, w.O()), w.type());
  *hidden = make_linear(dtype, w.M(), w.F(), w.K(), Epilogue::kActivation);
  hidden->product[0] = {
      w.x.const_data_ptr(), w.w_in.const_data_ptr(), row_stride(w.x), row_stride(w.w_in), false, true, nullptr};
  if (w.gated()) add_product(hidden, w.x.const_data_ptr(), w.w_gate->const_data_ptr(), row_stride(*w.w_gate), true);
  hidden->second_apart = w.gated();
  hidden->bias[0] = data_or_null(b_in), hidden->bias[1] = data_or_null(b_gate);
  set_activation(hidden, options);
  *result = make_linear(dtype, w.M(), w.O(), w.F(), Epilogue::kStore);
  result->product[0] = {nullptr, w.w_out.const_data_ptr(), w.F(), row_stride(w.w_out), false, true, nullptr};
  result->bias[0] = data_or_null(b_out);
  result->residual = data_or_null(residual);
  result->c = out.mutable_data_ptr();
  return out;
}

// (pre, gate) (M, F) for `hidden` to fill, (0,) unless kept.
template <class Allocate>
inline std::tuple<Tensor, Tensor> keep_preactivations(const FfnWeights& w, bool save_pre, LinearParams* hidden,
                                                      Allocate&& allocate) {
  const auto kept = [&](bool keep) { return keep ? allocate({w.M(), w.F()}, w.type()) : allocate({0}, w.type()); };
  const Tensor pre = kept(save_pre), gate = kept(save_pre && w.gated());
  hidden->pre = save_pre ? pre.mutable_data_ptr() : nullptr;
  hidden->gate = save_pre && w.gated() ? gate.mutable_data_ptr() : nullptr;
  return {pre, gate};
}

struct FfnGradients {
  Tensor dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> in_order() const {
    return {dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out};
  }
};

// The four (with a gate five) products of backward. inner gives dpre, dgate and the hidden activations c, which the
// others' operands are: all still to be set, and dgate's is to_w_in again.
struct FfnBackwardProducts {
  LinearParams inner, to_x, to_w_in, to_w_out;
};

// The gradients, (0,) where not wanted.
template <class Allocate>
inline FfnGradients prepare_ffn_backward(const FfnWeights& w, const Tensor& dout, const Tensor& pre, const Tensor& gate,
                                         const FfnOptions& options, bool x_grad, bool weight_grad, bool bias_grad,
                                         Rows rows, FfnBackwardProducts* p, Allocate&& allocate) {
  check_ffn(w, options, rows);
  check_matrix(dout, w.type(), "ffn: dout is not a contiguous matrix of x's dtype", rows);
  check_matrix(pre, w.type(), "ffn: pre is not a contiguous matrix of x's dtype");
  FASTATTN_CHECK(dout.size(0) == w.M() && dout.size(1) == w.O(), "ffn: dout does not fit w_out");
  FASTATTN_CHECK(pre.size(0) == w.M() && pre.size(1) == w.F(), "ffn: pre does not fit w_in");
  if (w.gated()) {
    check_matrix(gate, w.type(), "ffn: gate is not a contiguous matrix of x's dtype");
    FASTATTN_CHECK(gate.size(0) == w.M() && gate.size(1) == w.F(), "ffn: gate does not fit w_gate");
  }
  const auto wanted = [&](bool want, std::initializer_list<int64_t> shape) {
    return want ? allocate(shape, w.type()) : allocate({0}, w.type());
  };
  const FfnGradients g = {wanted(x_grad, {w.M(), w.K()}),
                          wanted(weight_grad, {w.F(), w.K()}),
                          wanted(bias_grad, {w.F()}),
                          wanted(weight_grad && w.gated(), {w.F(), w.K()}),
                          wanted(bias_grad && w.gated(), {w.F()}),
                          wanted(weight_grad, {w.O(), w.F()}),
                          wanted(bias_grad, {w.O()})};

  const DType dtype = dtype_of(w.x);
  const int64_t ld_dout = row_stride(dout), ld_x = row_stride(w.x);
  const int64_t ld_in = row_stride(w.w_in), ld_out = row_stride(w.w_out);
  p->inner = make_linear(dtype, w.M(), w.F(), w.O(), Epilogue::kActivationGrad);
  p->inner.product[0] = {dout.const_data_ptr(), w.w_out.const_data_ptr(), ld_dout, ld_out, false, false, nullptr};
  set_activation(&p->inner, options);
  p->inner.pre = const_cast<void*>(pre.const_data_ptr());
  p->inner.gate = w.gated() ? const_cast<void*>(gate.const_data_ptr()) : nullptr;
  p->to_x = make_linear(dtype, w.M(), w.K(), w.F(), Epilogue::kStore);
  p->to_x.product[0] = {nullptr, w.w_in.const_data_ptr(), w.F(), ld_in, false, false, nullptr};
  if (w.gated()) add_product(&p->to_x, nullptr, w.w_gate->const_data_ptr(), row_stride(*w.w_gate), false);
  p->to_w_in = make_linear(dtype, w.F(), w.K(), w.M(), Epilogue::kStore);
  p->to_w_in.product[0] = {nullptr, w.x.const_data_ptr(), w.F(), ld_x, true, false, nullptr};
  p->to_w_out = make_linear(dtype, w.O(), w.F(), w.M(), Epilogue::kStore);
  p->to_w_out.product[0] = {dout.const_data_ptr(), nullptr, ld_dout, w.F(), true, false, nullptr};
  if (x_grad) p->to_x.c = g.dx.mutable_data_ptr();
  if (weight_grad) p->to_w_in.c = g.dw_in.mutable_data_ptr(), p->to_w_out.c = g.dw_out.mutable_data_ptr();
  return g;
}

}  // namespace fastattn
