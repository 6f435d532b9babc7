// The matrix product on wgmma (sm_90a). Contract in gemm.cuh, what follows the product in epilogue.cuh.
//
// A block of three warpgroups computes 128 x 256 of the result, with a gate 128 x 128 of each of two products that
// share A. One thread of the first brings steps of 64 along K by TMA through a ring of 4 stages of 48 KiB, in 128-byte
// swizzled rows; each of the other two multiplies 64 rows of it: 128 accumulators a thread. setmaxnreg moves registers
// from the first (40) to the others (232): 128 · 40 + 256 · 232 = 64 Ki.
//
// Blocks are persistent: block b takes tiles b, b + gridDim, ... of the grouped order, and while its consumers finish a
// tile its producer fills the ring for the next. Shared memory: ring 192 KiB, staging of eight warps 32 KiB, barriers.
//
// An operand along K is one box of 64 terms by its lines; across K, boxes of 64 lines by 64 terms, 8 KiB each, one
// after the other: wgmma reads both forms (the descriptors below), and TMA fills with zeros what lies outside.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

struct GemmSm90 {
  static constexpr int kRows = 128, kStep = 64, kStages = 4, kThreads = 384, kConsumers = 256, kConsumerWarps = 8;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int columns(bool gated) { return gated ? 128 : 256; }
  static constexpr int kBytesA = kRows * kStep * 2, kStageBytes = kBytesA + 256 * kStep * 2;
  static constexpr int kStaging = kStages * kStageBytes, kBarriers = kStaging + kConsumerWarps * kWarpStageBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  // Lines of a box that lies across K, and its bytes.
  static constexpr int kBoxLines = 64, kBoxBytes = kBoxLines * kStep * 2;
};

// Tensor maps of the operands: a, b of the first product; a2, b2 of the one that is added, or b2 the gate's.
struct GemmMaps {
  TensorMap a, b, a2, b2;
};

// Operand of kLines lines as a stage holds it.
template <class T, int kLines, bool kAcross>
struct Sm90Operand {
  static constexpr int kBytes = kLines * GemmSm90::kStep * 2;

  // One thread: brings lines [line, ...) and terms [k, ...) and counts their bytes on `barrier`.
  static __device__ void load(char* tile, const TensorMap& map, uint64_t* barrier, int line, int k) {
    if constexpr (kAcross) {
#pragma unroll
      for (int box = 0; box < kLines / GemmSm90::kBoxLines; ++box) {
        tma_load_2d(tile + box * GemmSm90::kBoxBytes, map, barrier, line + box * GemmSm90::kBoxLines, k);
      }
    } else {
      tma_load_2d(tile, map, barrier, k, line);
    }
  }

  // The descriptor of terms [k, k + 16). Along K: 8 lines, 1024 bytes, from one group of lines to the next. Across: 8
  // terms, 1024 bytes, from one group of terms to the next, and a box from 64 lines to the next 64.
  static __device__ uint64_t descriptor(const char* tile, int k) {
    return kAcross ? wgmma_descriptor(tile + k * 128, GemmSm90::kBoxBytes, 1024)
                   : wgmma_descriptor(tile + k * 2, 16, 1024);
  }
};

// A place in the ring.
struct RingPosition {
  int stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == GemmSm90::kStages) stage = 0, phase ^= 1;
  }
};

template <class T, bool kGated, bool kAcrossA, bool kAcrossB>
struct GemmSm90Block {
  static constexpr int kProducts = kGated ? 2 : 1, kColumns = GemmSm90::columns(kGated), kSums = kColumns / 2;
  using A = Sm90Operand<T, GemmSm90::kRows, kAcrossA>;
  using B = Sm90Operand<T, kColumns, kAcrossB>;

  float sums[kProducts][kSums];

  // One thread: every step of every tile of this block, in order.
  static __device__ void produce(const GemmCall& p, const GemmMaps& maps, const GemmWork& work, char* shared,
                                 uint64_t* full, uint64_t* empty) {
    RingPosition ring;
    for (int64_t item = blockIdx.x; item < work.items(); item += gridDim.x) {
      const TilePosition tile = work.tile(item);
      const StepRange range = work.range(item);
      const int row = static_cast<int>(tile.row_block) * GemmSm90::kRows;
      const int column = static_cast<int>(tile.column_block) * kColumns;
      for (int64_t step = range.begin; step < range.end; ++step, ring.next()) {
        const bool second = step >= work.steps;
        const int k = static_cast<int>(second ? step - work.steps : step) * GemmSm90::kStep;
        char* const stage = shared + ring.stage * GemmSm90::kStageBytes;
        uint64_t* const barrier = &full[ring.stage];
        mbarrier_wait(&empty[ring.stage], ring.phase ^ 1);
        mbarrier_arrive_expect(barrier, GemmSm90::kStageBytes);
        A::load(stage, second ? maps.a2 : maps.a, barrier, row, k);
        B::load(stage + A::kBytes, second ? maps.b2 : maps.b, barrier, column, k);
        if constexpr (kGated) B::load(stage + A::kBytes + B::kBytes, maps.b2, barrier, column, k);
      }
    }
  }

  // No use of the sums is moved across.
  __device__ void fence_sums() {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) wgmma_fence_sums(sums[product]);
  }

  // A warpgroup: starts the products of one stage, 64 rows from `consumer` on.
  __device__ void multiply(const char* stage, int consumer) {
    const char* b = stage + A::kBytes;
    fence_sums();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < GemmSm90::kStep; k += 16) {
      const uint64_t rows = A::descriptor(stage + consumer * GemmSm90::kBoxBytes, k);
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
        wgmma<T, kAcrossA, kAcrossB>(sums[product], rows, B::descriptor(b + product * B::kBytes, k));
      }
    }
    wgmma_commit();
  }

  // The sums of one tile; a stage is given back when the products after its own have started.
  __device__ void accumulate(const StepRange& range, const char* shared, uint64_t* full, uint64_t* empty, int consumer,
                             RingPosition& ring) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[product][i] = 0.0f;
    }
    const bool signals = threadIdx.x % 32 == 0;
    uint64_t* held = nullptr;
    for (int64_t step = range.begin; step < range.end; ++step, ring.next()) {
      mbarrier_wait(&full[ring.stage], ring.phase);
      multiply(shared + ring.stage * GemmSm90::kStageBytes, consumer);
      wgmma_wait<1>();
      if (held != nullptr && signals) mbarrier_arrive(held);
      held = &empty[ring.stage];
    }
    wgmma_wait<0>();
    fence_sums();
    if (held != nullptr && signals) mbarrier_arrive(held);
  }
};

template <class T, Epilogue kEpilogue, bool kGated, bool kAcrossA, bool kAcrossB>
__global__ void __launch_bounds__(GemmSm90::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmCall p, const __grid_constant__ GemmMaps maps) {
  using Block = GemmSm90Block<T, kGated, kAcrossA, kAcrossB>;
  constexpr int kWarpgroup = 128, kWarpgroupWarps = 4;
  note_dynamic_shared<GemmSm90::kSharedBytes>();
  char* const shared = dynamic_shared();
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + GemmSm90::kBarriers);
  uint64_t* const empty = full + GemmSm90::kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < GemmSm90::kStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], GemmSm90::kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const GemmWork work = GemmWork::of<GemmSm90::kRows, Block::kColumns, GemmSm90::kStep>(p);
  if (threadIdx.x < kWarpgroup) {
    set_max_registers_down<GemmSm90::kProducerRegisters>();
    if (threadIdx.x == 0) Block::produce(p, maps, work, shared, full, empty);
    return;
  }
  set_max_registers_up<GemmSm90::kConsumerRegisters>();
  const int consumer = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x / 32 - kWarpgroupWarps;
  RingPosition ring;
  for (int64_t item = blockIdx.x; item < work.items(); item += gridDim.x) {
    Block block;
    block.accumulate(work.range(item), shared, full, empty, consumer, ring);
    const TilePosition tile = work.tile(item);
    const TileContext at = {tile.row_block * GemmSm90::kRows + warp * kStageRows,
                            tile.column_block * Block::kColumns,
                            tile.row_block,
                            work.slice(item),
                            warp,
                            0,
                            reinterpret_cast<float*>(shared + GemmSm90::kStaging)};
    finish_tile<T, kEpilogue, kGated, 1, Block::kColumns / 8, GemmSm90::kConsumerWarps>(
        p, at, [&](int product, int, int group, int e) { return block.sums[product][group * 4 + e]; },
        [] { named_barrier_sync(1, GemmSm90::kConsumers); });
  }
}

template <class T, Epilogue kEpilogue, bool kGated, bool kAcrossA, bool kAcrossB>
struct GemmSm90Kernels {
  static constexpr auto kernel = gemm_sm90_kernel<T, kEpilogue, kGated, kAcrossA, kAcrossB>;
};

// Whether TMA can bring p's operands: 16-byte rows and addresses, extents that a coordinate holds, nothing empty.
inline bool gemm_sm90_takes(const GemmCall& p) {
  bool takes =
      p.operand_aligned && p.M > 0 && p.N > 0 && p.K > 0 && std::max({p.M, p.N, p.K}) < (int64_t{1} << 31) - 512;
  for (int i = 0; i < p.products; ++i) takes &= p.product[i].lda > 0 && p.product[i].ldb > 0;
  return takes;
}

// The maps of p's operands. make_map(data, rows, columns, row stride, box rows, box columns) of a matrix in memory, in
// elements.
template <class MakeMap>
inline GemmMaps make_gemm_maps(const GemmCall& p, const MakeMap& make_map) {
  const int columns = GemmSm90::columns(p.second_apart);
  const auto operand = [&](const void* x, int64_t stride, int64_t lines, bool across, int tile_lines) {
    return across ? make_map(x, p.K, lines, stride, GemmSm90::kStep, GemmSm90::kBoxLines)
                  : make_map(x, lines, p.K, stride, tile_lines, GemmSm90::kStep);
  };
  const auto map_a = [&](const MatrixProduct& m) { return operand(m.a, m.lda, p.M, m.a_transposed, GemmSm90::kRows); };
  const auto map_b = [&](const MatrixProduct& m) { return operand(m.b, m.ldb, p.N, !m.b_transposed, columns); };
  const MatrixProduct& second = p.product[p.products - 1];
  return {map_a(p.product[0]), map_b(p.product[0]), map_a(second), map_b(second)};
}

// p's product and what follows it, into p.parts if that is there, on as many blocks as the device runs at a time.
template <class T, class MakeMap, class Launch>
void launch_gemm_sm90(const GemmCall& p, int multiprocessors, const MakeMap& make_map, const Launch& launch) {
  const int64_t items = ceil_div(p.M, GemmSm90::kRows) * ceil_div(p.N, GemmSm90::columns(p.second_apart)) * p.slices;
  const LaunchConfig config = {std::min<int64_t>(items, multiprocessors), GemmSm90::kThreads, GemmSm90::kSharedBytes};
  const GemmMaps maps = make_gemm_maps(p, make_map);
  with_gemm_kernel<GemmSm90Kernels, T>(
      p, [&](auto kernels) { launch("gemm_sm90", decltype(kernels)::kernel, config, p, maps); });
}

}  // namespace cuda
}  // namespace fastattn
