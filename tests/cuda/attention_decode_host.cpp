// The kernels of csrc/cuda/attention_decode.cuh on the CPU, behind a plain C function for
// tests/cuda/test_attention_decode_host.py.
// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_decode.cuh"
#include "cuda/attention_plan.h"
// clang-format on

#include <limits>

using namespace fastattn;

extern "C" {

// fresh: null, or {fresh_k, fresh_v}, with their strides.
void attention_decode(const AttentionParams* attention, bool q_packed, bool k_packed, const void* const* fresh,
                      const int64_t* fresh_strides) {
  cuda::DecodeParams p = cuda::decode_params(*attention, q_packed, k_packed);
  if (fresh != nullptr) {
    p.fresh_k = fresh[0], p.fresh_v = fresh[1];
    for (int i = 0; i < 3; ++i) p.fresh_k_stride[i] = fresh_strides[i], p.fresh_v_stride[i] = fresh_strides[3 + i];
  }
  // What no part wrote must not be read.
  const float nothing = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> acc(p.slots * p.heads * p.part_rows * p.head_dim_v, nothing);
  std::vector<float> sums(2 * p.slots * p.heads * p.part_rows, nothing);
  p.acc = acc.data(), p.sums = sums.data();
  const host_cuda::Launch launch;
  switch (p.dtype) {
    case DType::kFloat32:
      return cuda::launch_attention_decode<float>(p, launch);
    case DType::kFloat16:
      return cuda::launch_attention_decode<Half>(p, launch);
    default:
      return cuda::launch_attention_decode<BFloat16>(p, launch);
  }
}

// Which kernels compute a call: 8 for none, 4 where results are filled before, 2 for full tiles, 1 for decoding.
int forward_plan(const AttentionParams* p, bool sequences, bool q_packed) {
  const cuda::ForwardPlan plan = cuda::plan_forward(*p, sequences, q_packed);
  return plan.refusal != nullptr ? 8 : 4 * plan.fills + 2 * plan.tiles + plan.decodes;
}

bool has_gradients(const AttentionParams* p) { return cuda::backward_refusal(*p) == nullptr; }

// How often the slots of a call come to each key: (batch, keys of p), or those of the one batch entry that all lie in.
void decode_cover(const AttentionParams* attention, bool k_packed, int32_t* seen) {
  const cuda::DecodeParams p = cuda::decode_params(*attention, false, k_packed);
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const cuda::DecodePart part = cuda::part_of_slot(p, slot);
    const Sequence own = cuda::decode_sequence(p, part.sequence);
    const int64_t length = cuda::part_length(own.keys);
    int32_t* keys = seen + (k_packed ? own.k_begin : part.sequence * p.keys);
    for (int64_t key = part.index * length; key < (part.index + 1) * length && key < own.keys; ++key) ++keys[key];
    if (part.index < cuda::parts_of(own.keys) &&
        slot != cuda::first_part_slot(p, part.sequence, own.k_begin) + part.index) {
      std::abort();
    }
  }
}

// Where the chunks of a tile with rows of 16 `chunks` bytes lie: (16 lines, chunks) byte offsets.
void tile_offsets(int chunks, int32_t* offsets) {
  for (int line = 0; line < cuda::kDecodeKeys; ++line) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      offsets[line * chunks + chunk] = chunks == 8    ? cuda::tile_offset<8>(line, chunk)
                                       : chunks == 16 ? cuda::tile_offset<16>(line, chunk)
                                       : chunks == 32 ? cuda::tile_offset<32>(line, chunk)
                                                      : cuda::tile_offset<64>(line, chunk);
    }
  }
}

}  // extern "C"
