// Attention on sm_90a as functions: attention.cu asks whether a call is theirs, and on which architecture.
#pragma once

#include "cpu/params.h"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// float16 and bfloat16, up to 256 channels, keys and values in rows that TMA can read; no pages. Everything else of a
// call is taken.
bool takes_attention_sm90_forward(const AttentionParams& p);

// Fills p.out, and p.lse unless it is null.
void launch_attention_sm90_forward(const AttentionParams& p, int multiprocessors, const StreamLaunch& launch);

}  // namespace cuda
}  // namespace fastattn
