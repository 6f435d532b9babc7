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

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      bool reduced_precision) {
  LinearParams p;
  const Tensor y = prepare_linear_forward(x, weight, bias, residual, Rows::kContiguous, &p, empty);
  const KernelTable& table = kernels_of(x, reduced_precision);
  const CallScratch scratch(plan(table, &p));
  pack(table, &p, scratch.data());
  multiply(table, &p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool x_grad,
                                                   bool weight_grad, bool bias_grad, bool reduced_precision) {
  LinearParams to_x, to_weight;
  const auto results = prepare_linear_backward(dy, x, weight, x_grad, weight_grad, bias_grad, Rows::kContiguous, &to_x,
                                               &to_weight, empty);
  const KernelTable& table = kernels_of(x, reduced_precision);
  const CallScratch scratch(std::max(plan(table, &to_x), plan(table, &to_weight)));
  if (x_grad) {
    pack(table, &to_x, scratch.data());
    multiply(table, &to_x);
  }
  if (weight_grad) {
    pack(table, &to_weight, scratch.data());
    multiply(table, &to_weight);
  }
  if (bias_grad) {
    const DType dtype = dtype_of(x);
    column_sums(table, dtype, dtype, dy.size(0), dy.size(1), dy.const_data_ptr(),
                std::get<2>(results).mutable_data_ptr());
  }
  return results;
}

}  // namespace fastattn
