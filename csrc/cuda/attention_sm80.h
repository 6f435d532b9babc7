// Attention on mma.sync as functions, for every architecture.
#pragma once

#include "cpu/params.h"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Fills p.out, and p.lse unless it is null, but for rows that are no sequence's. float16 and bfloat16, up to 256
// channels, no pages; everything else of a call is taken.
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch);

// Every gradient that p has a place for, of the same calls. p.delta is always there, p.slope_rows with p.dslopes. Rows
// and keys that are no sequence's keep what their gradients hold; packed sequences follow one another. The second is of
// float16, in a file of its own.
void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch);
void launch_attention_sm80_backward_float16(const AttentionBackwardParams& p, const StreamLaunch& launch);

}  // namespace cuda
}  // namespace fastattn
