// The kernels of csrc/cuda/attention_sm80_forward.cuh on the CPU, behind plain C functions for
// tests/cuda/test_attention_sm80_host.py.
// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
#include "cuda/attention_sm80_forward.cuh"
// clang-format on

using namespace fastattn;

extern "C" {

void attention_sm80_forward(const AttentionParams* p) {
  const host_cuda::Launch launch;
  p->dtype == DType::kFloat16 ? cuda::launch_attention_sm80_forward<Half>(*p, launch)
                              : cuda::launch_attention_sm80_forward<BFloat16>(*p, launch);
}

// The bank group of 16 bytes that each chunk of a tile of 64 rows lies in: (64, chunks), and its place.
void tile_places(int channels, int32_t* places) {
  const auto fill = [&](auto tile) {
    for (int row = 0; row < 64; ++row) {
      for (int chunk = 0; chunk < channels / 8; ++chunk) *places++ = decltype(tile)::offset(row, chunk);
    }
  };
  switch (channels) {
    case 64:
      return fill(cuda::Tile<Half, 64, 64>{});
    case 96:
      return fill(cuda::Tile<Half, 64, 96>{});
    case 128:
      return fill(cuda::Tile<Half, 64, 128>{});
    case 192:
      return fill(cuda::Tile<Half, 64, 192>{});
    default:
      return fill(cuda::Tile<Half, 64, 256>{});
  }
}

}  // extern "C"
