#include <algorithm>
#include <tuple>

#include "cpu/kernel_table.h"
#include "cpu/scratch.h"
#include "ops/linear.h"

namespace fastattn {
namespace {

// Rows whose hidden activations exist at a time when they are not kept for backward.
constexpr int64_t kChunkRows = 2048;

struct Sizes {
  int64_t M, K, F, O, element;
  bool gated;
};

Sizes check(const Tensor& x, const Tensor& w_in, const OptionalTensor& w_gate, const Tensor& w_out,
            int64_t activation) {
  const ScalarType type = x.scalar_type();
  check_matrix(x, type, "ffn: x is not a contiguous matrix");
  check_matrix(w_in, type, "ffn: w_in is not a contiguous matrix of x's dtype");
  check_matrix(w_out, type, "ffn: w_out is not a contiguous matrix of x's dtype");
  const Sizes s = {x.size(0),         x.size(1), w_in.size(0), w_out.size(0), static_cast<int64_t>(x.element_size()),
                   w_gate.has_value()};
  FASTATTN_CHECK(w_in.size(1) == s.K && w_out.size(1) == s.F, "ffn: the weights do not fit x");
  if (s.gated) {
    check_matrix(*w_gate, type, "ffn: w_gate is not a contiguous matrix of x's dtype");
    FASTATTN_CHECK(w_gate->size(0) == s.F && w_gate->size(1) == s.K, "ffn: w_gate differs from w_in in shape");
  }
  FASTATTN_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::kSilu), "ffn: unknown activation");
  return s;
}

void set_activation(LinearParams* p, int64_t activation, double dropout_p, const OptionalTensor& rng_state) {
  p->activation = static_cast<Activation>(activation);
  p->dropout = make_dropout(dropout_p, rng_state);
  p->dropout_scale = 1.0 / (1.0 - dropout_p);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ffn_forward(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in,
                                               const OptionalTensor& w_gate, const OptionalTensor& b_gate,
                                               const Tensor& w_out, const OptionalTensor& b_out,
                                               const OptionalTensor& residual, int64_t activation, double dropout_p,
                                               const OptionalTensor& rng_state, bool save_pre, bool reduced_precision) {
  const Sizes s = check(x, w_in, w_gate, w_out, activation);
  const ScalarType type = x.scalar_type();
  check_bias(b_in, s.F, type, "ffn"), check_bias(b_gate, s.F, type, "ffn"), check_bias(b_out, s.O, type, "ffn");
  check_residual(residual, s.M, s.O, type, "ffn");
  const Tensor out = empty({s.M, s.O}, type);
  const Tensor pre = save_pre ? empty({s.M, s.F}, type) : none(x);
  const Tensor gate = save_pre && s.gated ? empty({s.M, s.F}, type) : none(x);

  const KernelTable& table = kernels_of(x, reduced_precision);
  const DType dtype = dtype_of(x);
  LinearParams hidden = make_linear(dtype, s.M, s.F, s.K, Epilogue::kActivation);
  hidden.product[0] = {x.const_data_ptr(), w_in.const_data_ptr(), s.K, s.K, false, true, nullptr};
  add_product(&hidden, x.const_data_ptr(), data_or_null(w_gate), true);
  hidden.second_apart = s.gated;
  hidden.bias[0] = data_or_null(b_in), hidden.bias[1] = data_or_null(b_gate);
  set_activation(&hidden, activation, dropout_p, rng_state);
  LinearParams result = make_linear(dtype, s.M, s.O, s.F, Epilogue::kStore);
  result.product[0] = {nullptr, w_out.const_data_ptr(), s.F, s.F, false, true, nullptr};
  result.bias[0] = data_or_null(b_out);

  const size_t hidden_bytes = (std::min(s.M, kChunkRows) * s.F * s.element + 63) / 64 * 64;
  const size_t in_bytes = plan(table, &hidden), out_bytes = plan(table, &result);
  const CallScratch scratch(hidden_bytes + in_bytes + out_bytes);
  char* const buffer = static_cast<char*>(scratch.data());
  pack(table, &hidden, buffer + hidden_bytes);
  pack(table, &result, buffer + hidden_bytes + in_bytes);
  const auto rows_of = [&](const void* base, int64_t row, int64_t columns) {
    return const_cast<char*>(static_cast<const char*>(base)) + row * columns * s.element;
  };
  for (int64_t row = 0; row < s.M; row += kChunkRows) {
    hidden.M = result.M = std::min(kChunkRows, s.M - row);
    hidden.first_row = row;
    for (int i = 0; i < hidden.products; ++i) hidden.product[i].a = rows_of(x.const_data_ptr(), row, s.K);
    hidden.c = buffer;
    hidden.pre = save_pre ? rows_of(pre.mutable_data_ptr(), row, s.F) : nullptr;
    hidden.gate = save_pre && s.gated ? rows_of(gate.mutable_data_ptr(), row, s.F) : nullptr;
    multiply(table, &hidden);
    result.product[0].a = buffer;
    result.residual = residual.has_value() ? rows_of(residual->const_data_ptr(), row, s.O) : nullptr;
    result.c = rows_of(out.mutable_data_ptr(), row, s.O);
    multiply(table, &result);
  }
  return {out, pre, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& dout, const Tensor& x, const Tensor& w_in, const OptionalTensor& w_gate, const Tensor& w_out,
    const Tensor& pre, const Tensor& gate, int64_t activation, double dropout_p, const OptionalTensor& rng_state,
    bool x_grad, bool weight_grad, bool bias_grad, bool reduced_precision) {
  const Sizes s = check(x, w_in, w_gate, w_out, activation);
  const ScalarType type = x.scalar_type(), sums_type = accumulation_type(type);
  check_matrix(dout, type, "ffn: dout is not a contiguous matrix of x's dtype");
  check_matrix(pre, type, "ffn: pre is not a contiguous matrix of x's dtype");
  FASTATTN_CHECK(dout.size(0) == s.M && dout.size(1) == s.O, "ffn: dout does not fit w_out");
  FASTATTN_CHECK(pre.size(0) == s.M && pre.size(1) == s.F, "ffn: pre does not fit w_in");
  if (s.gated) {
    check_matrix(gate, type, "ffn: gate is not a contiguous matrix of x's dtype");
    FASTATTN_CHECK(gate.size(0) == s.M && gate.size(1) == s.F, "ffn: gate does not fit w_gate");
  }
  const Tensor dx = x_grad ? empty({s.M, s.K}, type) : none(x);
  const Tensor dw_in = weight_grad ? empty({s.F, s.K}, type) : none(x);
  const Tensor dw_gate = weight_grad && s.gated ? empty({s.F, s.K}, type) : none(x);
  const Tensor dw_out = weight_grad ? empty({s.O, s.F}, type) : none(x);
  const Tensor db_in = bias_grad ? empty({s.F}, type) : none(x);
  const Tensor db_gate = bias_grad && s.gated ? empty({s.F}, type) : none(x);
  const Tensor db_out = bias_grad ? empty({s.O}, type) : none(x);

  const KernelTable& table = kernels_of(x, reduced_precision);
  const DType dtype = dtype_of(x), sums_dtype = sums_type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  LinearParams inner = make_linear(dtype, s.M, s.F, s.O, Epilogue::kActivationGrad);
  inner.product[0] = {dout.const_data_ptr(), w_out.const_data_ptr(), s.O, s.F, false, false, nullptr};
  set_activation(&inner, activation, dropout_p, rng_state);
  inner.pre = const_cast<void*>(pre.const_data_ptr());
  inner.gate = s.gated ? const_cast<void*>(gate.const_data_ptr()) : nullptr;
  LinearParams to_x = make_linear(dtype, s.M, s.K, s.F, Epilogue::kStore);
  to_x.product[0] = {nullptr, w_in.const_data_ptr(), s.F, s.K, false, false, nullptr};
  add_product(&to_x, nullptr, data_or_null(w_gate), false);
  LinearParams to_w_in = make_linear(dtype, s.F, s.K, s.M, Epilogue::kStore);
  to_w_in.product[0] = {nullptr, x.const_data_ptr(), s.F, s.K, true, false, nullptr};
  LinearParams to_w_out = make_linear(dtype, s.O, s.F, s.M, Epilogue::kStore);
  to_w_out.product[0] = {dout.const_data_ptr(), nullptr, s.O, s.F, true, false, nullptr};

  // One buffer: the gradients of pre and gate, the hidden activations again, column sums per row block, and packed
  // operands in turn.
  const size_t matrix = (s.M * s.F * s.element + 63) / 64 * 64;
  const int64_t row_blocks = blocks_of(s.M, kRowBlock);
  const size_t sums = bias_grad ? (row_blocks * s.F * 8 + 63) / 64 * 64 : 0;
  const size_t packed =
      std::max({plan(table, &inner), plan(table, &to_x), plan(table, &to_w_in), plan(table, &to_w_out)});
  const CallScratch scratch(matrix * (s.gated ? 3 : 2) + 2 * sums + packed);
  ScratchCursor cursor(scratch.data());
  void* const pack_buffer = cursor.take<char>(packed);
  inner.dpre = cursor.take<char>(matrix);
  inner.c = weight_grad ? cursor.take<char>(matrix) : nullptr;
  inner.dgate = s.gated ? cursor.take<char>(matrix) : nullptr;
  inner.dpre_sums = bias_grad ? cursor.take<char>(sums) : nullptr;
  inner.dgate_sums = bias_grad ? cursor.take<char>(sums) : nullptr;

  pack(table, &inner, pack_buffer);
  multiply(table, &inner);
  if (x_grad) {
    to_x.product[0].a = inner.dpre, to_x.product[1].a = inner.dgate;
    to_x.c = dx.mutable_data_ptr();
    pack(table, &to_x, pack_buffer);
    multiply(table, &to_x);
  }
  if (weight_grad) {
    to_w_in.product[0].a = inner.dpre;
    to_w_in.c = dw_in.mutable_data_ptr();
    pack(table, &to_w_in, pack_buffer);
    multiply(table, &to_w_in);
    if (s.gated) {
      to_w_in.product[0].a = inner.dgate;
      to_w_in.c = dw_gate.mutable_data_ptr();
      multiply(table, &to_w_in);
    }
    to_w_out.product[0].b = inner.c;
    to_w_out.c = dw_out.mutable_data_ptr();
    pack(table, &to_w_out, pack_buffer);
    multiply(table, &to_w_out);
  }
  if (bias_grad) {
    column_sums(table, sums_dtype, dtype, row_blocks, s.F, inner.dpre_sums, db_in.mutable_data_ptr());
    if (s.gated) column_sums(table, sums_dtype, dtype, row_blocks, s.F, inner.dgate_sums, db_gate.mutable_data_ptr());
    column_sums(table, dtype, dtype, s.M, s.O, dout.const_data_ptr(), db_out.mutable_data_ptr());
  }
  return {dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out};
}

}  // namespace fastattn
