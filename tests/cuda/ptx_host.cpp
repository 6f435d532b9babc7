// The host model of csrc/cuda/ptx.cuh, behind plain C functions for tests/cuda/test_ptx_host.py: one warp multiplies.
// clang-format off
#include "host_ptx.h"  // first: it gives the rest its CUDA words
// clang-format on

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

struct Product {
  const uint16_t *a, *b;  // (16, 16) and (16, 8), or transposed both
  float* d;               // (16, 8)
  bool transposed, early;
};

// Row r of a 16 x 16 tile has chunks of eight values; rows of b's tile are 8 or 16 wide.
template <class T>
void multiply(Product p) {
  const int lane = static_cast<int>(threadIdx.x);
  auto* a = reinterpret_cast<uint16_t*>(dynamic_shared());
  auto* b = a + 256;
  cp_async16(a + lane * 8, p.a + lane * 8, 16);
  if (lane < 16) cp_async16(b + lane * 8, p.b + lane * 8, 16);
  cp_async_commit();
  if (!p.early) cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  const int low = lane % 8, half = lane / 8 % 2, other = lane / 16;
  if (p.transposed) {
    ldmatrix_x4_trans(left, a + (other * 8 + low) * 16 + half * 8);
    ldmatrix_x4(right, b + low * 16 + half * 8);
  } else {
    ldmatrix_x4(left, a + (half * 8 + low) * 16 + other * 8);
    ldmatrix_x4_trans(right, b + (half * 8 + low) * 8);
  }
  float d[4] = {};
  mma_m16n8k16<T>(d, left, {right[0], right[1]});
  for (int e = 0; e < 4; ++e) p.d[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

}  // namespace

extern "C" void product(const uint16_t* a, const uint16_t* b, float* d, bool half, bool transposed, bool early) {
  const Product p{a, b, d, transposed, early};
  host_cuda::Launch{}("product", half ? multiply<Half> : multiply<BFloat16>, LaunchConfig{1, 32, 1024}, p);
}
