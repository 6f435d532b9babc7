// The kernels of csrc/cuda/norm.cuh on the CPU, behind plain C functions for tests/cuda/test_norm_host.py.
// clang-format off
#include "host_cuda.h"  // first: it gives the rest its CUDA words
#include "cuda/norm.cuh"
// clang-format on

using namespace fastattn;

extern "C" {

void norm_forward(const NormForwardParams* p) { cuda::launch_norm_forward(*p, host_cuda::Launch{}); }

int64_t norm_chunk_rows(int64_t rows, int64_t columns, int element_size) {
  return cuda::norm_chunk_rows(rows, columns, element_size);
}

void norm_backward(const NormBackwardParams* p) { cuda::launch_norm_backward(*p, host_cuda::Launch{}); }

}  // extern "C"
