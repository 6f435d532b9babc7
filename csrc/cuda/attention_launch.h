// The attention kernels as functions. Each picks the instantiation for its parameters, from the list at the bottom of
// its .cu, and launches it on the stream; what it does not take, attention.cu does not ask of it.
#pragma once

#include "cuda/attention_decode_parts.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Sequences of up to kDecodeRows rows without dropout, in float16, bfloat16 or float32 and up to 256 channels.
// p.aligned is set here.
void launch_attention_decode(const DecodeParams& p, const StreamLaunch& launch);

// mma.sync, for every architecture. Fills p.out, and p.lse unless it is null, but for rows that are no sequence's.
// float16 and bfloat16, up to 256 channels; everything else of a call is taken, pages included.
void launch_attention_sm80_forward(const AttentionParams& p, const StreamLaunch& launch);

// Backward of the same calls but for pages, in this order; rows and keys that are no sequence's keep what their
// gradients hold, packed sequences follow one another. First p.delta of every row, in float32, lying as p.lse does.
void launch_attention_delta(const AttentionBackwardParams& p, const StreamLaunch& launch);
// Then dq, dk, dv and, where p has a place for them, dmask and each row's part of the slopes' gradients, p.slope_rows;
// where p.dq is null, dmask alone.
// Those of float16 are in a file of their own.
void launch_attention_sm80_backward(const AttentionBackwardParams& p, const StreamLaunch& launch);
void launch_attention_sm80_backward_float16(const AttentionBackwardParams& p, const StreamLaunch& launch);
// Then dsinks and dslopes, where p has a place for them.
void launch_attention_row_sums(const AttentionBackwardParams& p, const StreamLaunch& launch);

// TMA and wgmma, compiled for sm_90a alone. Taken: float16 and bfloat16, up to 256 channels, rows and addresses of q, k
// and v in multiples of 16 bytes, no pages; any number of rows and every feature of a score. Fills p.out, and p.lse
// unless it is null.
#if defined(FASTATTN_CUDA_SM90)
bool attention_forward_sm90_takes(const AttentionParams& p);
void launch_attention_forward_sm90(const AttentionParams& p, int multiprocessors, const StreamLaunch& launch);
// dq, dk and dv from p.lse and p.delta (of each row dout.out - dlse, in float32, lying as lse does). Taken: what
// forward takes. Each row's part of the slopes' gradients too, but not dmask.
bool attention_backward_sm90_takes(const AttentionBackwardParams& p);
void launch_attention_backward_sm90(const AttentionBackwardParams& p, const StreamLaunch& launch);
// The same at fewer products and in no fixed order: dq is summed in dq_sums, attention_backward_sm90_sums(p) zeros.
// Taken: all of that up to 128 channels, without the slopes' gradients.
bool attention_backward_sm90_sums_takes(const AttentionBackwardParams& p);
int64_t attention_backward_sm90_sums(const AttentionBackwardParams& p);
void launch_attention_backward_sm90_sums(const AttentionBackwardParams& p, float* dq_sums, const StreamLaunch& launch);
#else
inline bool attention_forward_sm90_takes(const AttentionParams&) { return false; }
inline void launch_attention_forward_sm90(const AttentionParams&, int, const StreamLaunch&) {}
inline bool attention_backward_sm90_takes(const AttentionBackwardParams&) { return false; }
inline void launch_attention_backward_sm90(const AttentionBackwardParams&, const StreamLaunch&) {}
inline bool attention_backward_sm90_sums_takes(const AttentionBackwardParams&) { return false; }
inline int64_t attention_backward_sm90_sums(const AttentionBackwardParams&) { return 0; }
inline void launch_attention_backward_sm90_sums(const AttentionBackwardParams&, float*, const StreamLaunch&) {}
#endif

}  // namespace cuda
}  // namespace fastattn
