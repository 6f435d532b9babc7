#include "ops/linear.h"

#include <algorithm>
#include <tuple>

#include "cpu/scratch.h"

namespace fastattn {
namespace {

// Rows of an item of a turned product: its sums, twice, and the packed rows of one k block stay in L2.
constexpr int64_t kTurnedRowBlock = 256;

// Both products of a turned one share the packed A.
int packed_operands(const LinearParams& p) { return p.packs == Packs::kA ? 1 : p.products; }

size_t operand_bytes(const KernelTable& table, const LinearParams& p) {
  return (table.linear_packed_bytes(p) + 63) / 64 * 64;
}

void pack_now(const KernelTable& table, const LinearParams& p) {
  parallel_for(table.linear_pack_items(p), 1, [&](Range range) { table.linear_pack(p, range); });
}

}  // namespace

int64_t equal_columns(int64_t N, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, blocks_of(N, most));
  return std::max<int64_t>(64, blocks_of(blocks_of(N, blocks), 64) * 64);
}

LinearParams make_linear(DType dtype, int64_t M, int64_t N, int64_t K, Epilogue epilogue) {
  LinearParams p = {};
  p.dtype = dtype;
  p.M = M, p.N = N, p.K = K;
  p.products = 1;
  p.row_block = kRowBlock;
  p.epilogue = epilogue;
  p.dropout_scale = 1.0;
  return p;
}

void add_product(LinearParams* p, const void* a, const void* b, bool apart) {
  if (b == nullptr) return;
  p->product[1] = p->product[0];
  p->product[1].a = a, p->product[1].b = b;
  p->products = 2, p->second_apart = apart;
}

size_t packed_bytes(const KernelTable& table, const LinearParams& p) {
  return p.packs == Packs::kNothing ? 0 : packed_operands(p) * operand_bytes(table, p);
}

size_t plan(const KernelTable& table, LinearParams* p) {
  p->packs = table.linear_packs(*p);
  if (p->packs == Packs::kA) p->row_block = std::min(kTurnedRowBlock, blocks_of(p->M, 64) * 64);
  return packed_bytes(table, *p);
}

void pack(const KernelTable& table, LinearParams* p, void* buffer) {
  if (p->packs == Packs::kNothing) return;
  for (int i = 0; i < p->products; ++i) {
    p->product[i].packed = static_cast<char*>(buffer) + i % packed_operands(*p) * operand_bytes(table, *p);
  }
  if (p->packs == Packs::kB) pack_now(table, *p);
}

void multiply(const KernelTable& table, LinearParams* p) {
  if (p->packs == Packs::kA) pack_now(table, *p);
  const int64_t most = p->packs != Packs::kB ? 64 : p->second_apart ? 256 : 512;
  p->column_block = equal_columns(p->N, most);
  const int64_t items = blocks_of(p->M, p->row_block) * blocks_of(p->N, p->column_block);
  parallel_for(items, 1, [&](Range range) { table.linear(*p, range); });
}

void column_sums(const KernelTable& table, DType from, DType to, int64_t M, int64_t N, const void* x, void* sums) {
  const ColumnSumParams p = {from, to, M, N, x, sums};
  parallel_for(N, 64, [&](Range range) { table.column_sums(p, range); });
}

void check_matrix(const Tensor& x, ScalarType type, const char* what) {
  FASTATTN_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == type, what);
}

void check_bias(const OptionalTensor& bias, int64_t n, ScalarType type, const char* op) {
  FASTATTN_CHECK(!bias.has_value() ||
                     (bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous() && bias->scalar_type() == type),
                 op, ": a bias does not fit its weight");
}

void check_residual(const OptionalTensor& residual, int64_t M, int64_t N, ScalarType type, const char* op) {
  FASTATTN_CHECK(!residual.has_value() || (residual->dim() == 2 && residual->size(0) == M && residual->size(1) == N &&
                                           residual->is_contiguous() && residual->scalar_type() == type),
                 op, ": residual is not a contiguous matrix of the output's shape and dtype");
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      bool reduced_precision) {
  const ScalarType type = x.scalar_type();
  check_matrix(x, type, "linear: x is not a contiguous matrix");
  check_matrix(weight, type, "linear: weight is not a contiguous matrix of x's dtype");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  FASTATTN_CHECK(weight.size(1) == K, "linear: weight does not fit x");
  check_bias(bias, N, type, "linear");
  check_residual(residual, M, N, type, "linear");
  const Tensor y = empty({M, N}, type);

  const KernelTable& table = kernels_of(x, reduced_precision);
  LinearParams p = make_linear(dtype_of(x), M, N, K, Epilogue::kStore);
  p.product[0] = {x.const_data_ptr(), weight.const_data_ptr(), K, K, false, true, nullptr};
  p.bias[0] = data_or_null(bias);
  p.residual = data_or_null(residual);
  p.c = y.mutable_data_ptr();
  const CallScratch scratch(plan(table, &p));
  pack(table, &p, scratch.data());
  multiply(table, &p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool x_grad,
                                                   bool weight_grad, bool bias_grad, bool reduced_precision) {
  const ScalarType type = x.scalar_type();
  check_matrix(dy, type, "linear: dy is not a contiguous matrix of x's dtype");
  check_matrix(x, type, "linear: x is not a contiguous matrix");
  check_matrix(weight, type, "linear: weight is not a contiguous matrix of x's dtype");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  FASTATTN_CHECK(weight.size(1) == K && dy.size(0) == M && dy.size(1) == N, "linear: dy, x and weight do not fit");
  const Tensor dx = x_grad ? empty({M, K}, type) : none(x);
  const Tensor dweight = weight_grad ? empty({N, K}, type) : none(x);
  const Tensor dbias = bias_grad ? empty({N}, type) : none(x);

  const KernelTable& table = kernels_of(x, reduced_precision);
  const DType dtype = dtype_of(x);
  LinearParams to_x = make_linear(dtype, M, K, N, Epilogue::kStore);
  to_x.product[0] = {dy.const_data_ptr(), weight.const_data_ptr(), N, K, false, false, nullptr};
  LinearParams to_weight = make_linear(dtype, N, K, M, Epilogue::kStore);
  to_weight.product[0] = {dy.const_data_ptr(), x.const_data_ptr(), N, K, true, false, nullptr};
  const CallScratch scratch(std::max(plan(table, &to_x), plan(table, &to_weight)));
  if (x_grad) {
    to_x.c = dx.mutable_data_ptr();
    pack(table, &to_x, scratch.data());
    multiply(table, &to_x);
  }
  if (weight_grad) {
    to_weight.c = dweight.mutable_data_ptr();
    pack(table, &to_weight, scratch.data());
    multiply(table, &to_weight);
  }
  if (bias_grad) column_sums(table, dtype, dtype, M, N, dy.const_data_ptr(), dbias.mutable_data_ptr());
  return {dx, dweight, dbias};
}

}  // namespace fastattn
