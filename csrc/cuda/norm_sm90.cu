#include "cuda/norm_sm90.h"

namespace fastattn {
namespace cuda {

void norm_forward_in_clusters(const NormForwardParams& p, int blocks, const StreamLaunch& launch) {
  launch_norm_forward_in_clusters(p, blocks, launch);
}

void norm_backward_in_clusters(const NormBackwardParams& p, int blocks, const StreamLaunch& launch) {
  launch_norm_backward_in_clusters(p, blocks, launch);
}

}  // namespace cuda
}  // namespace fastattn
