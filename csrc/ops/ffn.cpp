#include "ops/ffn.h"

#include <algorithm>
#include <tuple>

#include "cpu/kernel_table.h"
#include "cpu/scratch.h"

namespace fastattn {
namespace {

// Rows whose hidden activations exist at a time when they are not kept for backward.
constexpr int64_t kChunkRows = 2048;

// Both products, as prepare_ffn_forward left them, in chunks of rows.
void run_forward(const FfnWeights& w, LinearParams hidden, LinearParams result, bool reduced_precision) {
  const LinearParams whole = hidden, whole_result = result;
  const int64_t M = hidden.M, F = hidden.N, K = hidden.K, O = result.N, element = w.x.element_size();
  const KernelTable& table = kernels_of(w.x, reduced_precision);
  const size_t hidden_bytes = (std::min(M, kChunkRows) * F * element + 63) / 64 * 64;
  const size_t in_bytes = plan(table, &hidden), out_bytes = plan(table, &result);
  const CallScratch scratch(hidden_bytes + in_bytes + out_bytes);
  char* const buffer = static_cast<char*>(scratch.data());
  pack(table, &hidden, buffer + hidden_bytes);
  pack(table, &result, buffer + hidden_bytes + in_bytes);
  const auto from_row = [&](const void* base, int64_t row, int64_t columns) {
    if (base == nullptr) return static_cast<char*>(nullptr);
    return const_cast<char*>(static_cast<const char*>(base)) + row * columns * element;
  };
  for (int64_t row = 0; row < M; row += kChunkRows) {
    hidden.M = result.M = std::min(kChunkRows, M - row);
    hidden.first_row = row;
    for (int i = 0; i < hidden.products; ++i) hidden.product[i].a = from_row(whole.product[i].a, row, K);
    hidden.c = buffer;
    hidden.pre = from_row(whole.pre, row, F);
    hidden.gate = from_row(whole.gate, row, F);
    multiply(table, &hidden);
    result.product[0].a = buffer;
    result.residual = from_row(whole_result.residual, row, O);
    result.c = from_row(whole_result.c, row, O);
    multiply(table, &result);
  }
}

}  // namespace

FfnResults ffn_forward(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const OptionalTensor& w_gate,
                       const OptionalTensor& b_gate, const Tensor& w_out, const OptionalTensor& b_out,
                       const OptionalTensor& residual, int64_t activation, double dropout_p,
                       const OptionalTensor& rng_state, bool save_pre, bool reduced_precision) {
  const FfnWeights w = {x, w_in, w_gate, w_out};
  LinearParams hidden, result;
  const Tensor out = prepare_ffn_forward(w, b_in, b_gate, b_out, residual, {activation, dropout_p, rng_state},
                                         Rows::kContiguous, &hidden, &result, empty);
  const auto [pre, gate] = keep_preactivations(w, save_pre, &hidden, empty);
  run_forward(w, hidden, result, reduced_precision);
  return {out, pre, gate};
}

Tensor ffn_inference(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const OptionalTensor& w_gate,
                     const OptionalTensor& b_gate, const Tensor& w_out, const OptionalTensor& b_out,
                     const OptionalTensor& residual, int64_t activation, bool reduced_precision) {
  const FfnWeights w = {x, w_in, w_gate, w_out};
  LinearParams hidden, result;
  const Tensor out = prepare_ffn_forward(w, b_in, b_gate, b_out, residual, {activation, 0.0, std::nullopt},
                                         Rows::kContiguous, &hidden, &result, empty);
  run_forward(w, hidden, result, reduced_precision);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& dout, const Tensor& x, const Tensor& w_in, const OptionalTensor& w_gate, const Tensor& w_out,
    const Tensor& pre, const Tensor& gate, int64_t activation, double dropout_p, const OptionalTensor& rng_state,
    bool x_grad, bool weight_grad, bool bias_grad, bool reduced_precision) {
  const FfnWeights w = {x, w_in, w_gate, w_out};
  FfnBackwardProducts products;
  const FfnGradients gradients = prepare_ffn_backward(w, dout, pre, gate, {activation, dropout_p, rng_state}, x_grad,
                                                      weight_grad, bias_grad, Rows::kContiguous, &products, empty);
  auto& [inner, to_x, to_w_in, to_w_out] = products;
  const KernelTable& table = kernels_of(x, reduced_precision);
  const DType dtype = dtype_of(x);
  const DType sums_dtype = accumulation_type(w.type()) == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  const int64_t M = w.M(), F = w.F();

  // One buffer: the gradients of pre and gate, the hidden activations again, column sums per row block, and packed
  // operands in turn.
  const size_t matrix = (M * F * x.element_size() + 63) / 64 * 64;
  const int64_t row_blocks = blocks_of(M, kRowBlock);
  const size_t sums = bias_grad ? (row_blocks * F * 8 + 63) / 64 * 64 : 0;
  const size_t packed =
      std::max({plan(table, &inner), plan(table, &to_x), plan(table, &to_w_in), plan(table, &to_w_out)});
  const CallScratch scratch(matrix * (w.gated() ? 3 : 2) + 2 * sums + packed);
  ScratchCursor cursor(scratch.data());
  void* const pack_buffer = cursor.take<char>(packed);
  inner.dpre = cursor.take<char>(matrix);
  inner.c = weight_grad ? cursor.take<char>(matrix) : nullptr;
  inner.dgate = w.gated() ? cursor.take<char>(matrix) : nullptr;
  inner.dpre_sums = bias_grad ? cursor.take<char>(sums) : nullptr;
  inner.dgate_sums = bias_grad ? cursor.take<char>(sums) : nullptr;

  pack(table, &inner, pack_buffer);
  multiply(table, &inner);
  if (x_grad) {
    to_x.product[0].a = inner.dpre, to_x.product[1].a = inner.dgate;
    pack(table, &to_x, pack_buffer);
    multiply(table, &to_x);
  }
  if (weight_grad) {
    to_w_in.product[0].a = inner.dpre;
    pack(table, &to_w_in, pack_buffer);
    multiply(table, &to_w_in);
    if (w.gated()) {
      to_w_in.product[0].a = inner.dgate;
      to_w_in.c = gradients.dw_gate.mutable_data_ptr();
      multiply(table, &to_w_in);
    }
    to_w_out.product[0].b = inner.c;
    pack(table, &to_w_out, pack_buffer);
    multiply(table, &to_w_out);
  }
  if (bias_grad) {
    column_sums(table, sums_dtype, dtype, row_blocks, F, inner.dpre_sums, gradients.db_in.mutable_data_ptr());
    if (w.gated()) {
      column_sums(table, sums_dtype, dtype, row_blocks, F, inner.dgate_sums, gradients.db_gate.mutable_data_ptr());
    }
    column_sums(table, dtype, dtype, M, w.O(), dout.const_data_ptr(), gradients.db_out.mutable_data_ptr());
  }
  return gradients.in_order();
}

}  // namespace fastattn
