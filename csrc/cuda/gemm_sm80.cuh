// The matrix product on mma.sync (sm_80, 86, 89, 120; sm_90 for operands that TMA does not take). Contract in gemm.cuh,
// what follows the product in epilogue.cuh.
//
// A block of four warps computes 128 x 128 of the result, with a gate 128 x 64 of each of two products that share A; a
// warp a quarter of it, 64 x 64: 128 accumulators a thread. Steps of 32 along K pass through a ring of 3 stages of 16
// KiB filled by cp.async: 48 KiB, so that a multiprocessor with 100 KiB holds two blocks, one computing while the other
// waits or finishes its tile.
//
// A stage holds an operand as it lies in memory: rows of 64 bytes along K, or 32 rows of 128 to 256 bytes across it,
// read by ldmatrix or its transposing form. 16-byte chunks are swizzled so that neither has bank conflicts.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

struct GemmSm80 {
  static constexpr int kRows = 128, kStep = 32, kStages = 3, kThreads = 128;
  static constexpr int kWarpRows = 2, kWarpColumns = 2;
  // Columns of one product.
  static constexpr int columns(bool gated) { return gated ? 64 : 128; }
  static constexpr int kStageBytes = (kRows + 128) * kStep * 2, kSharedBytes = kStages * kStageBytes;
};

// A tile of kLines lines by 32 of K of one operand.
template <class T, int kLines, bool kAcross>
struct OperandTile {
  static constexpr int kRows = kAcross ? GemmSm80::kStep : kLines, kChunks = (kAcross ? kLines : GemmSm80::kStep) / 8;
  static constexpr int kBytes = kLines * GemmSm80::kStep * 2;

  // Starts the block's copy of lines [line, ...) and terms [k, ...) of an operand (lines, inner); zero outside.
  static __device__ void load(char* tile, const T* x, int64_t stride, int64_t line, int64_t lines, int64_t k,
                              int64_t inner, bool aligned) {
    const int64_t row = kAcross ? k : line, rows = kAcross ? inner : lines;
    const int64_t column = kAcross ? line : k, columns = kAcross ? lines : inner;
#pragma unroll
    for (int i = 0; i < kRows * kChunks / GemmSm80::kThreads; ++i) {
      const int index = threadIdx.x + i * GemmSm80::kThreads, r = index / kChunks, chunk = index % kChunks;
      const int64_t left = columns - (column + chunk * 8);
      const int count = row + r >= rows || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      const T* from = count > 0 ? x + (row + r) * stride + column + chunk * 8 : x;
      char* to = tile + swizzled_chunk<kChunks>(r, chunk) * 16;
      if (aligned) {
        cp_async16(to, from, count * 2);
      } else {
        Packed<T> value = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < count) value.value[e] = from[e];
        }
        *reinterpret_cast<Packed<T>*>(to) = value;
      }
    }
  }

  // Four 8 x 8 fragments of lines [line, line + 16) and terms [k, k + 16): by lines then terms, or terms then lines.
  template <bool kTermsFirst>
  static __device__ void fragments(const char* tile, int line, int k, uint32_t (&registers)[4]) {
    const int lane = threadIdx.x % 32, inner = lane / 8 % 2 * 8, outer = lane / 16 * 8;
    const int l = line + (kTermsFirst ? outer : inner), t = k + (kTermsFirst ? inner : outer);
    if constexpr (kAcross) {
      ldmatrix_x4_trans(registers, tile + swizzled_chunk<kChunks>(t + lane % 8, l / 8) * 16);
    } else {
      ldmatrix_x4(registers, tile + swizzled_chunk<kChunks>(l + lane % 8, t / 8) * 16);
    }
  }
};

template <class T, bool kGated, bool kAcrossA, bool kAcrossB>
struct GemmSm80Block {
  static constexpr int kProducts = kGated ? 2 : 1, kColumns = GemmSm80::columns(kGated);
  static constexpr int kSlices = GemmSm80::kRows / GemmSm80::kWarpRows / 16;  // of 16 rows
  static constexpr int kGroups = kColumns / GemmSm80::kWarpColumns / 8;       // of 8 columns
  using A = OperandTile<T, GemmSm80::kRows, kAcrossA>;
  using B = OperandTile<T, kColumns, kAcrossB>;

  float sums[kProducts][kSlices][kGroups][4];

  static __device__ void load(const GemmCall& p, char* stage, int64_t row, int64_t column, int64_t step,
                              int64_t steps) {
    // The second of two products that are added follows the first.
    const bool second = step >= steps;
    const int64_t k = (second ? step - steps : step) * GemmSm80::kStep;
    const MatrixProduct& product = p.product[second ? 1 : 0];
    A::load(stage, static_cast<const T*>(product.a), product.lda, row, p.M, k, p.K, p.operand_aligned);
    B::load(stage + A::kBytes, static_cast<const T*>(product.b), product.ldb, column, p.N, k, p.K, p.operand_aligned);
    if constexpr (kGated) {
      const MatrixProduct& gate = p.product[1];
      B::load(stage + A::kBytes + B::kBytes, static_cast<const T*>(gate.b), gate.ldb, column, p.N, k, p.K,
              p.operand_aligned);
    }
  }

  __device__ void multiply(const char* stage, int warp_row, int warp_column) {
    const int row = warp_row * kSlices * 16, column = warp_column * kGroups * 8;
#pragma unroll
    for (int k = 0; k < GemmSm80::kStep; k += 16) {
      uint32_t a[kSlices][4];
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        A::template fragments<false>(stage, row + slice * 16, k, a[slice]);
      }
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int group = 0; group < kGroups; group += 2) {
          uint32_t b[4];
          B::template fragments<true>(stage + A::kBytes + product * B::kBytes, column + group * 8, k, b);
          const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            mma_m16n8k16<T>(sums[product][slice][group], a[slice], left);
            mma_m16n8k16<T>(sums[product][slice][group + 1], a[slice], right);
          }
        }
      }
    }
  }
};

template <class T, Epilogue kEpilogue, bool kGated, bool kAcrossA, bool kAcrossB>
__global__ void __launch_bounds__(GemmSm80::kThreads, 2) gemm_sm80_kernel(GemmCall p) {
  using Block = GemmSm80Block<T, kGated, kAcrossA, kAcrossB>;
  constexpr int kStages = GemmSm80::kStages;
  note_dynamic_shared<GemmSm80::kSharedBytes>();
  char* const shared = dynamic_shared();
  const GemmWork work = GemmWork::of<GemmSm80::kRows, Block::kColumns, GemmSm80::kStep>(p);
  const TilePosition tile = work.tile(blockIdx.x);
  const StepRange range = work.range(blockIdx.x);
  const int64_t row = tile.row_block * GemmSm80::kRows, column = tile.column_block * Block::kColumns;
  const int warp = threadIdx.x / 32, warp_row = warp % GemmSm80::kWarpRows, warp_column = warp / GemmSm80::kWarpRows;

  Block block;
#pragma unroll
  for (float& sum : reinterpret_cast<float (&)[sizeof block.sums / 4]>(block.sums)) sum = 0.0f;
  const auto load = [&](int64_t step, int stage) {
    if (step < range.end) Block::load(p, shared + stage * GemmSm80::kStageBytes, row, column, step, work.steps);
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(range.begin + stage, stage);
  int stage = 0;
  for (int64_t step = range.begin; step < range.end; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    block.multiply(shared + stage * GemmSm80::kStageBytes, warp_row, warp_column);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  const TileContext at = {row + warp_row * Block::kSlices * 16,
                          column + warp_column * Block::kGroups * 8,
                          tile.row_block,
                          work.slice(blockIdx.x),
                          warp_row,
                          warp_column,
                          reinterpret_cast<float*>(shared)};
  finish_tile<T, kEpilogue, kGated, Block::kSlices, Block::kGroups, GemmSm80::kWarpRows>(
      p, at, [&](int product, int s, int group, int e) { return block.sums[product][s][group][e]; },
      [] { __syncthreads(); });
}

template <class T, Epilogue kEpilogue, bool kGated, bool kAcrossA, bool kAcrossB>
struct GemmSm80Kernels {
  static constexpr auto kernel = gemm_sm80_kernel<T, kEpilogue, kGated, kAcrossA, kAcrossB>;
};

inline int64_t gemm_sm80_blocks(const GemmCall& p) {
  return ceil_div(p.M, GemmSm80::kRows) * ceil_div(p.N, GemmSm80::columns(p.second_apart)) * p.slices;
}

// p's product and what follows it, into p.parts if that is there.
template <class T, class Launch>
void launch_gemm_sm80(const GemmCall& p, const Launch& launch) {
  if (p.M == 0 || p.N == 0) return;
  const LaunchConfig config = {gemm_sm80_blocks(p), GemmSm80::kThreads, GemmSm80::kSharedBytes};
  with_gemm_kernel<GemmSm80Kernels, T>(
      p, [&](auto kernels) { launch("gemm_sm80", decltype(kernels)::kernel, config, p); });
}

}  // namespace cuda
}  // namespace fastattn
