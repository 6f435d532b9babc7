// Gradients of q, k and v, and each row's part of the slopes', on TMA and wgmma (sm_90a), up to 256 channels.
// With p = exp(s - lse) of forward and delta = dout.out - dlse of each row:
//
//   dv = pᵀ dout,   ds = p (dout vᵀ - delta),   dq = scale ds k,   dk = scale dsᵀ q
//
// and what attention_gradient.cuh adds to it for general scores (attention_score.cuh).
//
// Two kernels, one for dq and one for dk and dv, each with sums of its own in registers and in a fixed order: no
// atomics, the same bits on every run, at seven products a block; attention_sm90_backward_sums.cuh is five.
//
// Both are the same kernel. A block owns 128 lines, 64 of each computing warpgroup: rows (q, dout) or keys (k, v). The
// others, 64 lines at a time, pass through a ring that a producer fills: keys (k, v), or rows (q, dout) of every head
// that shares the keys. s and dp are products of owned and passing lines, so that for keys they lie transposed, a lane
// having two keys and a row in each of its columns; p and ds stay in registers and multiply the passing lines. What a
// lane needs of passing rows, lse and delta, comes through the ring too, brought by a warp beside the producer's.
// Of plain scores exponentials run under the product of dp, ds under that of dv.
//
// More than 128 channels leave no registers for the sums of a warpgroup's own lines: both have the same 64, the first
// computes s, the second dp, they exchange them through shared memory, and each sums half of the channels.
//
// Registers a thread: sums kSumChannels / 2 for each gradient, s and dp 32 each, p and ds 16 each; shared memory
// kSharedBytes.
#pragma once

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_sm90_forward.cuh"

namespace fastattn {
namespace cuda {

struct AttentionSm90BackwardCall : AttentionBackwardParams {
  AttentionTiling tiling;
  KeyTiling key_tiling;
  int64_t q_batches, k_batches;
  bool aligned;  // 16-byte stores
};

// A tile of owned lines: `lines` of its sequence from `start` of the tensor on, of which it takes [first, ...); of the
// passing ones `seen` by any owned line, `all` by every one of a warpgroup's; those from `zero_from` on are neither the
// sequence's nor TMA's zeros. It lies in shared memory: in registers it would be spilled.
struct AttentionSm90BackwardWork {
  AttentionTile tile;
  int first, lines, start, head, passing_start, passing_lines, passing_head, heads;
  int zero_from;
  KeyRange seen, blocks, all[2];

  template <class Tile>
  static __device__ AttentionSm90BackwardWork of(const AttentionSm90BackwardCall& p) {
    AttentionSm90BackwardWork work{};
    const int sharing = static_cast<int>(p.heads / p.heads_kv);
    work.tile = Tile::kForKeys ? key_tile(p, p.key_tiling, blockIdx.x) : attention_tile(p, p.tiling, blockIdx.x);
    const AttentionTile& tile = work.tile;
    work.first = tile.first_line, work.head = tile.group;
    work.passing_head = Tile::kForKeys ? work.head * sharing : work.head / sharing;
    work.heads = Tile::kForKeys ? sharing : 1;
    work.lines = Tile::kForKeys ? tile.keys : tile.rows, work.start = Tile::kForKeys ? tile.k_begin : tile.q_begin;
    work.passing_lines = Tile::kForKeys ? tile.rows : tile.keys;
    work.passing_start = Tile::kForKeys ? tile.q_begin : tile.k_begin;
    if (work.first >= work.lines) return work;
    const int last = work.first + Tile::kLines < work.lines ? work.first + Tile::kLines - 1 : work.lines - 1;
    work.seen = {work.template seen_by<Tile>(p, work.first).begin, work.template seen_by<Tile>(p, last).end};
    work.blocks = blocks_of_keys<Tile::kKeys>(work.seen);
    const int64_t extent = Tile::kForKeys ? p.rows : p.keys;
    work.zero_from = work.passing_start + work.seen.end < extent ? work.seen.end : INT32_MAX;
    for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
      const int from = work.first + 64 * Tile::set_of(consumer), to = from + 63;
      work.all[consumer] = {work.template seen_by<Tile>(p, to).begin, work.template seen_by<Tile>(p, from).end};
      // Lines beyond the last: the mask has no place for them, and weights of keys are terms of dq.
      if (to >= work.lines) work.all[consumer] = {0, 0};
    }
    return work;
  }

  template <class Tile>
  __device__ KeyRange seen_by(const AttentionSm90BackwardCall& p, int line) const {
    if (line >= lines) return {0, 0};
    return Tile::kForKeys ? rows_of_key(p, tile, line) : keys_of_row(p, tile, line);
  }
};

// kOwnedSets: 64 owned lines of each warpgroup, or (1) of both.
template <int kHeadDim, bool kOwnsKeys, int kPassing = 64, int kOwnedSets = 2>
struct AttentionSm90BackwardTile {
  static constexpr int kD = kHeadDim, kColumns = (kD + 63) / 64;
  static constexpr bool kForKeys = kOwnsKeys, kShares = kOwnedSets == 1;
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1), kSets = kOwnedSets, kLines = 64 * kSets;
  static constexpr int kSumChannels = kShares ? kD / 2 : kD;  // of a gradient a warpgroup's
  static constexpr int kKeys = kPassing, kStages = 2;         // passing lines of a block
  // 64 channels of a warpgroup's lines, of a block's passing ones.
  static constexpr int kQueryBox = 64 * 128, kKeyBox = kKeys * 128;
  static constexpr int kOwnedBytes = kColumns * kQueryBox, kPassingBytes = kColumns * kKeyBox;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // The owned lines of both tensors, then stages of the passing ones and of what passing rows have, then s and dp if
  // they are shared, then barriers.
  static constexpr int kRing = 2 * kSets * kOwnedBytes;
  static constexpr int kRowSums = kRing + 2 * kStages * kPassingBytes, kRowBytes = kForKeys ? kKeys * 8 : 0;
  static constexpr int kProducts = kRowSums + kStages * kRowBytes, kProductBytes = kShares ? 64 * kKeys * 4 : 0;
  static constexpr int kBarriers = kProducts + 2 * kProductBytes;
  static constexpr int kWork = kBarriers + (1 + 2 * kStages) * 8;
  static constexpr int kSharedBytes = kWork + static_cast<int>(sizeof(AttentionSm90BackwardWork));

  static __host__ __device__ constexpr int set_of(int consumer) { return kShares ? 0 : consumer; }
};

struct AttentionSm90BackwardMaps {
  TensorMap q, k, v, dout;
};

// Of a row: lse in base 2, +inf if it sees nothing, so that its weights are zeros; and delta.
struct alignas(8) RowSums {
  float lse, delta;

  static __device__ RowSums of(const AttentionBackwardParams& p, const AttentionTile& tile, int head, int row) {
    if (row >= tile.rows) return {INFINITY, 0};
    const int64_t at = tile.batch * p.row_stride[0] + head * p.row_stride[1] + tile.q_begin + row;
    return {lse_in_base_2(static_cast<const float*>(p.lse)[at]), static_cast<const float*>(p.delta)[at]};
  }
};

template <class Tile>
struct AttentionSm90BackwardMemory {
  static __device__ char* owned(int tensor, int set) {
    return dynamic_shared() + (tensor * Tile::kSets + set) * Tile::kOwnedBytes;
  }
  static __device__ char* passing(int tensor, int stage) {
    return dynamic_shared() + Tile::kRing + (stage * 2 + tensor) * Tile::kPassingBytes;
  }
  // lse (RowSums) of the stage's rows, then their deltas.
  static __device__ float* row_sums(int stage) {
    return reinterpret_cast<float*>(dynamic_shared() + Tile::kRowSums + stage * Tile::kRowBytes);
  }
  // s (0) or dp, 16 bytes of each thread after the same of the thread before it.
  static __device__ char* product(int which) {
    return dynamic_shared() + Tile::kProducts + which * Tile::kProductBytes;
  }
  static __device__ uint64_t* barrier(int index) {
    return reinterpret_cast<uint64_t*>(dynamic_shared() + Tile::kBarriers) + index;
  }
  static __device__ uint64_t* ready() { return barrier(0); }
  static __device__ uint64_t* full(int stage) { return barrier(1 + stage); }
  static __device__ uint64_t* empty(int stage) { return barrier(1 + Tile::kStages + stage); }

  static __device__ AttentionSm90BackwardWork& work() {
    return *reinterpret_cast<AttentionSm90BackwardWork*>(dynamic_shared() + Tile::kWork);
  }

  static __device__ void init(const AttentionSm90BackwardCall& p) {
    work() = AttentionSm90BackwardWork::of<Tile>(p);
    mbarrier_init(ready(), 1);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(full(stage), Tile::kForKeys ? 2 : 1), mbarrier_init(empty(stage), 4 * Tile::kConsumers);
    }
    mbarrier_init_fence();
  }
};

// One thread: the owned lines, then the passing ones of each head.
template <class Tile>
__device__ inline void attention_sm90_backward_produce(const AttentionSm90BackwardCall& p,
                                                       const AttentionSm90BackwardMaps& maps,
                                                       const AttentionSm90BackwardWork& work) {
  using Memory = AttentionSm90BackwardMemory<Tile>;
  const int q_batch = p.q_batches > 1 ? work.tile.batch : 0, k_batch = p.k_batches > 1 ? work.tile.batch : 0;
  const int batch = Tile::kForKeys ? k_batch : q_batch, passing_batch = Tile::kForKeys ? q_batch : k_batch;
  const TensorMap* const owned[2] = {Tile::kForKeys ? &maps.k : &maps.q, Tile::kForKeys ? &maps.v : &maps.dout};
  const TensorMap* const passing[2] = {Tile::kForKeys ? &maps.q : &maps.k, Tile::kForKeys ? &maps.dout : &maps.v};
  mbarrier_arrive_expect(Memory::ready(), 2 * Tile::kSets * Tile::kOwnedBytes);
#pragma unroll 1
  for (int box = 0; box < Tile::kSets * Tile::kColumns; ++box) {
    const int set = box / Tile::kColumns, column = box % Tile::kColumns;
    const int line = work.start + work.first + 64 * set;
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
      tma_load_5d(Memory::owned(tensor, set) + column * Tile::kQueryBox, *owned[tensor], Memory::ready(), column * 64,
                  0, line, work.head, batch);
    }
  }
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int head = work.passing_head; head < work.passing_head + work.heads; ++head) {
#pragma unroll 1
    for (int block = work.blocks.begin; block < work.blocks.end; ++block, place.next()) {
      mbarrier_wait(Memory::empty(place.stage), place.phase ^ 1);
      mbarrier_arrive_expect(Memory::full(place.stage), 2 * Tile::kPassingBytes);
#pragma unroll 1
      for (int box = 0; box < Tile::kPassingBytes / Tile::kQueryBox; ++box) {
        constexpr int kBoxes = Tile::kKeys / 64;
        const int line = work.passing_start + block * Tile::kKeys + box % kBoxes * 64;
#pragma unroll
        for (int tensor = 0; tensor < 2; ++tensor) {
          tma_load_5d(Memory::passing(tensor, place.stage) + box * Tile::kQueryBox, *passing[tensor],
                      Memory::full(place.stage), box / kBoxes * 64, 0, line, head, passing_batch);
        }
      }
    }
  }
}

// A warp: the sums of passing rows.
template <class Tile>
__device__ inline void attention_sm90_produce_row_sums(const AttentionSm90BackwardCall& p,
                                                       const AttentionSm90BackwardWork& work) {
  using Memory = AttentionSm90BackwardMemory<Tile>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int head = work.passing_head; head < work.passing_head + work.heads; ++head) {
#pragma unroll 1
    for (int block = work.blocks.begin; block < work.blocks.end; ++block, place.next()) {
      mbarrier_wait(Memory::empty(place.stage), place.phase ^ 1);
#pragma unroll
      for (int i = lane; i < Tile::kKeys; i += 32) {
        const RowSums sums = RowSums::of(p, work.tile, head, block * Tile::kKeys + i);
        Memory::row_sums(place.stage)[i] = sums.lse, Memory::row_sums(place.stage)[Tile::kKeys + i] = sums.delta;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(Memory::full(place.stage));
    }
  }
}

// A computing warpgroup: its 64 owned lines against all passing ones.
template <class T, class Tile, class Scores>
struct AttentionSm90BackwardConsumer {
  using Memory = AttentionSm90BackwardMemory<Tile>;
  const AttentionSm90BackwardCall& p;
  const AttentionSm90BackwardWork& work;
  int consumer;
  RowSums own_sums[2];  // of the lane's rows

  __device__ AttentionSm90BackwardConsumer(const AttentionSm90BackwardCall& call, const AttentionSm90BackwardWork& own,
                                           int number)
      : p(call), work(own), consumer(number) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own_sums[i] = Tile::kForKeys ? RowSums{} : RowSums::of(p, work.tile, work.head, line(i));
    }
  }

  // First of the warp's lines.
  __device__ int warp_line() const { return work.first + 64 * Tile::set_of(consumer) + warpgroup_thread() / 32 * 16; }
  __device__ int line(int i) const { return warp_line() + warpgroup_thread() % 32 / 4 + 8 * i; }

  // Passing lines that no owned one sees: whatever they hold is multiplied by zeros.
  __device__ void zero_unseen(int first, int stage) const {
    if (first >= work.seen.begin && first + Tile::kKeys <= work.zero_from) return;
    const int thread = warpgroup_thread();
#pragma unroll 1
    for (int i = thread / 8; i < Tile::kKeys; i += 16) {
      if (first + i >= work.seen.begin && first + i < work.zero_from) continue;
#pragma unroll 1
      for (int box = 0; box < 2 * Tile::kColumns; ++box) {
        *reinterpret_cast<Packed<BFloat16>*>(Memory::passing(0, stage) + box * Tile::kKeyBox + i * 128 +
                                             thread % 8 * 16) = {};
      }
    }
    fence_async_shared();
    named_barrier_sync(1 + consumer, 128);
  }

  static __device__ void pack(const float (&x)[Tile::kKeys / 2], uint32_t (&pairs)[Tile::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 4; ++i) pairs[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
  }

  // f(i, x) of each element and what its passing row has at `rows`.
  template <class F>
  static __device__ void each_row(const float* rows, const F& f) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; i += 4) {
      struct alignas(8) Two {
        float x[2];
      };
      const Two two = *reinterpret_cast<const Two*>(rows + i * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i + e, two.x[e % 2]);
    }
  }

  // s in, weights out.
  __device__ void weigh(int stage, int first, float (&s)[Tile::kKeys / 2]) const {
    if (first < work.all[consumer].begin || first + Tile::kKeys > work.all[consumer].end) {
      hide_unseen(s, {work.template seen_by<Tile>(p, line(0)), work.template seen_by<Tile>(p, line(1))}, first);
    }
    const float unit = PlainScores::unit(p);
    if constexpr (Tile::kForKeys) {
      const float* const lses = Memory::row_sums(stage) + warpgroup_thread() % 4 * 2;
      each_row(lses, [&](int i, float lse) { s[i] = exp2_fast(fmaf(s[i], unit, -lse)); });
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) s[i] = exp2_fast(fmaf(s[i], unit, -own_sums[i / 2 % 2].lse));
    }
  }

  // Of any scores: s in, weights out; dp in, ds out, at q.k; of the lane's rows what the slopes' gradient takes.
  __device__ void weigh_general(int head, int stage, int first, float (&s)[Tile::kKeys / 2],
                                float (&dp)[Tile::kKeys / 2], float (&distances)[2]) const {
    const bool tested = first < work.all[consumer].begin || first + Tile::kKeys > work.all[consumer].end;
    const float lse[2] = {own_sums[0].lse, own_sums[1].lse}, delta[2] = {own_sums[0].delta, own_sums[1].delta};
    const float* const rows = Memory::row_sums(stage);
    const PairPlace place = pair_place(p, work.tile.batch, head);
    // As many as dropout's bits are at a time: 64 passing lines.
#pragma unroll
    for (int part = 0; part < Tile::kKeys / 2; part += 32) {
      differentiate_pairs<true, Tile::kForKeys, false>(p, work.tile, place, warp_line(), first + 2 * part, tested, lse,
                                                       delta, rows + 2 * part, rows + Tile::kKeys + 2 * part,
                                                       reinterpret_cast<float (&)[32]>(s[part]),
                                                       reinterpret_cast<float (&)[32]>(dp[part]), distances);
    }
  }

  // dp in, ds out.
  __device__ void differentiate(int stage, const float (&weights)[Tile::kKeys / 2],
                                float (&dp)[Tile::kKeys / 2]) const {
    if constexpr (Tile::kForKeys) {
      // Weights are never negative: the deltas wait for the last one, or there would not be registers for them.
      const float* const deltas =
          Memory::row_sums(stage) + Tile::kKeys + warpgroup_thread() % 4 * 2 + (weights[Tile::kKeys / 2 - 1] < 0);
      each_row(deltas, [&](int i, float delta) { dp[i] = weights[i] == 0 ? 0.0f : weights[i] * (dp[i] - delta); });
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) {
        dp[i] = weights[i] == 0 ? 0.0f : weights[i] * (dp[i] - own_sums[i / 2 % 2].delta);
      }
    }
  }

  // Of shared lines the first warpgroup computes s, the second dp: each leaves its own where both find it.
  __device__ void put_product(const float (&x)[Tile::kKeys / 2]) const {
    char* const own = Memory::product(consumer) + warpgroup_thread() * 16;
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; i += 4) {
      *reinterpret_cast<Packed<float>*>(own + i * (128 * 4)) = {{x[i], x[i + 1], x[i + 2], x[i + 3]}};
    }
  }
  static __device__ void take_product(int which, float (&x)[Tile::kKeys / 2]) {
    const char* const from = Memory::product(which) + warpgroup_thread() * 16;
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; i += 4) {
      const Packed<float> four = *reinterpret_cast<const Packed<float>*>(from + i * (128 * 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i + e] = four.value[e];
    }
  }

  // Of s and dp what the thread shall have before it computes weights: dp too if scores are general or it is on its
  // way.
  __device__ void multiply(int stage, float (&s)[Tile::kKeys / 2], float (&dp)[Tile::kKeys / 2]) const {
    if constexpr (Tile::kShares) {
      attention_sm90_scores<T, Tile>(s, Memory::owned(consumer, 0), Memory::passing(consumer, stage));
      wgmma_wait<0>();
      wgmma_fence_sums(s);
      put_product(s);
      named_barrier_sync(kPutBarrier, 128 * Tile::kConsumers);
      take_product(0, s);
      if (Scores::kGeneral) take_product(1, dp);
    } else {
      attention_sm90_scores<T, Tile>(s, Memory::owned(0, consumer), Memory::passing(0, stage));
      attention_sm90_scores<T, Tile>(dp, Memory::owned(1, consumer), Memory::passing(1, stage));
      wgmma_wait<Scores::kGeneral ? 0 : 1>();
      wgmma_fence_sums(s);
      if (Scores::kGeneral) wgmma_fence_sums(dp);
    }
  }
  static constexpr int kPutBarrier = 1 + Tile::kConsumers, kTakenBarrier = kPutBarrier + 1;

  // first_sum: of dk or dq, but for the scale; second_sum: of dv; of shared lines a warpgroup has half of the channels.
  __device__ void attend(float (&first_sum)[Tile::kSumChannels / 2],
                         float (&second_sum)[Tile::kForKeys ? Tile::kSumChannels / 2 : 1],
                         float (&distances)[2]) const {
    const int columns = Tile::kShares ? consumer * (Tile::kColumns / 2) * Tile::kKeyBox : 0;
    RingPlace<Tile::kStages> place;
    mbarrier_wait(Memory::ready(), 0);
#pragma unroll 1
    for (int head = work.passing_head; head < work.passing_head + work.heads; ++head) {
#pragma unroll 1
      for (int block = work.blocks.begin; block < work.blocks.end; ++block, place.next()) {
        float s[Tile::kKeys / 2], dp[Tile::kKeys / 2];
        uint32_t weights[Tile::kKeys / 4], gradients[Tile::kKeys / 4];
        mbarrier_wait(Memory::full(place.stage), place.phase);
        zero_unseen(block * Tile::kKeys, place.stage);
        multiply(place.stage, s, dp);
        if constexpr (Scores::kGeneral) {
          weigh_general(Tile::kForKeys ? head : work.head, place.stage, block * Tile::kKeys, s, dp, distances);
        } else {
          weigh(place.stage, block * Tile::kKeys, s);
        }
        if constexpr (Tile::kForKeys) {
          pack(s, weights);
          attention_sm90_values<T, Tile>(second_sum, weights, Memory::passing(1, place.stage) + columns);
        }
        if constexpr (!Scores::kGeneral) {
          if constexpr (Tile::kShares) {
            take_product(1, dp);
          } else {
            wgmma_wait<Tile::kForKeys>();
            wgmma_fence_sums(dp);
          }
          differentiate(place.stage, s, dp);
        }
        if (Tile::kShares) named_barrier_sync(kTakenBarrier, 128 * Tile::kConsumers);
        pack(dp, gradients);
        attention_sm90_values<T, Tile>(first_sum, gradients, Memory::passing(0, place.stage) + columns);
        wgmma_wait<0>();
        wgmma_fence_sums(first_sum);
        if constexpr (Tile::kForKeys) wgmma_fence_sums(second_sum);
        if (warpgroup_thread() % 32 == 0) mbarrier_arrive(Memory::empty(place.stage));
      }
    }
  }

  __device__ void store_distances(const float (&distances)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = quad_reduce(distances[i], [](float x, float y) { return x + y; });
      const int64_t row = work.tile.batch * p.row_stride[0] + work.head * p.row_stride[1] + work.start + line(i);
      if (line(i) < work.lines && threadIdx.x % 4 == 0 && (!Tile::kShares || consumer == 0))
        static_cast<float*>(p.slope_rows)[row] = total;
    }
  }

  // The lines of one gradient, in memory (lines, channels).
  __device__ void store(const float (&sum)[Tile::kSumChannels / 2], float scale, void* gradient,
                        int64_t channels) const {
    const int64_t batch = work.tile.batch;
    const int channel = Tile::kShares ? consumer * Tile::kSumChannels : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t before = Tile::kForKeys ? batch * p.key_stride[0] + work.head * p.key_stride[1]
                                            : batch * p.row_stride[0] + work.head * p.row_stride[1];
      T* const out = static_cast<T*>(gradient) + (before + work.start + line(i)) * channels + channel;
      store_line(sum, i, scale, line(i) < work.lines, out, static_cast<int>(channels) - channel, p.aligned);
    }
  }
};

// Which computing warpgroup the thread is of; told by a lane to its warp, so that addresses can be in uniform
// registers.
__device__ inline int consumer_of_warp() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
}

template <class T, class Tile, class Scores>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_backward_kernel(const __grid_constant__ AttentionSm90BackwardCall p,
                                   const __grid_constant__ AttentionSm90BackwardMaps maps) {
  note_dynamic_shared<Tile::kSharedBytes>();
  if (threadIdx.x == 0) AttentionSm90BackwardMemory<Tile>::init(p);
  __syncthreads();
  const AttentionSm90BackwardWork& work = AttentionSm90BackwardMemory<Tile>::work();
  if (work.first >= work.lines) return;
  if (threadIdx.x < 128) {
    set_max_registers_down<Tile::kProducerRegisters>();
    if (work.blocks.begin >= work.blocks.end) return;
    if (threadIdx.x == 0) attention_sm90_backward_produce<Tile>(p, maps, work);
    if (Tile::kForKeys && threadIdx.x / 32 == 1) attention_sm90_produce_row_sums<Tile>(p, work);
    return;
  }
  set_max_registers_up<Tile::kConsumerRegisters>();
  const AttentionSm90BackwardConsumer<T, Tile, Scores> own(p, work, consumer_of_warp());
  constexpr int kFirst = Tile::kSumChannels / 2, kSecond = Tile::kForKeys ? kFirst : 1;
  float first_sum[kFirst], second_sum[kSecond], distances[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kFirst; ++i) first_sum[i] = 0;
#pragma unroll
  for (int i = 0; i < kSecond; ++i) second_sum[i] = 0;
  if (work.blocks.begin < work.blocks.end) own.attend(first_sum, second_sum, distances);
  const float scale = static_cast<float>(p.scale);
  if constexpr (Tile::kForKeys) {
    own.store(first_sum, scale, p.dk, p.head_dim);
    own.store(second_sum, Scores::kGeneral ? static_cast<float>(p.dropout_scale) : 1.0f, p.dv, p.head_dim_v);
  } else {
    own.store(first_sum, scale, p.dq, p.head_dim);
    if (Scores::kGeneral && p.slope_rows != nullptr) own.store_distances(distances);
  }
}

struct AttentionSm90BackwardTensors {
  AttentionSm90BackwardCall call;
  AttentionSm90Tensor q, k, v, dout;

  explicit AttentionSm90BackwardTensors(const AttentionBackwardParams& p) {
    static_cast<AttentionBackwardParams&>(call) = p;
    call.q_batches = p.q_stride[0] == 0 ? 1 : p.batch;
    call.k_batches = p.k_stride[0] == 0 && p.v_stride[0] == 0 ? 1 : p.batch;
    const auto tensor = [&](const void* x, const int64_t (&stride)[3], int64_t channels, bool keys) {
      return attention_sm90_tensor(x, stride, channels, keys ? p.keys : p.rows, keys ? p.heads_kv : p.heads,
                                   keys ? call.k_batches : call.q_batches, 1, 64);
    };
    q = tensor(p.q, p.q_stride, p.head_dim, false), dout = tensor(p.dout, p.dout_stride, p.head_dim_v, false);
    k = tensor(p.k, p.k_stride, p.head_dim, true), v = tensor(p.v, p.v_stride, p.head_dim_v, true);
    call.aligned = p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0;
    for (const void* x : {p.dq, p.dk, p.dv}) call.aligned &= reinterpret_cast<uintptr_t>(x) % 16 == 0;
  }
};

// 16-bit tensors of up to 256 channels that TMA can read; the rest is the mma.sync kernels', and so is a mask's
// gradient.
inline bool attention_sm90_backward_takes(const AttentionBackwardParams& p) {
  const bool takes = (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.block_table == nullptr &&
                     std::max(p.head_dim, p.head_dim_v) <= 256 && std::min({p.batch, p.heads, p.rows, p.keys}) > 0 &&
                     (p.q_stride[0] == 0) == (p.dout_stride[0] == 0);
  if (!takes) return false;
  const AttentionSm90BackwardTensors x(p);
  return attention_sm90_readable(x.q) && attention_sm90_readable(x.k) && attention_sm90_readable(x.v) &&
         attention_sm90_readable(x.dout);
}

// dq, dk and dv of what attention_sm90_backward_takes, from lse and delta.
template <class T, class MakeMap, class Launch>
void launch_attention_sm90_backward(const AttentionBackwardParams& p, const MakeMap& make_map, const Launch& launch) {
  AttentionSm90BackwardTensors x(p);
  const AttentionSm90BackwardMaps maps = {make_map(x.q), make_map(x.k), make_map(x.v), make_map(x.dout)};
  const auto run = [&](auto tile, auto scores) {
    using Tile = decltype(tile);
    x.call.tiling = attention_tiling(p, Tile::kLines, 1), x.call.key_tiling = key_tiling(p, Tile::kLines);
    const int64_t tiles = Tile::kForKeys ? x.call.key_tiling.tiles() : x.call.tiling.tiles();
    const LaunchConfig config = {tiles, Tile::kThreads, Tile::kSharedBytes};
    launch(Tile::kForKeys ? "attention_sm90_backward of keys" : "attention_sm90_backward of rows",
           attention_sm90_backward_kernel<T, Tile, decltype(scores)>, config, x.call, maps);
  };
  const auto both = [&](auto width, auto scores) {
    constexpr int kD = decltype(width)::value, kSets = kD > 128 ? 1 : 2;
    run(AttentionSm90BackwardTile<kD, false, 64, kSets>(), scores);
    run(AttentionSm90BackwardTile<kD, true, 64, kSets>(), scores);
  };
  // What is not common has fewer instantiations: 192 channels are padded to 256, of general scores 96 to 128.
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  const auto choose = [&](auto scores) {
    if (channels <= 64) return both(std::integral_constant<int, 64>(), scores);
    if (channels <= 96 && !scores.kGeneral) return both(std::integral_constant<int, 96>(), PlainScores());
    if (channels <= 128) return both(std::integral_constant<int, 128>(), scores);
    both(std::integral_constant<int, 256>(), scores);
  };
  PlainScores::takes(p) ? choose(PlainScores()) : choose(GeneralScores());
}

}  // namespace cuda
}  // namespace fastattn
