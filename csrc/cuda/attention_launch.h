// The attention kernels as functions. Each picks the instantiation for its parameters, from the list at the bottom of
// its .cu, and launches it on the stream; what it does not take, attention.cu does not ask of it.
#pragma once

#include "cuda/attention_decode_parts.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Sequences of up to kDecodeRows rows without dropout, in float16, bfloat16 or float32 and up to kMostDecodeChannels
// channels. p.aligned is set here.
void launch_attention_decode(const DecodeParams& p, const StreamLaunch& launch);

}  // namespace cuda
}  // namespace fastattn
