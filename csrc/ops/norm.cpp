#include <algorithm>
#include <tuple>

#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {

namespace {

// Below this many elements a thread's work is shorter than waking it up.
constexpr int64_t kElementsPerThread = 32768;

bool has_unit_columns(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 || x.numel() == 0; }

void check_rows(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t.has_value()) return;
  FASTATTN_CHECK(t->dim() == 2 && t->size(0) == like.size(0) && t->size(1) == like.size(1) &&
                     t->scalar_type() == like.scalar_type() && t->is_cpu() && has_unit_columns(*t),
                 "norm: ", name, " is not a tensor of the shape, dtype and device of x with unit last stride");
}

void check_columns(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t.has_value()) return;
  FASTATTN_CHECK(t->dim() == 1 && t->size(0) == like.size(1) && t->is_contiguous() && t->is_cpu() &&
                     (t->scalar_type() == like.scalar_type() || t->scalar_type() == ScalarType::Float),
                 "norm: ", name, " is not a contiguous (columns,) tensor in the dtype of x or float32");
}

void check_statistics(const Tensor& t, const Tensor& like, const char* name) {
  FASTATTN_CHECK(t.dim() == 1 && t.size(0) == like.size(0) && t.is_contiguous() && t.is_cpu() &&
                     t.scalar_type() == accumulation_type(like.scalar_type()),
                 "norm: ", name, " is not a contiguous (rows,) tensor in the accumulation dtype");
}

ScalarType weight_type(const Tensor& like, const OptionalTensor& weight, const OptionalTensor& bias) {
  return weight.has_value() ? weight->scalar_type() : bias.has_value() ? bias->scalar_type() : like.scalar_type();
}

DType dtype_from(ScalarType type) { return dtype_of(empty({0}, type)); }

// Rows of a chunk of the weight gradients: a function of the shape alone, so that results never depend on threads. At
// most 64 chunks (their partial sums are read again at the end), of at least 16 rows (so that partial sums are little
// traffic).
int64_t chunk_rows_for(int64_t rows) { return std::max<int64_t>((rows + 63) / 64, 16); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const OptionalTensor& residual,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double eps, bool rms, double dropout_p,
                                                        const OptionalTensor& rng_state) {
  FASTATTN_CHECK(x.dim() == 2 && has_unit_columns(x), "norm: x is not 2-D with unit last stride");
  check_rows(residual, x, "residual");
  check_columns(weight, x, "weight");
  check_columns(bias, x, "bias");
  FASTATTN_CHECK(!weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
                 "norm: weight and bias differ in dtype");
  const ScalarType type = x.scalar_type();
  NormForwardParams p;
  p.dtype = dtype_of(x), p.weight_dtype = dtype_from(weight_type(x, weight, bias));
  p.rows = x.size(0), p.columns = x.size(1);
  p.dropout = make_dropout(dropout_p, rng_state);

  const bool changed = residual.has_value() || dropout_p > 0;
  const Tensor y = empty({p.rows, p.columns}, type), h = changed ? empty({p.rows, p.columns}, type) : none(x);
  const Tensor rstd = empty({p.rows}, accumulation_type(type)),
               mean = rms ? none(rstd) : empty({p.rows}, accumulation_type(type));
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
  p.residual = data_or_null(residual), p.residual_stride = residual.has_value() ? residual->stride(0) : 0;
  p.weight = data_or_null(weight), p.bias = data_or_null(bias);
  p.y = y.mutable_data_ptr(), p.h = changed ? h.mutable_data_ptr() : nullptr;
  p.mean = rms ? nullptr : mean.mutable_data_ptr(), p.rstd = rstd.mutable_data_ptr();
  p.eps = eps, p.rms = rms;

  const KernelTable& table = kernels();
  const int64_t grain = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(p.columns, 1), 1);
  parallel_for(p.rows, grain, [&](Range range) { table.norm_forward(p, range); });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                                                         const OptionalTensor& weight, const Tensor& mean,
                                                         const Tensor& rstd, bool rms, double dropout_p,
                                                         const OptionalTensor& rng_state, bool weight_grad,
                                                         bool bias_grad) {
  FASTATTN_CHECK(h.dim() == 2 && has_unit_columns(h), "norm: h is not 2-D with unit last stride");
  check_rows(dy, h, "dy");
  check_rows(dh, h, "dh");
  check_columns(weight, h, "weight");
  check_statistics(rstd, h, "rstd");
  if (!rms) check_statistics(mean, h, "mean");
  const ScalarType type = h.scalar_type(), parameter_type = weight_type(h, weight, std::nullopt);
  NormBackwardParams p;
  p.dtype = dtype_of(h), p.weight_dtype = dtype_from(parameter_type);
  p.rows = h.size(0), p.columns = h.size(1), p.chunk_rows = chunk_rows_for(p.rows);
  p.dropout = make_dropout(dropout_p, rng_state);

  const bool dropped = dropout_p > 0;
  const Tensor dh_total = empty({p.rows, p.columns}, type), dx = dropped ? empty({p.rows, p.columns}, type) : none(h);
  const Tensor dweight = weight_grad ? empty({p.columns}, parameter_type) : none(h);
  const Tensor dbias = bias_grad ? empty({p.columns}, parameter_type) : none(h);
  const int64_t chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
  const ScalarType sum_type = accumulation_type(type);
  const Tensor partial_dweight = empty({weight_grad || bias_grad ? chunks : 0, p.columns}, sum_type);
  const Tensor partial_dbias = empty({bias_grad ? chunks : 0, p.columns}, sum_type);

  p.dy = dy.const_data_ptr(), p.dy_stride = dy.stride(0);
  p.dh = data_or_null(dh), p.dh_stride = dh.has_value() ? dh->stride(0) : 0;
  p.h = h.const_data_ptr(), p.h_stride = h.stride(0);
  p.weight = data_or_null(weight);
  p.mean = rms ? nullptr : mean.const_data_ptr(), p.rstd = rstd.const_data_ptr();
  p.dh_total = dh_total.mutable_data_ptr(), p.dx = dropped ? dx.mutable_data_ptr() : nullptr;
  p.partial_dweight = weight_grad || bias_grad ? partial_dweight.mutable_data_ptr() : nullptr;
  p.partial_dbias = bias_grad ? partial_dbias.mutable_data_ptr() : nullptr;
  p.dweight = weight_grad ? dweight.mutable_data_ptr() : nullptr,
  p.dbias = bias_grad ? dbias.mutable_data_ptr() : nullptr;
  p.rms = rms;

  const KernelTable& table = kernels();
  const int64_t columns = std::max<int64_t>(p.columns, 1);
  const int64_t grain = std::max<int64_t>(kElementsPerThread / (columns * p.chunk_rows), 1);
  parallel_for(chunks, grain, [&](Range range) { table.norm_backward(p, range); });
  if (weight_grad || bias_grad) {
    const int64_t strip = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(chunks, 1), 64);
    parallel_for(p.columns, strip, [&](Range range) { table.norm_backward_reduce(p, range); });
  }
  return {dh_total, dx, dweight, dbias};
}

}  // namespace fastattn
