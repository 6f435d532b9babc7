// Instantiations of gemm_sm80.cuh: two dtypes, three layouts of a plain product, the activations' and their gradient's.
#include "cuda/gemm_sm80.cuh"
#include "cuda/launch.cuh"
#include "cuda/products.h"

namespace fastattn {
namespace cuda {

void run_gemm_sm80(const GemmCall& p, cudaStream_t stream) {
  p.dtype == DType::kFloat16 ? launch_gemm_sm80<Half>(p, StreamLaunch{stream})
                             : launch_gemm_sm80<BFloat16>(p, StreamLaunch{stream});
}

}  // namespace cuda
}  // namespace fastattn
