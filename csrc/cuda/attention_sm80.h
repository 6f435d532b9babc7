// Attention on mma.sync as functions, for every architecture.
#pragma once

#include "cpu/params.h"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Fills p.out, and p.lse unless it is null, but for rows that are no sequence's. float16 and bfloat16, up to 256
// channels, no pages; everything else of a call is taken.
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch);

// Backward of the same calls, in this order; rows and keys that are no sequence's keep what their gradients hold,
// packed sequences follow one another. First p.delta of every row, in float32, lying as p.lse does.
void launch_attention_delta(const AttentionBackwardParams& p, const StreamLaunch& launch);
// Then dq, dk, dv and, where p has a place for them, dmask and each row's part of the slopes' gradients, p.slope_rows.
// Those of float16 are in a file of their own.
void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch);
void launch_attention_sm80_backward_float16(const AttentionBackwardParams& p, const StreamLaunch& launch);
// Then dsinks and dslopes, where p has a place for them.
void launch_attention_row_sums(const AttentionBackwardParams& p, const StreamLaunch& launch);

}  // namespace cuda
}  // namespace fastattn
