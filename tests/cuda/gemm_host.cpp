// The kernels of csrc/cuda/{gemm_sm80,epilogue}.cuh on the CPU, behind plain C functions for
// tests/cuda/test_gemm_host.py.
// clang-format off
#include "host_ptx_sm90.h"  // first: it gives the rest its CUDA words
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"
// clang-format on

#include <string>

using namespace fastattn;
using cuda::GemmCall;

namespace {

// On three blocks, which are persistent. Operands that TMA does not take are the other kernel's.
template <class T>
void run_sm90(const GemmCall& p) {
  if (!cuda::gemm_sm90_takes(p)) return cuda::launch_gemm_sm80<T>(p, host_cuda::Launch{});
  cuda::launch_gemm_sm90<T>(p, 3, cuda::matrix_map, host_cuda::Launch{});
}

// The product in float32 slices as gemm_sm80 cuts it, or (kernel "epilogue") its product in T, then the epilogue
// kernel.
template <class T>
void run(const std::string& kernel, GemmCall p) {
  const host_cuda::Launch launch;
  cuda::find_alignment(&p);
  if (p.parts != nullptr) {
    kernel == "sm80" ? cuda::launch_gemm_sm80<T>(p, launch) : run_sm90<T>(p);
    return cuda::launch_slice_sum<T>(p, launch);
  }
  if (kernel == "sm80") return cuda::launch_gemm_sm80<T>(p, launch);
  if (kernel == "sm90") return run_sm90<T>(p);
  std::vector<T> product(p.M * p.N), gate_product(p.M * p.N);
  for (int i = 0; i < (p.second_apart ? 2 : 1); ++i) {
    GemmCall bare = {};
    bare.dtype = p.dtype, bare.M = p.M, bare.N = p.N, bare.K = p.K;
    bare.products = 1, bare.product[0] = p.product[i], bare.slices = 1;
    bare.c = i == 0 ? product.data() : gate_product.data();
    cuda::find_alignment(&bare);
    cuda::launch_gemm_sm80<T>(bare, launch);
  }
  cuda::launch_epilogue<T>(p, static_cast<const T*>(product.data()), static_cast<const T*>(gate_product.data()),
                           launch);
}

}  // namespace

extern "C" {

void gemm(const char* kernel, const GemmCall* p) {
  p->dtype == DType::kFloat16 ? run<Half>(kernel, *p) : run<BFloat16>(kernel, *p);
}

int64_t gemm_row_blocks(const char* kernel, int64_t rows) {
  return cuda::ceil_div(rows, kernel == std::string("epilogue") ? cuda::kRowsOfBlock : cuda::GemmSm80::kRows);
}

int slices_of(int64_t M, int64_t N, int64_t K, int64_t tile_rows, int64_t tile_columns) {
  return cuda::slices_of(M, N, K, tile_rows, tile_columns);
}

int64_t sum_chunks(int64_t rows) { return cuda::sum_chunks(rows); }

void column_sum(bool half, const void* x, int64_t stride, int64_t M, int64_t N, float* partial, void* sums) {
  const auto run = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    cuda::launch_column_sum(static_cast<const T*>(x), stride, M, N, partial, out, host_cuda::Launch{});
  };
  half ? run(static_cast<Half*>(sums)) : run(static_cast<BFloat16*>(sums));
}

// Row block, column block, slice, first and last step of each work item, five numbers an item.
int64_t work(int64_t M, int64_t N, int64_t K, int slices, int64_t* out) {
  GemmCall p = {};
  p.M = M, p.N = N, p.K = K, p.products = 1, p.slices = slices;
  const auto work = cuda::GemmWork::of<128, 128, 32>(p);
  for (int64_t item = 0; out != nullptr && item < work.items(); ++item) {
    const cuda::TilePosition tile = work.tile(item);
    const cuda::StepRange range = work.range(item);
    for (const int64_t x : {tile.row_block, tile.column_block, work.slice(item), range.begin, range.end}) *out++ = x;
  }
  return work.items();
}

int swizzled_chunk(int chunks, int row, int chunk) {
  return chunks == 4   ? cuda::swizzled_chunk<4>(row, chunk)
         : chunks == 8 ? cuda::swizzled_chunk<8>(row, chunk)
                       : cuda::swizzled_chunk<16>(row, chunk);
}

int stage_offset(int columns, int row, int unit) {
  return columns == 32 ? cuda::stage_offset<32>(row, unit) : cuda::stage_offset<64>(row, unit);
}

}  // extern "C"
