// What the two GEMM kernels share: the call, the order of tiles, the cut along K.
//
//   epilogue(A B [+ A2 B2], A B_gate)   A (M, K), B (K, N): MatrixProduct and the epilogues of LinearParams
//   (cpu/params.h)
//
// 16-bit operands of any row stride, each along K (A row-major, B stored as (N, K)) or across it (A stored as (K, M), B
// row-major): x Wᵀ, dy W and dyᵀ x. Sums are float32, over K in steps of 16 in ascending order for every tile shape, so
// a row's bits depend neither on the other rows nor on what follows the product.
//
// A product of few tiles and long K (a weight's gradient) is cut along K into `slices`, whose sums go to memory in
// float32 and are added up in order by the epilogue kernel (epilogue.cuh): no atomics.
#pragma once

#include "cuda/common.cuh"

namespace fastattn {
namespace cuda {

// LinearParams as a GPU runs it. `c`, `pre`, `gate`, `dpre`, `dgate` have leading dimension N; sums are per tile row.
struct GemmCall : LinearParams {
  int64_t residual_stride;
  float* parts;  // (slices, M, N), or null where the epilogue follows at once
  int slices;
  bool operand_aligned;  // 16-byte copies: addresses and leading dimensions of all operands are multiples of 16 bytes
  bool aligned;          // the same for the matrices of the epilogue
};

__host__ __device__ inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Row blocks whose tiles run together, so that their tiles of B stay in L2.
constexpr int64_t kGroupRows = 8;

struct TilePosition {
  int64_t row_block, column_block;
};

// Tile `item` of row_blocks x column_blocks: groups of kGroupRows row blocks, columns inside a group, rows fastest.
__host__ __device__ inline TilePosition tile_position(int64_t item, int64_t row_blocks, int64_t column_blocks) {
  const int64_t group = item / (kGroupRows * column_blocks), within = item % (kGroupRows * column_blocks);
  const int64_t left = row_blocks - group * kGroupRows, height = left < kGroupRows ? left : kGroupRows;
  return {group * kGroupRows + within % height, within / height};
}

// The steps [begin, end) of slice `slice` out of `slices` equal ones.
struct StepRange {
  int64_t begin, end;
};
__host__ __device__ inline StepRange slice_steps(int64_t steps, int slices, int64_t slice) {
  const int64_t each = ceil_div(steps, slices), begin = each * slice;
  return {begin < steps ? begin : steps, begin + each < steps ? begin + each : steps};
}

// The work of a call in tiles of kRows x kColumns and steps of kStep: items are tiles of the first slice, of the
// second...
struct GemmWork {
  int64_t row_blocks, column_blocks;
  int64_t steps;      // of one product
  int64_t all_steps;  // of two that are added, the first's first
  int slices;

  template <int kRows, int kColumns, int kStep>
  static __host__ __device__ GemmWork of(const GemmCall& p) {
    const int64_t steps = ceil_div(p.K, kStep);
    return {ceil_div(p.M, kRows), ceil_div(p.N, kColumns), steps,
            p.products == 2 && !p.second_apart ? 2 * steps : steps, p.slices};
  }
  __host__ __device__ int64_t tiles() const { return row_blocks * column_blocks; }
  __host__ __device__ int64_t items() const { return tiles() * slices; }
  __host__ __device__ int64_t slice(int64_t item) const { return item / tiles(); }
  __host__ __device__ TilePosition tile(int64_t item) const {
    return tile_position(item % tiles(), row_blocks, column_blocks);
  }
  __host__ __device__ StepRange range(int64_t item) const { return slice_steps(all_steps, slices, slice(item)); }
};

// Slices of a weight's gradient (M, N) over K tokens: enough for kPrograms tiles in all, each of at least kSliceTerms.
// By the shape alone.
constexpr int64_t kPrograms = 132, kSliceTerms = 512, kMostSlices = 16;
inline int slices_of(int64_t M, int64_t N, int64_t K, int64_t tile_rows, int64_t tile_columns) {
  const int64_t tiles = std::max<int64_t>(ceil_div(M, tile_rows) * ceil_div(N, tile_columns), 1);
  const int64_t most = std::min(kMostSlices, K / kSliceTerms);
  return static_cast<int>(std::max<int64_t>(1, std::min(kPrograms / tiles, most)));
}

// The layouts that operations need: x Wᵀ, dy W, dyᵀ x. f(kAcrossA, kAcrossB) as integral constants.
template <class F>
inline void with_layout(const GemmCall& p, const F& f) {
  const bool across_a = p.product[0].a_transposed, across_b = !p.product[0].b_transposed;
  if (across_a) return f(std::true_type{}, std::true_type{});
  if (across_b) return f(std::false_type{}, std::true_type{});
  f(std::false_type{}, std::false_type{});
}

// f(kernel) for the kernel of p: `Kernels<T, epilogue, gated, across_a, across_b>::kernel`. The activations' products
// are x Wᵀ, their gradients' dy W.
template <template <class, Epilogue, bool, bool, bool> class Kernels, class T, class F>
inline void with_gemm_kernel(const GemmCall& p, const F& f) {
  switch (p.epilogue) {
    case Epilogue::kStore:
      return with_layout(p, [&](auto across_a, auto across_b) {
        f(Kernels<T, Epilogue::kStore, false, decltype(across_a)::value, decltype(across_b)::value>{});
      });
    case Epilogue::kActivation:
      return p.second_apart ? f(Kernels<T, Epilogue::kActivation, true, false, false>{})
                            : f(Kernels<T, Epilogue::kActivation, false, false, false>{});
    case Epilogue::kActivationGrad:
      return f(Kernels<T, Epilogue::kActivationGrad, false, false, true>{});
  }
}

inline bool is_aligned_matrix(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

// Sets operand_aligned and aligned.
inline void find_alignment(GemmCall* p) {
  p->operand_aligned = p->aligned = true;
  for (int i = 0; i < p->products; ++i) {
    p->operand_aligned &= is_aligned_matrix(p->product[i].a, p->product[i].lda);
    p->operand_aligned &= is_aligned_matrix(p->product[i].b, p->product[i].ldb);
  }
  for (const void* x :
       {static_cast<const void*>(p->c), static_cast<const void*>(p->pre), static_cast<const void*>(p->gate),
        static_cast<const void*>(p->dpre), static_cast<const void*>(p->dgate), p->bias[0], p->bias[1]}) {
    p->aligned &= is_aligned_matrix(x, p->N);
  }
  p->aligned &= is_aligned_matrix(p->residual, p->residual_stride);
}

}  // namespace cuda
}  // namespace fastattn
