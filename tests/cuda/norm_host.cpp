// The kernels of csrc/cuda/norm.cuh on the CPU, behind plain C functions for tests/cuda/test_norm_host.py.
// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
#include "cuda/norm.cuh"
// clang-format on

using namespace fastattn;

extern "C" {

int norm_cluster(int64_t columns, int element_size, bool backward) {
  return cuda::norm_cluster(columns, element_size, backward ? cuda::kBackwardVectors : cuda::kForwardVectors);
}

// `cluster`: 0, or what norm_cluster gave.
void norm_forward(const NormForwardParams* p, int cluster) {
  if (cluster > 0) {
    cuda::launch_norm_forward_in_clusters(*p, cluster, host_cuda::Launch{});
  } else {
    cuda::launch_norm_forward(*p, host_cuda::Launch{});
  }
}

int64_t norm_chunk_rows(int64_t rows, int64_t columns, int element_size) {
  return cuda::norm_chunk_rows(rows, columns, element_size);
}

void norm_backward(const NormBackwardParams* p, int cluster) {
  if (cluster > 0) {
    cuda::launch_norm_backward_in_clusters(*p, cluster, host_cuda::Launch{});
  } else {
    cuda::launch_norm_backward(*p, host_cuda::Launch{});
  }
  cuda::launch_norm_reduce(*p, cluster > 0, host_cuda::Launch{});
}

}  // extern "C"
