// Gradients of q, k and v at five products a block (sm_90a), of the calls that attention_sm90_backward.cuh takes and
// with its pieces. Where that file has a kernel for rows and one for keys, here the one that owns keys also gives every
// row its part of dq:
//
//   dq = scale Σ ds k      over the blocks of keys, in float32 in memory, by TMA's reduce-add
//
// Which block adds first is chance, so dq's last bits differ from run to run: the operator takes this form unless
// torch.use_deterministic_algorithms(True) is set.
//
// ds lies transposed in the registers of the warpgroups, keys by rows, and goes as such to shared memory, where wgmma
// takes it across. Each warpgroup then computes a piece of 64 rows and 64 channels of the block's part, over the keys
// of both, and leaves it to a warp beside the producer's, which has it added to memory. There a tile of rows is not
// lines of channels but pieces as the lanes hold them (dq_tile), contiguous, so that a piece is one copy; a second
// kernel converts them. Tiles belong to one sequence: what is added for rows beyond its last one is no one else's.
//
// ds has a buffer a stage, and the warpgroups meet once a block of rows, with ds written: one that is ahead writes the
// other buffer, and this one again when they have met with their products of it done. A piece has one buffer and two
// barriers, as the stages of the ring have.
//
// Registers a thread: dk and dv kD / 2 each, s and dp kKeys / 2 each, p and ds half of that, the piece of dq 32 when s
// and dp are no more; shared memory kSharedBytes.
#pragma once

#include "cuda/attention_sm90_backward.cuh"

namespace fastattn {
namespace cuda {

// Where a block's parts of dq go: those of its first head's first rows, and how many floats further the next head's.
struct AttentionSm90SumsPlace {
  float* first;
  int64_t head_stride;
};

// The two pieces of a block's dq are the halves of 128 rows or of 128 channels.
template <int kHeadDim>
struct AttentionSm90SumsTile : AttentionSm90BackwardTile<kHeadDim, true, kHeadDim == 64 ? 128 : 64> {
  using Base = AttentionSm90BackwardTile<kHeadDim, true, kHeadDim == 64 ? 128 : 64>;
  static_assert(Base::kColumns * Base::kKeys == 128, "two pieces of 64 rows and 64 channels");
  static constexpr bool kSplitsRows = Base::kColumns == 1;
  // ds: 64 rows of all keys in lines of 128 bytes, a line a key.
  static constexpr int kRowsBox = Base::kLines * 128, kRowBoxes = Base::kKeys / 64;
  static constexpr int kPieceBytes = 64 * 64 * 4;
  static constexpr int kGradients = Base::kBarriers, kPieces = kGradients + Base::kStages * kRowBoxes * kRowsBox;
  static constexpr int kBarriers = kPieces + Base::kConsumers * kPieceBytes;
  static constexpr int kPlace = kBarriers + (1 + 2 * Base::kStages + 2 * Base::kConsumers) * 8;
  static constexpr int kWork = kPlace + static_cast<int>(sizeof(AttentionSm90SumsPlace));
  static constexpr int kSharedBytes = kWork + static_cast<int>(sizeof(AttentionSm90BackwardWork));
};

struct AttentionSm90SumsCall : AttentionSm90BackwardCall {
  float* dq_sums;  // tiling.tiles() of kKeys rows by kD channels, zeros at first
};

// The sums of the tile of rows from `first` of a sequence on: those of a warpgroup's piece, 16 bytes of each thread
// after the same of the thread before it; channels beyond kD are left out.
template <class Tile>
__device__ inline float* dq_tile(const AttentionSm90SumsCall& p, const AttentionTile& own, int head, int first) {
  const AttentionTiling& tiling = p.tiling;
  const int64_t group = tiling.q_packed ? head : own.batch * p.heads + head;
  const int64_t before = tiling.q_packed ? first_slot(tiling, own.batch, own.q_begin) : 0;
  return p.dq_sums + (group * tiling.blocks + before + first / Tile::kKeys) * (Tile::kKeys * Tile::kD);
}
template <class Tile>
struct AttentionSm90SumsMemory : AttentionSm90BackwardMemory<Tile> {
  using Base = AttentionSm90BackwardMemory<Tile>;
  static __device__ char* gradients(int stage) {
    return dynamic_shared() + Tile::kGradients + stage * Tile::kRowBoxes * Tile::kRowsBox;
  }
  static __device__ char* piece(int consumer) {
    return dynamic_shared() + Tile::kPieces + consumer * Tile::kPieceBytes;
  }
  static __device__ uint64_t* piece_full(int consumer) { return Base::barrier(1 + 2 * Tile::kStages + consumer); }
  static __device__ uint64_t* piece_empty(int consumer) { return piece_full(Tile::kConsumers + consumer); }

  static __device__ AttentionSm90SumsPlace& place() {
    return *reinterpret_cast<AttentionSm90SumsPlace*>(dynamic_shared() + Tile::kPlace);
  }

  static __device__ void init(const AttentionSm90SumsCall& p) {
    for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
      mbarrier_init(piece_full(consumer), 4), mbarrier_init(piece_empty(consumer), 1);
    }
    Base::init(p);
    const AttentionSm90BackwardWork& own = Base::work();
    const int first = own.blocks.begin * Tile::kKeys;
    place() = {dq_tile<Tile>(p, own.tile, own.passing_head, first), p.tiling.blocks * (Tile::kKeys * Tile::kD)};
  }
};

// Of a piece, 16 bytes of each thread hold one of these groups of 8 channels.
template <class Tile>
__device__ inline int groups_of_piece(int piece) {
  return Tile::kSplitsRows || Tile::kD - 64 * piece >= 64 ? 8 : (Tile::kD - 64 * piece) / 8;
}

// One thread: the pieces of a warpgroup are added to their rows' sums.
template <class Tile>
__device__ inline void attention_sm90_add_pieces(const AttentionSm90BackwardWork& work, int consumer) {
  using Memory = AttentionSm90SumsMemory<Tile>;
  RingPlace<1> place;
  float* first = Memory::place().first + consumer * (Tile::kPieceBytes / 4);
#pragma unroll 1
  for (int head = 0; head < work.heads; ++head, first += Memory::place().head_stride) {
    float* rows = first;
#pragma unroll 1
    for (int block = work.blocks.begin; block < work.blocks.end; ++block, rows += Tile::kKeys * Tile::kD) {
      mbarrier_wait(Memory::piece_full(consumer), place.phase);
      bulk_add(rows, Memory::piece(consumer), groups_of_piece<Tile>(consumer) * (128 * 16));
      bulk_commit();
      bulk_wait_read();
      mbarrier_arrive(Memory::piece_empty(consumer));
      place.next();
    }
  }
  bulk_wait();
}

template <class T, class Tile, class Scores>
struct AttentionSm90SumsConsumer : AttentionSm90BackwardConsumer<T, Tile, Scores> {
  using Base = AttentionSm90BackwardConsumer<T, Tile, Scores>;
  using Memory = AttentionSm90SumsMemory<Tile>;
  using Base::Base, Base::consumer, Base::work;

  // Keys that no row sees, whose ds are zeros, may hold anything: they become zeros.
  __device__ void zero_unseen_keys() const {
    const int thread = warpgroup_thread(), first = work.first + 64 * consumer;
#pragma unroll 1
    for (int i = thread / 8; i < 64; i += 16) {
      const KeyRange rows = work.template seen_by<Tile>(this->p, first + i);
      if (rows.begin < rows.end) continue;
#pragma unroll 1
      for (int column = 0; column < Tile::kColumns; ++column) {
        *reinterpret_cast<Packed<BFloat16>*>(Memory::owned(0, consumer) + column * Tile::kQueryBox + i * 128 +
                                             thread % 8 * 16) = {};
      }
    }
    fence_async_shared();
    named_barrier_sync(1 + consumer, 128);
  }

  // ds of the warpgroup's keys, as TMA's swizzle would have it.
  __device__ void put_gradients(const uint32_t (&ds)[Tile::kKeys / 4], int stage) const {
    const int thread = warpgroup_thread(), key = 64 * consumer + thread / 32 * 16 + thread % 32 / 4;
    const int at = stage * Tile::kRowBoxes * Tile::kRowsBox + key * 128 + key % 8 * 16 + thread % 4 * 4;
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 4; ++i) {
      const int group = i / 2;  // of 8 rows
      *reinterpret_cast<uint32_t*>(Memory::gradients(0) + group / 8 * Tile::kRowsBox + i % 2 * 1024 +
                                   (at ^ group % 8 * 16)) = ds[i];
    }
  }

  // The warpgroup's piece of dq is under way.
  __device__ void start_piece(float (&dq)[32], int stage) const {
    const char* const rows = Memory::gradients(stage) + (Tile::kSplitsRows ? consumer * Tile::kRowsBox : 0);
    const int column = (Tile::kSplitsRows ? 0 : consumer) * Tile::kQueryBox;
#pragma unroll
    for (int i = 0; i < 32; ++i) dq[i] = 0;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::kLines / 16; ++step) {
      wgmma<T, true, true>(dq, wgmma_descriptor(rows + step * 2048, 16, 1024),
                           wgmma_descriptor(Memory::owned(0, step / 4) + column + step % 4 * 2048, 16, 1024));
    }
    wgmma_commit();
  }

  // Leaves the piece to the warp that has it added.
  __device__ void put_piece(const float (&dq)[32], int stage) const {
    static_assert(Tile::kStages == 2, "the phase of a single buffer is the stage");
    mbarrier_wait(Memory::piece_empty(consumer), stage ^ 1);
    char* const own = Memory::piece(consumer) + warpgroup_thread() * 16;
#pragma unroll
    for (int group = 0; group < 8; ++group) {
      Packed<float> four;
#pragma unroll
      for (int e = 0; e < 4; ++e) four.value[e] = dq[4 * group + e];
      if (group < groups_of_piece<Tile>(consumer)) *reinterpret_cast<Packed<float>*>(own + group * (128 * 16)) = four;
    }
    fence_async_shared();
    __syncwarp();
    if (warpgroup_thread() % 32 == 0) mbarrier_arrive(Memory::piece_full(consumer));
  }

  // dk but for the scale, and dv.
  __device__ void attend(float (&dk)[Tile::kD / 2], float (&dv)[Tile::kD / 2]) const {
    mbarrier_wait(Memory::ready(), 0);
    zero_unseen_keys();
    // What can be told from the turn is: there is no register for it.
    int block = work.blocks.begin, head = work.passing_head;
#pragma unroll 1
    for (int turn = 0; turn < work.heads * (work.blocks.end - work.blocks.begin); ++turn) {
      const RingPlace<Tile::kStages> place{turn % Tile::kStages, turn / Tile::kStages % 2};
      float s[Tile::kKeys / 2], dp[Tile::kKeys / 2], dq[32];
      uint32_t weights[Tile::kKeys / 4], ds[Tile::kKeys / 4];
      mbarrier_wait(Memory::full(place.stage), place.phase);
      this->zero_unseen(block * Tile::kKeys, place.stage);
      attention_sm90_scores<T, Tile>(s, Memory::owned(0, consumer), Memory::passing(0, place.stage));
      attention_sm90_scores<T, Tile>(dp, Memory::owned(1, consumer), Memory::passing(1, place.stage));
      wgmma_wait<Scores::kGeneral ? 0 : 1>();
      wgmma_fence_sums(s);
      if constexpr (Scores::kGeneral) {
        float distances[2];  // the slopes' gradient is the other form's
        wgmma_fence_sums(dp);
        this->weigh_general(head, place.stage, block * Tile::kKeys, s, dp, distances);
      } else {
        this->weigh(place.stage, block * Tile::kKeys, s);
      }
      // With 128 rows there are no registers for the weights beside s and dp.
      constexpr bool kValuesFirst = Tile::kKeys == 64 && !Scores::kGeneral;
      const auto start_values = [&] {
        this->pack(s, weights);
        attention_sm90_values<T, Tile>(dv, weights, Memory::passing(1, place.stage));
      };
      if constexpr (kValuesFirst) start_values();
      if constexpr (!Scores::kGeneral) {
        wgmma_wait<kValuesFirst>();
        wgmma_fence_sums(dp);
        this->differentiate(place.stage, s, dp);
      }
      if constexpr (!kValuesFirst) start_values();
      this->pack(dp, ds);
      put_gradients(ds, place.stage);
      fence_async_shared();
      named_barrier_sync(kAllBarrier, 128 * Tile::kConsumers);
      start_piece(dq, place.stage);
      attention_sm90_values<T, Tile>(dk, ds, Memory::passing(0, place.stage));
      wgmma_wait<1>();
      wgmma_fence_sums(dq);
      put_piece(dq, place.stage);
      wgmma_wait<0>();
      wgmma_fence_sums(dk);
      wgmma_fence_sums(dv);
      if (warpgroup_thread() % 32 == 0) mbarrier_arrive(Memory::empty(place.stage));
      if (++block == work.blocks.end) block = work.blocks.begin, ++head;
    }
  }
  static constexpr int kAllBarrier = 1 + Tile::kConsumers;  // before it one of each warpgroup
};

template <class T, class Tile, class Scores>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_sums_kernel(const __grid_constant__ AttentionSm90SumsCall p,
                               const __grid_constant__ AttentionSm90BackwardMaps maps) {
  note_dynamic_shared<Tile::kSharedBytes>();
  if (threadIdx.x == 0) AttentionSm90SumsMemory<Tile>::init(p);
  __syncthreads();
  const AttentionSm90BackwardWork& work = AttentionSm90SumsMemory<Tile>::work();
  if (work.first >= work.lines) return;
  if (threadIdx.x < 128) {
    set_max_registers_down<Tile::kProducerRegisters>();
    if (work.blocks.begin >= work.blocks.end) return;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x == 0) attention_sm90_backward_produce<Tile>(p, maps, work);
    if (warp == 1) attention_sm90_produce_row_sums<Tile>(p, work);
    if (warp >= 2 && threadIdx.x % 32 == 0) attention_sm90_add_pieces<Tile>(work, warp - 2);
    return;
  }
  set_max_registers_up<Tile::kConsumerRegisters>();
  const AttentionSm90SumsConsumer<T, Tile, Scores> own(p, work, consumer_of_warp());
  float dk[Tile::kD / 2], dv[Tile::kD / 2];
#pragma unroll
  for (int i = 0; i < Tile::kD / 2; ++i) dk[i] = dv[i] = 0;
  if (work.blocks.begin < work.blocks.end) own.attend(dk, dv);
  own.store(dk, static_cast<float>(p.scale), p.dk, p.head_dim);
  own.store(dv, Scores::kGeneral ? static_cast<float>(p.dropout_scale) : 1.0f, p.dv, p.head_dim_v);
}

// dq of a tile of rows from its sums, a piece to a warpgroup.
template <class T, class Tile>
__global__ void __launch_bounds__(128 * Tile::kConsumers)
    attention_sm90_convert_kernel(const __grid_constant__ AttentionSm90SumsCall p) {
  const AttentionTile own = attention_tile(p, p.tiling, blockIdx.x);
  if (!own.exists(1)) return;
  const int piece = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int groups = groups_of_piece<Tile>(piece), channel = Tile::kSplitsRows ? 0 : 64 * piece;
  const int row = own.first_line + (Tile::kSplitsRows ? 64 * piece : 0) + thread / 32 * 16 + thread % 32 / 4;
  const float* const sums = dq_tile<Tile>(p, own, own.group, own.first_line) + piece * (Tile::kPieceBytes / 4);
  float dq[32];
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    Packed<float> four = {};
    if (group < groups) four = *reinterpret_cast<const Packed<float>*>(sums + (group * 128 + thread) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[4 * group + e] = four.value[e];
  }
  const int64_t before = own.batch * p.row_stride[0] + own.group * p.row_stride[1] + own.q_begin;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* const out = static_cast<T*>(p.dq) + (before + row + 8 * i) * p.head_dim + channel;
    store_line(dq, i, static_cast<float>(p.scale), row + 8 * i < own.rows, out, static_cast<int>(p.head_dim) - channel,
               p.aligned);
  }
}

// f(tile, scores) of the call's channels and scores. What is not common has fewer instantiations: 96 channels are
// padded to 128.
template <class F>
inline auto with_attention_sm90_sums_tile(const AttentionBackwardParams& p, const F& f) {
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  const bool plain = PlainScores::takes(p);
  if (channels <= 64 && plain) return f(AttentionSm90SumsTile<64>(), PlainScores());
  if (channels <= 96 && plain) return f(AttentionSm90SumsTile<96>(), PlainScores());
  if (plain) return f(AttentionSm90SumsTile<128>(), PlainScores());
  if (channels <= 64) return f(AttentionSm90SumsTile<64>(), GeneralScores());
  return f(AttentionSm90SumsTile<128>(), GeneralScores());
}

// Of calls that attention_sm90_backward_takes. The slopes' gradient is a sum over a row's keys, as dq is.
inline bool attention_sm90_backward_sums_takes(const AttentionBackwardParams& p) {
  return attention_sm90_backward_takes(p) && p.slope_rows == nullptr && std::max(p.head_dim, p.head_dim_v) <= 128;
}

// How many float32 zeros launch_attention_sm90_backward_sums takes.
inline int64_t attention_sm90_backward_sums(const AttentionBackwardParams& p) {
  return with_attention_sm90_sums_tile(p, [&](auto tile, auto) {
    using Tile = decltype(tile);
    return attention_tiling(p, Tile::kKeys, 1).tiles() * Tile::kKeys * Tile::kD;
  });
}

// dq, dk and dv from lse and delta.
template <class T, class MakeMap, class Launch>
void launch_attention_sm90_backward_sums(const AttentionBackwardParams& p, float* dq_sums, const MakeMap& make_map,
                                         const Launch& launch) {
  const AttentionSm90BackwardTensors x(p);
  const AttentionSm90BackwardMaps maps = {make_map(x.q), make_map(x.k), make_map(x.v), make_map(x.dout)};
  with_attention_sm90_sums_tile(p, [&](auto tile, auto scores) {
    using Tile = decltype(tile);
    AttentionSm90SumsCall call{x.call, dq_sums};
    call.tiling = attention_tiling(p, Tile::kKeys, 1), call.key_tiling = key_tiling(p, Tile::kLines);
    launch("attention_sm90_backward_sums", attention_sm90_sums_kernel<T, Tile, decltype(scores)>,
           LaunchConfig{call.key_tiling.tiles(), Tile::kThreads, Tile::kSharedBytes}, call, maps);
    launch("attention_sm90_convert", attention_sm90_convert_kernel<T, Tile>,
           LaunchConfig{call.tiling.tiles(), 128 * Tile::kConsumers}, call);
  });
}

}  // namespace cuda
}  // namespace fastattn
