// The kernels of csrc/cuda/attention_sm90_{forward,backward}.cuh on the CPU, behind plain C functions for
// tests/cuda/test_attention_sm90_host.py.
// clang-format off
#include "host_ptx_sm90.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_sm90_backward.cuh"
#include "cuda/attention_sm90_backward_sums.cuh"
#include "cuda/attention_sm90_forward.cuh"
// clang-format on

using namespace fastattn;

namespace {

template <class T>
void backward(const AttentionBackwardParams& p, bool in_order) {
  const host_cuda::Launch launch;
  if (in_order) return cuda::launch_attention_sm90_backward<T>(p, cuda::boxes_map, launch);
  std::vector<cuda::Packed<float>> sums(cuda::attention_sm90_backward_sums(p) / 4);
  cuda::launch_attention_sm90_backward_sums<T>(p, sums.data()->value, cuda::boxes_map, launch);
}

}  // namespace

extern "C" {

// Whether the kernel takes the call; then its results, from so many persistent blocks.
bool attention_sm90_forward(const AttentionParams* p, int blocks, bool late_copies) {
  if (!cuda::attention_sm90_takes(*p)) return false;
  host_cuda::schedule.late_copies = late_copies;
  const host_cuda::Launch launch;
  if (p->dtype == DType::kFloat16) {
    cuda::launch_attention_sm90_forward<Half>(*p, blocks, cuda::boxes_map, launch);
  } else {
    cuda::launch_attention_sm90_forward<BFloat16>(*p, blocks, cuda::boxes_map, launch);
  }
  return true;
}

// The same for dq, dk and dv, from lse and delta: in a fixed order, or with dq's sums in memory.
bool attention_sm90_backward(const AttentionBackwardParams* p, bool in_order, bool late_copies) {
  if (!cuda::attention_sm90_backward_takes(*p)) return false;
  host_cuda::schedule.late_copies = late_copies;
  p->dtype == DType::kFloat16 ? backward<Half>(*p, in_order) : backward<BFloat16>(*p, in_order);
  return true;
}

// Of each tile in the order in which blocks take them: batch, group, first line, whether it exists; returns how many.
int64_t attention_tiles(const AttentionParams* p, int tile_lines, int pack, int64_t* out) {
  const cuda::AttentionTiling tiling = cuda::attention_tiling(*p, tile_lines, pack);
  for (int64_t i = 0; out != nullptr && i < tiling.tiles(); ++i, out += 4) {
    const cuda::AttentionTile tile = cuda::attention_tile(*p, tiling, i);
    out[0] = tile.batch, out[1] = tile.group, out[2] = tile.first_line, out[3] = tile.exists(pack);
  }
  return tiling.tiles();
}

}  // extern "C"
