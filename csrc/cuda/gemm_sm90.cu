// Instantiations of gemm_sm90.cuh: two dtypes, three layouts of a plain product, the activations' and their gradient's.
#include "cuda/gemm_sm90.cuh"
#include "cuda/launch.cuh"
#include "cuda/products.h"
#include "cuda/tensor_map.h"

namespace fastattn {
namespace cuda {

void run_gemm_sm90(const GemmCall& p, int multiprocessors, cudaStream_t stream) {
  p.dtype == DType::kFloat16
      ? launch_gemm_sm90<Half>(p, multiprocessors, make_tensor_map<Half>, StreamLaunch{stream})
      : launch_gemm_sm90<BFloat16>(p, multiprocessors, make_tensor_map<BFloat16>, StreamLaunch{stream});
}

}  // namespace cuda
}  // namespace fastattn
