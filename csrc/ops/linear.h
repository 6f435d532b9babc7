// Products with a weight in nn.Linear's layout. What the CPU and the CUDA operator do alike: check the tensors,
// allocate the results, fill params.h; and the CPU's blocking, packing and threads, for `linear` and `ffn` alike.
#pragma once

#include <algorithm>
#include <tuple>

#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {

// Rows of a work item: what L2 holds of A and of the sums (gemm-inl.h). Fixed, since column sums are per such block.
constexpr int64_t kRowBlock = 128;

inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Equal columns of a work item, at most `most`, in a multiple of 64.
int64_t equal_columns(int64_t N, int64_t most);

inline LinearParams make_linear(DType dtype, int64_t M, int64_t N, int64_t K, Epilogue epilogue) {
  LinearParams p = {};
  p.dtype = dtype;
  p.M = M, p.N = N, p.K = K;
  p.products = 1;
  p.row_block = kRowBlock;
  p.epilogue = epilogue;
  p.dropout_scale = 1.0;
  return p;
}

// The second of two products, of the first's layout but for leading dimension ldb, if `b` is there.
inline void add_product(LinearParams* p, const void* a, const void* b, int64_t ldb, bool apart) {
  if (b == nullptr) return;
  p->product[1] = p->product[0];
  p->product[1].a = a, p->product[1].b = b, p->product[1].ldb = ldb;
  p->products = 2, p->second_apart = apart;
}

// Bytes of scratch for what p.packs says.
size_t packed_bytes(const KernelTable& table, const LinearParams& p);

// Decide what is packed for p's product, which `multiply` will run; the bytes of scratch that takes.
size_t plan(const KernelTable& table, LinearParams* p);

// Give a product that scratch. A weight (kB) is packed now, for any number of calls.
void pack(const KernelTable& table, LinearParams* p, void* buffer);

void multiply(const KernelTable& table, LinearParams* p);

// sums[n] = sum over m of x (M, N), contiguous.
void column_sums(const KernelTable& table, DType from, DType to, int64_t M, int64_t N, const void* x, void* sums);

// What the kernels of an implementation read: rows that lie one after the other, however many dimensions count them, or
// matrices with rows of any stride.
enum class Rows { kContiguous, kStrided };

inline int64_t rows_of(const Tensor& x) {
  const torch::headeronly::IntHeaderOnlyArrayRef extents = x.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < extents.size(); ++i) rows *= extents[i];
  return rows;
}

inline int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

inline void check_matrix(const Tensor& x, ScalarType type, const char* what, Rows rows = Rows::kContiguous) {
  FASTATTN_CHECK(x.dim() == 2 && x.scalar_type() == type, what);
  FASTATTN_CHECK(x.is_contiguous() || (rows == Rows::kStrided && (x.stride(1) == 1 || x.size(1) <= 1)), what);
}

inline void check_rows(const Tensor& x, ScalarType type, const char* what, Rows rows) {
  if (rows == Rows::kStrided) return check_matrix(x, type, what, rows);
  FASTATTN_CHECK(x.dim() >= 1 && x.is_contiguous() && x.scalar_type() == type, what);
}

// From row to row; what a single row says of it means nothing.
inline int64_t row_stride(const Tensor& x) { return x.dim() == 2 && x.size(0) > 1 ? x.stride(0) : columns_of(x); }

inline void check_bias(const OptionalTensor& bias, int64_t n, ScalarType type, const char* op) {
  FASTATTN_CHECK(!bias.has_value() ||
                     (bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous() && bias->scalar_type() == type),
                 op, ": a bias does not fit its weight");
}

// The output is x's rows, of N columns.
inline void check_residual(const OptionalTensor& residual, const Tensor& x, int64_t N, const char* op, Rows rows) {
  if (!residual.has_value()) return;
  check_rows(*residual, x.scalar_type(), "residual is not of the output's dtype with contiguous rows", rows);
  const auto own = residual->sizes(), of_x = x.sizes();
  FASTATTN_CHECK(own.size() == of_x.size() && std::equal(own.begin(), own.end() - 1, of_x.begin()) && own.back() == N,
                 op, ": residual does not have the output's shape");
}

// y (..., N) = x (..., K) weightᵀ + bias + residual. allocate(shape, type) gives an empty tensor on x's device.
template <class Allocate>
inline Tensor prepare_linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& residual, Rows rows, LinearParams* p, Allocate&& allocate) {
  const ScalarType type = x.scalar_type();
  check_rows(x, type, "linear: x has no contiguous rows", rows);
  check_matrix(weight, type, "linear: weight is not a contiguous matrix of x's dtype", rows);
  const int64_t M = rows_of(x), K = columns_of(x), N = weight.size(0);
  FASTATTN_CHECK(type != ScalarType::Bool && weight.size(1) == K, "linear: weight does not fit x");
  check_bias(bias, N, type, "linear");
  check_residual(residual, x, N, "linear", rows);
  const Tensor y = allocate(Shape(x, N), type);
  *p = make_linear(dtype_of(x), M, N, K, Epilogue::kStore);
  p->product[0] = {
      x.const_data_ptr(), weight.const_data_ptr(), row_stride(x), row_stride(weight), false, true, nullptr};
  p->bias[0] = data_or_null(bias);
  p->residual = data_or_null(residual);
  p->c = y.mutable_data_ptr();
  return y;
}

// (dx, dweight, dbias), (0,) where not wanted, and the products of the first two.
template <class Allocate>
inline std::tuple<Tensor, Tensor, Tensor> prepare_linear_backward(const Tensor& dy, const Tensor& x,
                                                                  const Tensor& weight, bool x_grad, bool weight_grad,
                                                                  bool bias_grad, Rows rows, LinearParams* to_x,
                                                                  LinearParams* to_weight, Allocate&& allocate) {
  const ScalarType type = x.scalar_type();
  check_matrix(dy, type, "linear: dy is not a contiguous matrix of x's dtype", rows);
  check_matrix(x, type, "linear: x is not a contiguous matrix", rows);
  check_matrix(weight, type, "linear: weight is not a contiguous matrix of x's dtype", rows);
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  FASTATTN_CHECK(weight.size(1) == K && dy.size(0) == M && dy.size(1) == N, "linear: dy, x and weight do not fit");
  const auto wanted = [&](bool want, std::initializer_list<int64_t> shape) {
    return want ? allocate(shape, type) : allocate({0}, type);
  };
  const Tensor dx = wanted(x_grad, {M, K}), dweight = wanted(weight_grad, {N, K}), dbias = wanted(bias_grad, {N});
  const int64_t ld_dy = row_stride(dy), ld_x = row_stride(x), ld_weight = row_stride(weight);
  *to_x = make_linear(dtype_of(x), M, K, N, Epilogue::kStore);
  to_x->product[0] = {dy.const_data_ptr(), weight.const_data_ptr(), ld_dy, ld_weight, false, false, nullptr};
  to_x->c = x_grad ? dx.mutable_data_ptr() : nullptr;
  *to_weight = make_linear(dtype_of(x), N, K, M, Epilogue::kStore);
  to_weight->product[0] = {dy.const_data_ptr(), x.const_data_ptr(), ld_dy, ld_x, true, false, nullptr};
  to_weight->c = weight_grad ? dweight.mutable_data_ptr() : nullptr;
  return {dx, dweight, dbias};
}

}  // namespace fastattn
