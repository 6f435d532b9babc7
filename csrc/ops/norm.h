// What the CPU and the CUDA operator do alike: check the tensors, allocate the results, fill params.h.
#pragma once

#include <tuple>

#include "ops/tensor.h"

namespace fastattn {

// Column indices are 32-bit on CUDA, a block's stride beyond the row included.
constexpr int64_t kMaxColumns = (int64_t{1} << 31) - (1 << 16);

using NormResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline bool has_unit_columns(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 || x.numel() == 0; }

inline void check_rows(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t.has_value()) return;
  FASTATTN_CHECK(t->dim() == 2 && t->size(0) == like.size(0) && t->size(1) == like.size(1) &&
                     t->scalar_type() == like.scalar_type() && t->device() == like.device() && has_unit_columns(*t),
                 "norm: ", name, " is not a tensor of the shape, dtype and device of x with unit last stride");
}

inline void check_columns(const OptionalTensor& t, const Tensor& like, int64_t columns, const char* name) {
  if (!t.has_value()) return;
  FASTATTN_CHECK(t->dim() == 1 && t->size(0) == columns && t->is_contiguous() && t->device() == like.device() &&
                     (t->scalar_type() == like.scalar_type() || t->scalar_type() == ScalarType::Float),
                 "norm: ", name, " is not a contiguous (columns,) tensor in the dtype of x or float32, on its device");
}

inline void check_parameters(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x,
                             int64_t columns) {
  FASTATTN_CHECK(columns <= kMaxColumns, "norm: more than ", kMaxColumns, " columns");
  check_columns(weight, x, columns, "weight");
  check_columns(bias, x, columns, "bias");
  FASTATTN_CHECK(!weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
                 "norm: weight and bias differ in dtype");
}

inline void check_statistics(const Tensor& t, const Tensor& like, const char* name) {
  FASTATTN_CHECK(t.dim() == 1 && t.size(0) == like.size(0) && t.is_contiguous() && t.device() == like.device() &&
                     t.scalar_type() == accumulation_type(like.scalar_type()),
                 "norm: ", name, " is not a contiguous (rows,) tensor in the accumulation dtype");
}

// dtype_of for a type that no tensor of the call need have.
inline DType parameter_dtype(ScalarType type, const Tensor& like) {
  return type == ScalarType::Float ? DType::kFloat32 : dtype_of(like);
}

// allocate(shape, type) gives an empty tensor on x's device.
template <class Allocate>
inline NormResults prepare_norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                        const OptionalTensor& bias, double eps, bool rms, const Dropout& dropout,
                                        NormForwardParams* p, Allocate&& allocate) {
  FASTATTN_CHECK(x.dim() == 2 && has_unit_columns(x), "norm: x is not 2-D with unit last stride");
  check_rows(residual, x, "residual");
  check_parameters(weight, bias, x, x.size(1));
  const ScalarType type = x.scalar_type(), statistics = accumulation_type(type);
  const OptionalTensor& parameter = weight.has_value() ? weight : bias;
  p->dtype = dtype_of(x), p->weight_dtype = parameter_dtype(parameter.has_value() ? parameter->scalar_type() : type, x);
  p->rows = x.size(0), p->columns = x.size(1);
  p->dropout = dropout;

  const bool changed = residual.has_value() || dropout.threshold > 0;
  const Tensor y = allocate({p->rows, p->columns}, type);
  const Tensor h = changed ? allocate({p->rows, p->columns}, type) : allocate({0}, type);
  const Tensor mean = rms ? allocate({0}, statistics) : allocate({p->rows}, statistics);
  const Tensor rstd = allocate({p->rows}, statistics);
  p->x = x.const_data_ptr(), p->x_stride = x.stride(0);
  p->residual = data_or_null(residual), p->residual_stride = residual.has_value() ? residual->stride(0) : 0;
  p->weight = data_or_null(weight), p->bias = data_or_null(bias);
  p->y = y.mutable_data_ptr(), p->h = changed ? h.mutable_data_ptr() : nullptr;
  p->mean = rms ? nullptr : mean.mutable_data_ptr(), p->rstd = rstd.mutable_data_ptr();
  p->eps = eps, p->rms = rms, p->stream = false;
  return {y, h, mean, rstd};
}

// Also allocates the partial sums, which live as long as `partials`. chunk_rows(rows, columns, element size) gives a
// chunk's rows.
template <class Allocate, class ChunkRows>
inline NormResults prepare_norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                                         const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd, bool rms,
                                         const Dropout& dropout, bool weight_grad, bool bias_grad,
                                         NormBackwardParams* p, std::tuple<Tensor, Tensor>* partials,
                                         Allocate&& allocate, ChunkRows&& chunk_rows) {
  FASTATTN_CHECK(h.dim() == 2 && has_unit_columns(h), "norm: h is not 2-D with unit last stride");
  check_rows(dy, h, "dy");
  check_rows(dh, h, "dh");
  check_columns(weight, h, h.size(1), "weight");
  check_statistics(rstd, h, "rstd");
  if (!rms) check_statistics(mean, h, "mean");
  const ScalarType type = h.scalar_type(), parameter_type = weight.has_value() ? weight->scalar_type() : type;
  p->dtype = dtype_of(h), p->weight_dtype = parameter_dtype(parameter_type, h);
  p->rows = h.size(0), p->columns = h.size(1);
  p->chunk_rows = chunk_rows(p->rows, p->columns, static_cast<int>(h.element_size()));
  p->dropout = dropout;

  const bool dropped = dropout.threshold > 0;
  const Tensor dh_total = allocate({p->rows, p->columns}, type);
  const Tensor dx = dropped ? allocate({p->rows, p->columns}, type) : allocate({0}, type);
  const Tensor dweight = weight_grad ? allocate({p->columns}, parameter_type) : allocate({0}, type);
  const Tensor dbias = bias_grad ? allocate({p->columns}, parameter_type) : allocate({0}, type);
  const int64_t chunks = (p->rows + p->chunk_rows - 1) / p->chunk_rows;
  auto& [partial_dweight, partial_dbias] = *partials;
  partial_dweight = allocate({weight_grad || bias_grad ? chunks : 0, p->columns}, accumulation_type(type));
  partial_dbias = allocate({bias_grad ? chunks : 0, p->columns}, accumulation_type(type));

  p->dy = dy.const_data_ptr(), p->dy_stride = dy.stride(0);
  p->dh = data_or_null(dh), p->dh_stride = dh.has_value() ? dh->stride(0) : 0;
  p->h = h.const_data_ptr(), p->h_stride = h.stride(0);
  p->weight = data_or_null(weight);
  p->mean = rms ? nullptr : mean.const_data_ptr(), p->rstd = rstd.const_data_ptr();
  p->dh_total = dh_total.mutable_data_ptr(), p->dx = dropped ? dx.mutable_data_ptr() : nullptr;
  p->partial_dweight = weight_grad || bias_grad ? partial_dweight.mutable_data_ptr() : nullptr;
  p->partial_dbias = bias_grad ? partial_dbias.mutable_data_ptr() : nullptr;
  p->dweight = weight_grad ? dweight.mutable_data_ptr() : nullptr;
  p->dbias = bias_grad ? dbias.mutable_data_ptr() : nullptr;
  p->rms = rms, p->stream = false;
  return {dh_total, dx, dweight, dbias};
}

}  // namespace fastattn
