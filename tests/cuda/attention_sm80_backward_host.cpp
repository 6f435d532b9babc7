// The kernels of csrc/cuda/attention_sm80_backward_launch.cuh on the CPU, behind plain C functions for
// tests/cuda/test_attention_sm80_backward_host.py.
// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_backward_rows.cuh"
#include "cuda/attention_sm80_backward_launch.cuh"
// clang-format on

using namespace fastattn;

template <class T>
void run(const AttentionBackwardParams& p) {
  const host_cuda::Launch launch;
  cuda::launch_attention_delta<T>(p, launch);
  cuda::launch_attention_sm80_backward<T>(p, launch);
  cuda::launch_attention_row_sum(p, launch);
}

extern "C" {

void attention_sm80_backward(const AttentionBackwardParams* p) {
  p->dtype == DType::kFloat16 ? run<Half>(*p) : run<BFloat16>(*p);
}

// How often the tiles of keys of a call come to each key of each key head: (batch entries of k, heads_kv, keys of p).
void key_tiles_cover(const AttentionBackwardParams* p, int lines, int32_t* seen) {
  const cuda::KeyTiling tiling = cuda::key_tiling(*p, lines);
  for (int64_t i = 0; i < tiling.tiles(); ++i) {
    const cuda::AttentionTile tile = cuda::key_tile(*p, tiling, i);
    const int64_t head = (tiling.packed ? 0 : tile.batch) * p->heads_kv + tile.group;
    for (int key = tile.first_line; key < tile.first_line + lines && key < tile.keys; ++key) {
      ++seen[head * p->keys + tile.k_begin + key];
    }
  }
}

// Rows that see any, and all, of the keys [first, last] of a call without sequences: begin and end of each.
void rows_of_keys(const AttentionParams* p, int first, int last, int32_t* found) {
  const cuda::AttentionTile own = {0, 0, 0, 0, static_cast<int>(p->rows), 0, static_cast<int>(p->keys), p->diagonal};
  const cuda::KeyRange any = cuda::rows_of_any(*p, own, first, last), all = cuda::rows_of_all(*p, own, first, last);
  found[0] = any.begin, found[1] = any.end, found[2] = all.begin, found[3] = all.end;
}

}  // extern "C"
