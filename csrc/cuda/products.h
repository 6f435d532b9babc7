// How the products of `linear` and `ffn` run on a GPU: by the GEMM kernels of this folder, or as torch's product
// (cuBLAS) with the epilogue kernel after it.
#pragma once

#include <cuda_runtime.h>

#include "cuda/gemm.cuh"
#include "cuda/operator.h"
#include "ops/linear.h"

namespace fastattn {
namespace cuda {

// p on mma.sync, and on wgmma for operands of which gemm_sm90_takes(p).
void run_gemm_sm80(const GemmCall& p, cudaStream_t stream);
#if defined(FASTATTN_CUDA_SM90)
void run_gemm_sm90(const GemmCall& p, int multiprocessors, cudaStream_t stream);
#else
inline void run_gemm_sm90(const GemmCall&, int, cudaStream_t) {}  // runs_sm90 is false
#endif

class Products {
 public:
  // On x's device and the stream current there. Throws unless x is of float16 or bfloat16 on a CUDA device.
  explicit Products(const Tensor& x);

  Tensor empty(const Shape& shape, ScalarType type) const { return allocator(like_)(shape, type); }
  Tensor empty(const Shape& shape) const { return empty(shape, like_.scalar_type()); }

  // p's product and what follows it. Nothing where the result is empty.
  void run(const LinearParams& p, int64_t residual_stride = 0) const;

  // The same for Epilogue::kActivationGrad, with the column sums of dpre and dgate in x's dtype; null: not wanted.
  void run_gradient(LinearParams p, void* dpre_sum, void* dgate_sum) const;

  // sums (N,) = Σ over the rows of x (M, N) in x's dtype.
  void column_sum(const void* x, int64_t stride, int64_t M, int64_t N, void* sums) const;

 private:
  bool own_kernel() const;
  void run_own(GemmCall p) const;
  void run_torch(GemmCall p) const;
  void torch_product(const GemmCall& p, const MatrixProduct& product, const void* bias, void* out, bool add) const;

  const Tensor& like_;
  int device_;
  cudaStream_t stream_;
};

}  // namespace cuda
}  // namespace fastattn
