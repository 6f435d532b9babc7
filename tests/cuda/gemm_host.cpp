// The kernels of csrc/cuda/{gemm_sm80,epilogue}.cuh on the CPU, behind plain C functions for
// tests/cuda/test_gemm_host.py.
// clang-format off
#include "host_ptx_sm90.h"  // first: it gives the rest its CUDA words
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"
// clang-format on

#include <string>

using namespace fastattn;
using cuda::GemmCall;

namespace {

// On three blocks, which are persistent. Operands that TMA does not take are the other kernel's.
template <class T>
void run_sm90(const GemmCall& p) {
  if (!cuda::gemm_sm90_takes(p)) return cuda::launch_gemm_sm80<T>(p, host_cuda::Launch{});
  const auto make_map = [](const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                           int box_columns) {
    return cuda::TensorMap{static_cast<const uint16_t*>(data), rows, columns, stride, box_rows, box_columns};
  };
  cuda::launch_gemm_sm90<T>(p, 3, make_map, host_cuda::Launch{});
}

// The product in float32 slices as gemm_sm80 cuts it, or (kernel "epilogue") its product in T, then the epilogue
// kernel.
template <class T>
void run(const std::string& kernel, GemmCall p) {
  const host_cuda::Launch launch;
  cuda::find_alignment(&p);
  if (p.parts != nullptr) {
    cuda::launch_gemm_sm80<T>(p, launch);
    const float* parts = p.parts;
    p.parts = nullptr;
    return cuda::launch_epilogue<T, float>(p, parts, nullptr, launch);
  }
  if (kernel == "sm80") return cuda::launch_gemm_sm80<T>(p, launch);
  if (kernel == "sm90") return run_sm90<T>(p);
  std::vector<T> product(p.M * p.N), gate_product(p.M * p.N);
  for (int i = 0; i < (p.second_apart ? 2 : 1); ++i) {
    GemmCall bare = {};
    bare.dtype = p.dtype, bare.M = p.M, bare.N = p.N, bare.K = p.K;
    bare.products = 1, bare.product[0] = p.product[i], bare.slices = 1;
    bare.c = i == 0 ? product.data() : gate_product.data();
    cuda::find_alignment(&bare);
    cuda::launch_gemm_sm80<T>(bare, launch);
  }
  cuda::launch_epilogue<T, T>(p, product.data(), gate_product.data(), launch);
}

}  // namespace

extern "C" {

void gemm(const char* kernel, const GemmCall* p) {
  p->dtype == DType::kFloat16 ? run<Half>(kernel, *p) : run<BFloat16>(kernel, *p);
}

int64_t gemm_row_blocks(const char* kernel, int64_t rows) {
  return cuda::ceil_div(rows, kernel == std::string("epilogue") ? cuda::kRowsOfBlock : cuda::GemmSm80::kRows);
}

int64_t sum_chunks(int64_t rows) { return cuda::sum_chunks(rows); }

}  // extern "C"
