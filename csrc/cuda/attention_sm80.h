// Attention on mma.sync as functions, for every architecture.
#pragma once

#include "cpu/params.h"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Fills p.out, and p.lse unless it is null, but for rows that are no sequence's. float16 and bfloat16, up to 256
// channels, no pages; everything else of a call is taken.
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch);

}  // namespace cuda
}  // namespace fastattn
