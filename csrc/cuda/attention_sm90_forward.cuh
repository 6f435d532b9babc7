// softmax(score) v on TMA and wgmma (sm_90a). Contract: AttentionParams in cpu/params.h; the score in
// attention_score.cuh. Schedule: Shah et al., "FlashAttention-3", 2024.
//
// A block is persistent: it takes tiles b, b + gridDim, ... of attention_blocks.cuh's order. One thread of the first
// warpgroup brings, by TMA, the tile's queries and then blocks of keys and of values through rings of kStages buffers;
// each buffer has a barrier that its bytes complete and one on which the warps that read it arrive. While the others
// finish a tile it fetches the next one's keys.
//
// Each other warpgroup computes 64 lines. It starts s = q k(j)ᵀ and then acc += p v(j - 1), and takes the softmax of s
// while the latter runs; p stays in registers. Before it starts a pair of products it waits for its turn, which it then
// hands on: one's softmax runs under the other's products. Blocks of keys go from the last to the first, so that those
// which a causal mask cuts come first.
//
// Tiles in shared memory are columns of 64 channels, in rows of 128 bytes swizzled by TMA; channels that a head does
// not have are zeros, which TMA writes beyond a tensor's extents. The same zeros stand for keys beyond the last; keys
// and values of another sequence or outside the window may be anything: their scores are replaced, and where NaN could
// come in by 0 * NaN, in blocks that reach beyond what the tile sees, the values are overwritten by zeros.
//
// Registers a thread, of 64 Ki: sums kD / 2, scores kKeys / 2, weights kKeys / 4; shared memory: Tile::kSharedBytes.
#pragma once

#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// kD: channels, the larger of head_dim and head_dim_v at most.
template <int kHeadDim, bool kGeneral>
struct AttentionSm90Tile {
  static constexpr int kD = kHeadDim, kColumns = (kD + 63) / 64;  // of 64 channels
  static constexpr int kConsumers = kD == 64 && !kGeneral ? 3 : 2;
  static constexpr int kLines = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kKeys = kGeneral || kD > 192 ? 64 : kD > 128 ? 96 : 128;
  static constexpr int kStages = kD == 64 ? 4 : 2;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;

  static constexpr int kQueryBox = 64 * 128, kKeyBox = kKeys * 128;  // bytes of 64 lines, of a block's keys
  static constexpr int kQueryBytes = kConsumers * kColumns * kQueryBox, kKeyBytes = kColumns * kKeyBox;
  static constexpr int kKeyRing = kQueryBytes, kValueRing = kKeyRing + kStages * kKeyBytes;
  static constexpr int kBarriers = kValueRing + kStages * kKeyBytes;
  static constexpr int kSharedBytes = kBarriers + (2 + 4 * kStages) * 8;
};

struct AttentionSm90Maps {
  TensorMap q, k, v;
};

struct AttentionSm90Call : AttentionParams {
  AttentionTiling tiling;
  int64_t q_batches, k_batches;  // batch entries of the tensors: 1 where all share one
  bool out_aligned;              // 16-byte stores
};

// Where the tiles and barriers of a block lie. No object holds these addresses: they would cost registers.
template <class Tile>
struct AttentionSm90Memory {
  static __device__ char* queries(int consumer) {
    return dynamic_shared() + consumer * Tile::kColumns * Tile::kQueryBox;
  }
  static __device__ char* keys(int stage) { return dynamic_shared() + Tile::kKeyRing + stage * Tile::kKeyBytes; }
  static __device__ char* values(int stage) { return dynamic_shared() + Tile::kValueRing + stage * Tile::kKeyBytes; }
  static __device__ uint64_t* barrier(int index) {
    return reinterpret_cast<uint64_t*>(dynamic_shared() + Tile::kBarriers) + index;
  }
  static __device__ uint64_t* q_full() { return barrier(0); }
  static __device__ uint64_t* q_empty() { return barrier(1); }
  static __device__ uint64_t* k_full(int stage) { return barrier(2 + stage); }
  static __device__ uint64_t* k_empty(int stage) { return barrier(2 + Tile::kStages + stage); }
  static __device__ uint64_t* v_full(int stage) { return barrier(2 + 2 * Tile::kStages + stage); }
  static __device__ uint64_t* v_empty(int stage) { return barrier(2 + 3 * Tile::kStages + stage); }

  static __device__ void init() {
    constexpr int kReaders = 4 * Tile::kConsumers;  // one thread of each warp
    mbarrier_init(q_full(), 1), mbarrier_init(q_empty(), kReaders);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(k_full(stage), 1), mbarrier_init(k_empty(stage), kReaders);
      mbarrier_init(v_full(stage), 1), mbarrier_init(v_empty(stage), kReaders);
    }
    mbarrier_init_fence();
  }
};

// A place in a ring of kStages; one of a ring of one, the queries', counts tiles.
template <int kStages>
struct RingPlace {
  int stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// A tile and its keys.
struct AttentionSm90Work {
  AttentionTile tile;
  KeyRange seen, blocks;  // by any of its rows; empty if there are none

  template <class Tile>
  static __device__ AttentionSm90Work of(const AttentionSm90Call& p, int64_t index) {
    AttentionSm90Work work{attention_tile(p, p.tiling, index), {0, 0}, {0, 0}};
    const AttentionTile& tile = work.tile;
    if (!tile.exists(p.tiling.pack)) return work;
    const int last = (tile.first_line + Tile::kLines - 1) / p.tiling.pack;
    work.seen = keys_of_any(p, tile, tile.first_line / p.tiling.pack, last < tile.rows ? last : tile.rows - 1);
    work.blocks = blocks_of_keys<Tile::kKeys>(work.seen);
    return work;
  }
};

// One thread: everything that the tiles of this block read, in the order in which they need it.
template <class Tile>
__device__ inline void attention_sm90_produce(const AttentionSm90Call& p, const AttentionSm90Maps& maps) {
  using Memory = AttentionSm90Memory<Tile>;
  RingPlace<1> q_place;
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < p.tiling.tiles(); index += gridDim.x) {
    const AttentionSm90Work work = AttentionSm90Work::of<Tile>(p, index);
    if (work.blocks.begin >= work.blocks.end) continue;
    const AttentionTile& tile = work.tile;
    const int pack = p.tiling.pack, key_head = tile.group * pack / static_cast<int>(p.heads / p.heads_kv);
    const int q_batch = p.q_batches > 1 ? tile.batch : 0, k_batch = p.k_batches > 1 ? tile.batch : 0;
    mbarrier_wait(Memory::q_empty(), q_place.phase ^ 1);
    mbarrier_arrive_expect(Memory::q_full(), Tile::kQueryBytes);
    q_place.next();
#pragma unroll 1
    for (int box = 0; box < Tile::kConsumers * Tile::kColumns; ++box) {
      const int line = tile.first_line + box / Tile::kColumns * 64;
      tma_load_5d(Memory::queries(0) + box * Tile::kQueryBox, maps.q, Memory::q_full(), box % Tile::kColumns * 64, 0,
                  tile.q_begin + line / pack, tile.group, q_batch);
    }
#pragma unroll 1
    for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block, place.next()) {
      const int key = tile.k_begin + block * Tile::kKeys;
      const auto load = [&](char* to, const TensorMap& map, uint64_t* full, uint64_t* empty) {
        mbarrier_wait(empty, place.phase ^ 1);
        mbarrier_arrive_expect(full, Tile::kKeyBytes);
#pragma unroll 1
        for (int column = 0; column < Tile::kColumns; ++column) {
          tma_load_5d(to + column * Tile::kKeyBox, map, full, column * 64, 0, key, key_head, k_batch);
        }
      };
      const int stage = place.stage;
      load(Memory::keys(stage), maps.k, Memory::k_full(stage), Memory::k_empty(stage));
      load(Memory::values(stage), maps.v, Memory::v_full(stage), Memory::v_empty(stage));
    }
  }
}

// A computing warpgroup: s = q kᵀ is under way.
template <class T, class Tile>
__device__ inline void attention_sm90_scores(float (&s)[Tile::kKeys / 2], const char* q, const char* k) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Tile::kD / 16; ++step) {
    const int column = step / 4, byte = step % 4 * 32;
    wgmma_scores<T>(s, wgmma_descriptor(q + column * Tile::kQueryBox + byte, 16, 1024),
                    wgmma_descriptor(k + column * Tile::kKeyBox + byte, 16, 1024), step > 0);
  }
  wgmma_commit();
}

// acc += p v is under way, of as many channels as acc has.
template <class T, class Tile, int kSums>
__device__ inline void attention_sm90_values(float (&acc)[kSums], const uint32_t (&p)[Tile::kKeys / 4], const char* v) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 16; ++step) {
    const uint32_t a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
    wgmma_values<T>(acc, a, wgmma_descriptor(v + step * 2048, Tile::kKeyBox, 1024));
  }
  wgmma_commit();
}

// The lines of one computing warpgroup, through all blocks of keys of a tile.
template <class T, class Tile, class Scores>
struct AttentionSm90Consumer {
  using Memory = AttentionSm90Memory<Tile>;
  const AttentionSm90Call& p;
  const AttentionSm90Work& work;
  int consumer;
  KeyRange all, seen[2];  // keys that every line of the warpgroup sees, and that each of the lane's does
  int zero_from;          // values of keys from here on are not the tile's and not TMA's zeros

  __device__ AttentionSm90Consumer(const AttentionSm90Call& call, const AttentionSm90Work& own, int number)
      : p(call), work(own), consumer(number) {
    const AttentionTile& tile = work.tile;
    const int first = tile.first_line + 64 * consumer, last = (first + 63) / p.tiling.pack;
    all = keys_of_all(p, tile, first / p.tiling.pack, last < tile.rows ? last : tile.rows - 1);
    zero_from = tile.k_begin + work.seen.end < p.keys ? work.seen.end : INT32_MAX;
#pragma unroll
    for (int i = 0; i < 2; ++i) seen[i] = keys_of_row(p, tile, line(i).row);
  }

  __device__ ScoreLine line(int i) const {
    const int thread = static_cast<int>(threadIdx.x) % 128, pack = p.tiling.pack;
    const int at = work.tile.first_line + 64 * consumer + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
    return {at / pack, work.tile.group * pack + at % pack};
  }
  static __device__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }

  // s = q.k of block `block` in, weights and their effect on what came before out.
  __device__ void weigh(int block, float (&s)[Tile::kKeys / 2], SoftmaxState& state, float (&factor)[2]) const {
    const int first_key = block * Tile::kKeys;
    if constexpr (Scores::kGeneral) finish_scores(p, work.tile, {line(0), line(1)}, seen, first_key, s);
    if (first_key < all.begin || first_key + Tile::kKeys > all.end) hide_unseen(s, seen, first_key);
    state.step(s, Scores::unit(p), factor);
    if constexpr (Scores::kGeneral) {
      if (p.dropout.threshold != 0) drop(p, work.tile.batch, {line(0), line(1)}, first_key, s);
    }
  }

  static __device__ void pack(const float (&s)[Tile::kKeys / 2], uint32_t (&weights)[Tile::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 4; ++i) weights[i] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
  }

  // Values of keys that no row of the tile sees become zeros; all warpgroups write the same ones.
  __device__ void zero_unseen(int block, char* v) const {
    const int first_key = block * Tile::kKeys, thread = static_cast<int>(threadIdx.x) % 128;
    if (first_key >= work.seen.begin && first_key + Tile::kKeys <= zero_from) return;
#pragma unroll 1
    for (int i = thread / 8; i < Tile::kKeys; i += 16) {
      if (first_key + i >= work.seen.begin && first_key + i < zero_from) continue;
#pragma unroll 1
      for (int column = 0; column < Tile::kColumns; ++column) {
        *reinterpret_cast<Packed<BFloat16>*>(v + column * Tile::kKeyBox + i * 128 + thread % 8 * 16) = {};
      }
    }
    fence_async_shared();
    named_barrier_sync(1 + Tile::kConsumers + consumer, 128);
  }

  // A turn to start products passes from one warpgroup to the next; the first is the first one's.
  __device__ void take_turn() const { named_barrier_sync(1 + consumer, 256); }
  __device__ void hand_on() const { named_barrier_arrive(consumer == Tile::kConsumers - 1 ? 1 : 2 + consumer, 256); }

  // acc and the state over all blocks; `place` is where the first of them is in the rings.
  __device__ void attend(RingPlace<Tile::kStages>& place, int q_phase, float (&acc)[Tile::kD / 2],
                         SoftmaxState& state) const {
    float s[Tile::kKeys / 2], factor[2];
    uint32_t weights[Tile::kKeys / 4];
    mbarrier_wait(Memory::q_full(), q_phase);
    mbarrier_wait(Memory::k_full(place.stage), place.phase);
    attention_sm90_scores<T, Tile>(s, Memory::queries(consumer), Memory::keys(place.stage));
    wgmma_wait<0>();
    wgmma_fence_sums(s);
    release(Memory::k_empty(place.stage));
    int block = work.blocks.end - 1;
    weigh(block, s, state, factor);
    pack(s, weights);
#pragma unroll 1
    for (--block; block >= work.blocks.begin; --block) {
      const RingPlace<Tile::kStages> before = place;
      place.next();
      mbarrier_wait(Memory::k_full(place.stage), place.phase);
      mbarrier_wait(Memory::v_full(before.stage), before.phase);
      zero_unseen(block + 1, Memory::values(before.stage));
      take_turn();
      attention_sm90_scores<T, Tile>(s, Memory::queries(consumer), Memory::keys(place.stage));
      attention_sm90_values<T, Tile>(acc, weights, Memory::values(before.stage));
      hand_on();
      wgmma_wait<1>();
      wgmma_fence_sums(s);
      weigh(block, s, state, factor);
      // Not before the sums are there, which are never negative: ptxas moves a wait up to the last access to memory
      // before it, and the softmax would no longer run under the product of the values.
      if (!(state.l[0] + state.l[1] < 0)) release(Memory::k_empty(place.stage));
      wgmma_wait<0>();
      wgmma_fence_sums(acc);
      release(Memory::v_empty(before.stage));
      scale_lines(acc, factor);
      pack(s, weights);
    }
    release(Memory::q_empty());
    mbarrier_wait(Memory::v_full(place.stage), place.phase);
    zero_unseen(work.blocks.begin, Memory::values(place.stage));
    attention_sm90_values<T, Tile>(acc, weights, Memory::values(place.stage));
    wgmma_wait<0>();
    wgmma_fence_sums(acc);
    release(Memory::v_empty(place.stage));
    place.next();
  }

  __device__ void store(const float (&acc)[Tile::kD / 2], SoftmaxState& state) const {
    const float* sink[2] = {nullptr, nullptr};
    float factor[2], lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.sinks != nullptr) sink[i] = static_cast<const float*>(p.sinks) + line(i).head;
    }
    state.finish(Scores::unit(p), sink, factor, lse);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Scores::kGeneral) factor[i] *= static_cast<float>(p.dropout_scale);
      const ScoreLine at = line(i);
      const int64_t row = work.tile.q_begin + at.row, batch = work.tile.batch;
      const bool inside = at.row < work.tile.rows;
      T* const out =
          static_cast<T*>(p.out) + batch * p.out_stride[0] + at.head * p.out_stride[1] + row * p.out_stride[2];
      store_line(acc, i, factor[i], inside, out, static_cast<int>(p.head_dim_v), p.out_aligned);
      if (p.lse != nullptr && inside && threadIdx.x % 4 == 0) {
        static_cast<float*>(p.lse)[batch * p.row_stride[0] + at.head * p.row_stride[1] + row] = lse[i];
      }
    }
  }
};

template <class T, class Tile, class Scores>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_forward_kernel(const __grid_constant__ AttentionSm90Call p,
                                  const __grid_constant__ AttentionSm90Maps maps) {
  note_dynamic_shared<Tile::kSharedBytes>();
  if (threadIdx.x == 0) AttentionSm90Memory<Tile>::init();
  __syncthreads();
  if (threadIdx.x < 128) {
    set_max_registers_down<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) attention_sm90_produce<Tile>(p, maps);
    return;
  }
  set_max_registers_up<Tile::kConsumerRegisters>();
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  using Consumer = AttentionSm90Consumer<T, Tile, Scores>;
  // The last one hands the first turn on.
  if (consumer == Tile::kConsumers - 1) named_barrier_arrive(1, 256);
  RingPlace<Tile::kStages> place;
  RingPlace<1> q_place;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < p.tiling.tiles(); index += gridDim.x) {
    const AttentionSm90Work work = AttentionSm90Work::of<Tile>(p, index);
    if (!work.tile.exists(p.tiling.pack)) continue;
    const Consumer own(p, work, consumer);
    float acc[Tile::kD / 2];
#pragma unroll
    for (int i = 0; i < Tile::kD / 2; ++i) acc[i] = 0;
    SoftmaxState state;
    if (work.blocks.begin < work.blocks.end) {
      own.attend(place, q_place.phase, acc, state);
      q_place.next();
    }
    own.store(acc, state);
  }
  // Nobody takes the turn that the last one handed on after the last pair: no arrival is left when the block ends.
  if (consumer == 0) named_barrier_sync(1, 256);
}

// q, k or v for TMA: (channels, heads together, rows, groups of heads, batch).
using AttentionSm90Tensor = TensorBoxes<5>;

inline AttentionSm90Tensor attention_sm90_tensor(const void* data, const int64_t (&stride)[3], int64_t channels,
                                                 int64_t rows, int64_t heads, int64_t batches, int pack,
                                                 int box_lines) {
  return {data,
          {channels, pack, rows, heads / pack, batches},
          {1, stride[1], stride[2], stride[1] * pack, stride[0]},
          {64, pack, box_lines / pack, 1, 1}};
}

// Whether TMA can read it: addresses and strides in multiples of 16 bytes, extents within its coordinates.
inline bool attention_sm90_readable(const AttentionSm90Tensor& x) {
  bool takes = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 5; ++i) takes &= x.extents[i] > 0 && x.extents[i] < (int64_t{1} << 31) - 512;
  for (int i = 1; i < 5; ++i) {
    takes &= x.extents[i] == 1 || (x.strides[i] > 0 && x.strides[i] % 8 == 0 && x.strides[i] < (int64_t{1} << 39));
  }
  return takes;
}

// Heads of a tile: all that share keys, where their rows are too few for a tile and the box of 64 lines holds whole
// ones.
inline int attention_sm90_pack(const AttentionParams& p, int tile_lines) {
  const int64_t sharing = p.heads / p.heads_kv;
  return p.rows < tile_lines && sharing > 1 && 64 % sharing == 0 ? static_cast<int>(sharing) : 1;
}

template <class Tile>
struct AttentionSm90Tensors {
  AttentionSm90Call call;
  AttentionSm90Tensor q, k, v;

  explicit AttentionSm90Tensors(const AttentionParams& p) {
    static_cast<AttentionParams&>(call) = p;
    const int pack = attention_sm90_pack(p, Tile::kLines);
    call.tiling = attention_tiling(p, Tile::kLines, pack, fewest_rows_of_tiles(p));
    call.q_batches = p.q_stride[0] == 0 ? 1 : p.batch;
    call.k_batches = p.k_stride[0] == 0 && p.v_stride[0] == 0 ? 1 : p.batch;
    call.out_aligned = p.head_dim_v % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    for (const int64_t stride : p.out_stride) call.out_aligned &= stride % 8 == 0;
    q = attention_sm90_tensor(p.q, p.q_stride, p.head_dim, p.rows, p.heads, call.q_batches, pack, 64);
    k = attention_sm90_tensor(p.k, p.k_stride, p.head_dim, p.keys, p.heads_kv, call.k_batches, 1, Tile::kKeys);
    v = attention_sm90_tensor(p.v, p.v_stride, p.head_dim_v, p.keys, p.heads_kv, call.k_batches, 1, Tile::kKeys);
  }
  bool readable() const {
    return attention_sm90_readable(q) && attention_sm90_readable(k) && attention_sm90_readable(v);
  }
};

// f(tile) of the call's channels and scores.
template <class F>
inline void with_attention_sm90_tile(const AttentionParams& p, const F& f) {
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  const auto choose = [&](auto general) {
    constexpr bool kGeneral = decltype(general)::kGeneral;
    if (channels <= 64) return f(AttentionSm90Tile<64, kGeneral>(), general);
    if (channels <= 96) return f(AttentionSm90Tile<96, kGeneral>(), general);
    if (channels <= 128) return f(AttentionSm90Tile<128, kGeneral>(), general);
    if (channels <= 192) return f(AttentionSm90Tile<192, kGeneral>(), general);
    return f(AttentionSm90Tile<256, kGeneral>(), general);
  };
  PlainScores::takes(p) ? choose(PlainScores()) : choose(GeneralScores());
}

// 16-bit tensors of up to 256 channels that TMA can read, with something in them and without pages.
inline bool attention_sm90_takes(const AttentionParams& p) {
  bool takes = (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.block_table == nullptr &&
               std::max(p.head_dim, p.head_dim_v) <= 256 && std::min({p.batch, p.heads, p.rows, p.keys}) > 0;
  if (!takes) return false;
  with_attention_sm90_tile(p, [&](auto tile, auto) { takes = AttentionSm90Tensors<decltype(tile)>(p).readable(); });
  return takes;
}

// What attention_sm90_takes, on as many blocks as the device runs at a time. make_map(tensor) gives its TensorMap.
template <class T, class MakeMap, class Launch>
void launch_attention_sm90_forward(const AttentionParams& p, int multiprocessors, const MakeMap& make_map,
                                   const Launch& launch) {
  with_attention_sm90_tile(p, [&](auto tile, auto scores) {
    using Tile = decltype(tile);
    const AttentionSm90Tensors<Tile> tensors(p);
    const AttentionSm90Maps maps = {make_map(tensors.q), make_map(tensors.k), make_map(tensors.v)};
    const LaunchConfig config = {std::min<int64_t>(tensors.call.tiling.tiles(), multiprocessors), Tile::kThreads,
                                 Tile::kSharedBytes};
    launch("attention_sm90_forward", attention_sm90_forward_kernel<T, Tile, decltype(scores)>, config, tensors.call,
           maps);
  });
}

}  // namespace cuda
}  // namespace fastattn
