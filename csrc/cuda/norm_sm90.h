// Rows that a cluster of blocks shares: compiled for sm_90a alone (norm_sm90.cu).
#pragma once

#include "cuda/norm.cuh"

namespace fastattn {
namespace cuda {

#if defined(FASTATTN_CUDA_SM90)
void norm_forward_in_clusters(const NormForwardParams& p, int blocks, const StreamLaunch& launch);
void norm_backward_in_clusters(const NormBackwardParams& p, int blocks, const StreamLaunch& launch);
#else
// norm.cu asks for no cluster then.
inline void norm_forward_in_clusters(const NormForwardParams&, int, const StreamLaunch&) {}
inline void norm_backward_in_clusters(const NormBackwardParams&, int, const StreamLaunch&) {}
#endif

}  // namespace cuda
}  // namespace fastattn
