// Products with a weight in nn.Linear's layout: blocking, packing and threads, for `linear` and `ffn` alike.
#pragma once

#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {

// Rows of a work item: what L2 holds of A and of the sums (gemm-inl.h). Fixed, since column sums are per such block.
constexpr int64_t kRowBlock = 128;

inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Equal columns of a work item, at most `most`, in a multiple of 64.
int64_t equal_columns(int64_t N, int64_t most);

LinearParams make_linear(DType dtype, int64_t M, int64_t N, int64_t K, Epilogue epilogue);

// The second of two products, if `b` is there.
void add_product(LinearParams* p, const void* a, const void* b, bool apart);

// Bytes of scratch for what p.packs says.
size_t packed_bytes(const KernelTable& table, const LinearParams& p);

// Decide what is packed for p's product, which `multiply` will run; the bytes of scratch that takes.
size_t plan(const KernelTable& table, LinearParams* p);

// Give a product that scratch. A weight (kB) is packed now, for any number of calls.
void pack(const KernelTable& table, LinearParams* p, void* buffer);

void multiply(const KernelTable& table, LinearParams* p);

// sums[n] = sum over m of x (M, N), contiguous.
void column_sums(const KernelTable& table, DType from, DType to, int64_t M, int64_t N, const void* x, void* sums);

void check_matrix(const Tensor& x, ScalarType type, const char* what);
void check_bias(const OptionalTensor& bias, int64_t n, ScalarType type, const char* op);
void check_residual(const OptionalTensor& residual, int64_t M, int64_t N, ScalarType type, const char* op);

}  // namespace fastattn
