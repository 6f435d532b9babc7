// Attention forward on mma.sync (Dao, "FlashAttention-2", 2023, §3): contract in cpu/params.h (AttentionParams), tiles
// and fragments in attention_sm80.cuh.
//
// A block has the rows of one tile in shared memory and walks the key blocks that any of them sees. A warp has 16 or 32
// lines of it, their running softmax and the sums of values in registers; keys and values alternate in a ring of
// kSlots tiles, one being read while kSlots - 1 are under way. Blocks that all rows see take no mask arithmetic.
//
//   channels   lines    keys     slots  shared memory
//   64         128/64   64           4   48/40 KiB
//   96         128/64   32/64        4/3   48/48
//   128        128/64   32/64        4/3   64/64      two blocks fit the 164 KiB of sm_80, one the 100 KiB of sm_86
//   192        128      32           2   72
//   256        128      32           2   96
//
// (the second number of lines: with softcap, ALiBi, masks or dropout, whose registers leave room for 16 lines a warp)
#pragma once

#include "cuda/attention_sm80.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Plain scores of keys that lie in pages; the general ones look where they do.
struct PagedScores : PlainScores {};

struct AttentionSm80Call : AttentionParams {
  AttentionTiling tiling;
  bool q_aligned, k_aligned, v_aligned, out_aligned;
};

template <int kD, bool kGeneral>
struct ForwardSm80 {
  static constexpr int kSlices = kD <= 128 && !kGeneral ? 2 : 1;
  static constexpr int kWarps = kD <= 128 ? 4 : 8, kThreads = 32 * kWarps, kLines = 16 * kSlices * kWarps;
  static constexpr int kKeys = kD <= (kGeneral ? 128 : 64) ? 64 : 32;
  static constexpr int kSlots = kD > 128 ? 2 : kD * kKeys > 64 * 64 ? 3 : 4;
  static constexpr int kSlotBytes = kKeys * kD * 2, kQueryBytes = kLines * kD * 2;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes + 4 * kWarps;
};

template <class T, int kD, class Scores>
struct ForwardSm80Block {
  using Shape = ForwardSm80<kD, Scores::kGeneral>;
  static constexpr int kSlices = Shape::kSlices, kKeys = Shape::kKeys, kSlots = Shape::kSlots;
  static constexpr bool kPages = !std::is_same_v<Scores, PlainScores>;

  const AttentionSm80Call& p;
  const AttentionTile& tile;
  char* shared;
  KeyRange seen[kSlices][2];  // by the lines of the lane; by those beyond the last row nothing
  SoftmaxState softmax[kSlices];
  float acc[kSlices][kD / 2];

  __device__ ForwardSm80Block(const AttentionSm80Call& call, const AttentionTile& own_tile, char* memory)
      : p(call), tile(own_tile), shared(memory) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = line(slice, half).row;
        seen[slice][half] = row < tile.rows ? keys_of_row(p, tile, row) : KeyRange{0, 0};
      }
#pragma unroll
      for (float& x : acc[slice]) x = 0;
    }
  }

  // First of the warp's lines in the tile.
  static __device__ int warp_line() { return static_cast<int>(threadIdx.x) / 32 * 16 * kSlices; }

  __device__ ScoreLine at(int tile_line) const {
    const int line = tile.first_line + tile_line, pack = p.tiling.pack;
    return {line / pack, tile.group * pack + line % pack};
  }
  __device__ ScoreLine line(int slice, int half) const {
    return at(warp_line() + 16 * slice + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half);
  }

  __device__ void load_queries() const {
    const T* q = static_cast<const T*>(p.q) + tile.batch * p.q_stride[0] + tile.q_begin * p.q_stride[2];
    const auto row = [&](int r) -> const T* {
      const ScoreLine line = at(r);
      return line.row < tile.rows ? q + line.head * p.q_stride[1] + line.row * p.q_stride[2] : nullptr;
    };
    Tile<T, Shape::kLines, kD>::template load<Shape::kThreads>(shared, q, row, p.head_dim, p.q_aligned);
  }

  __device__ char* slot(int index) const { return shared + Shape::kQueryBytes + index * Shape::kSlotBytes; }

  // Where key `key` of the tile's sequence lies in a head of the pages.
  __device__ int64_t in_pages(int key, const int64_t* stride) const {
    const int size = static_cast<int>(p.page_size);
    const int64_t page = p.block_table[tile.batch * p.max_pages + key / size];
    return page * stride[0] + key % size * stride[2];
  }

  // Keys (item even) or values of key block item / 2.
  __device__ void load_item(int item, int into, int end) const {
    if (item < 2 * end) {
      const bool value = item % 2 != 0;
      const int head = tile.group * p.tiling.pack / static_cast<int>(p.heads / p.heads_kv);
      const int64_t* stride = value ? p.v_stride : p.k_stride;
      const T* x = static_cast<const T*>(value ? p.v : p.k) + head * stride[1];
      const bool paged = kPages && p.block_table != nullptr;
      if (!paged) x += tile.batch * stride[0] + tile.k_begin * stride[2];
      const int first = item / 2 * kKeys;
      const auto row = [&](int r) -> const T* {
        const int key = first + r;
        if (key >= tile.keys) return nullptr;
        return paged ? x + in_pages(key, stride) : x + key * stride[2];
      };
      Tile<T, kKeys, kD>::template load<Shape::kThreads>(slot(into), x, row, value ? p.head_dim_v : p.head_dim,
                                                         value ? p.v_aligned : p.k_aligned);
    }
    cp_async_commit();
  }

  // Scores of a key block become weights.
  __device__ void weigh(float (&s)[kSlices][kKeys / 2], int first_key, bool edge) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if constexpr (Scores::kGeneral) {
        finish_scores(p, tile, {line(slice, 0), line(slice, 1)}, seen[slice], first_key, s[slice]);
      }
      if (edge) hide_unseen(s[slice], seen[slice], first_key);
      float factor[2];
      softmax[slice].step(s[slice], Scores::unit(p), factor);
      scale_lines(acc[slice], factor);
      if constexpr (Scores::kGeneral) {
        if (p.dropout.threshold != 0) drop(p, tile.batch, {line(slice, 0), line(slice, 1)}, first_key, s[slice]);
      }
    }
  }

  __device__ void add_values(const float (&s)[kSlices][kKeys / 2], char* values, bool edge) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(slot(kSlots));
    RowBits broken = 0;
    if (edge || Scores::kGeneral) broken = clear_broken<T, kKeys, kD, Shape::kThreads>(values, words);
    multiply_columns<T, kD, kKeys, kSlices>(s, values, acc);
    if (broken == 0) return;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) poison_lines<kKeys>(s[slice], broken, acc[slice]);
  }

  __device__ void store() {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const ScoreLine lines[2] = {line(slice, 0), line(slice, 1)};
      const float* sinks = static_cast<const float*>(p.sinks);
      const float* sink[2] = {sinks == nullptr ? nullptr : sinks + lines[0].head,
                              sinks == nullptr ? nullptr : sinks + lines[1].head};
      float factor[2], lse[2];
      softmax[slice].finish(Scores::unit(p), sink, factor, lse);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = lines[half].row < tile.rows;
        const int64_t row = tile.q_begin + lines[half].row, head = lines[half].head;
        if (p.lse != nullptr && inside && threadIdx.x % 4 == 0) {
          static_cast<float*>(p.lse)[tile.batch * p.row_stride[0] + head * p.row_stride[1] + row] = lse[half];
        }
        T* out = static_cast<T*>(p.out) + tile.batch * p.out_stride[0] + head * p.out_stride[1] + row * p.out_stride[2];
        const float kept = factor[half] * (p.dropout.threshold != 0 ? static_cast<float>(p.dropout_scale) : 1.0f);
        store_line<T>(acc[slice], half, kept, inside, out, static_cast<int>(p.head_dim_v), p.out_aligned);
      }
    }
  }
};

template <class T, int kD, class Scores>
__global__ void __launch_bounds__(ForwardSm80<kD, Scores::kGeneral>::kThreads)
    attention_sm80_forward_kernel(const __grid_constant__ AttentionSm80Call p) {
  using Shape = ForwardSm80<kD, Scores::kGeneral>;
  constexpr int kKeys = Shape::kKeys, kSlots = Shape::kSlots;
  const AttentionTile tile = attention_tile(p, p.tiling, blockIdx.x);
  const int pack = p.tiling.pack;
  note_dynamic_shared<Shape::kSharedBytes>();
  if (!tile.exists(pack)) return;
  char* const shared = dynamic_shared();
  const int first_row = tile.first_line / pack, past_row = (tile.first_line + Shape::kLines - 1) / pack;
  const int last_row = past_row < tile.rows ? past_row : tile.rows - 1;
  const KeyRange seen_by_all = keys_of_all(p, tile, first_row, last_row);
  const KeyRange blocks = blocks_of_keys<kKeys>(keys_of_any(p, tile, first_row, last_row));

  ForwardSm80Block<T, kD, Scores> block(p, tile, shared);
  block.load_queries();
  int ahead = 2 * blocks.begin, at = 0;
  for (int slot = 0; slot < kSlots - 1; ++slot) block.load_item(ahead++, slot, blocks.end);
  const auto next_item = [&] {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    block.load_item(ahead++, at == 0 ? kSlots - 1 : at - 1, blocks.end);
    char* const arrived = block.slot(at);
    at = at == kSlots - 1 ? 0 : at + 1;
    return arrived;
  };
#pragma unroll 1
  for (int b = blocks.begin; b < blocks.end; ++b) {
    const bool edge = b * kKeys < seen_by_all.begin || (b + 1) * kKeys > seen_by_all.end;
    float s[Shape::kSlices][kKeys / 2] = {};
    const char* const keys = next_item();
    multiply_rows<T, kD, Shape::kLines, kKeys, Shape::kSlices>(shared, block.warp_line(), keys, s);
    block.weigh(s, b * kKeys, edge);
    block.add_values(s, next_item(), edge);
  }
  cp_async_wait<0>();
  block.store();
}

// The rows of few queries of all heads that share a key head lie in one tile.
template <int kLines>
inline int lines_together(const AttentionParams& p) {
  const int64_t group = p.heads / p.heads_kv;
  return p.rows < kLines && group > 1 && group <= kLines ? static_cast<int>(group) : 1;
}

template <class T, int kD, class Scores, class Launch>
void launch_attention_sm80_forward(const AttentionParams& params, const Launch& launch) {
  using Shape = ForwardSm80<kD, Scores::kGeneral>;
  AttentionSm80Call p{};
  static_cast<AttentionParams&>(p) = params;
  p.tiling = attention_tiling(p, Shape::kLines, lines_together<Shape::kLines>(p), fewest_rows_of_tiles(p));
  p.q_aligned = rows_aligned(p.q, p.q_stride, 3), p.k_aligned = rows_aligned(p.k, p.k_stride, 3);
  p.v_aligned = rows_aligned(p.v, p.v_stride, 3);
  p.out_aligned = rows_aligned(p.out, p.out_stride, 3) && p.head_dim_v % 8 == 0;
  launch("attention_sm80_forward", attention_sm80_forward_kernel<T, kD, Scores>,
         LaunchConfig{p.tiling.tiles(), Shape::kThreads, Shape::kSharedBytes}, p);
}

template <class T, int kD, class Launch>
void launch_attention_sm80_forward(const AttentionParams& p, const Launch& launch) {
  if (!PlainScores::takes(p)) return launch_attention_sm80_forward<T, kD, GeneralScores>(p, launch);
  if (p.block_table != nullptr) return launch_attention_sm80_forward<T, kD, PagedScores>(p, launch);
  launch_attention_sm80_forward<T, kD, PlainScores>(p, launch);
}

// float16 or bfloat16, up to 256 channels; rows that are no sequence's are left as they are.
template <class T, class Launch>
void launch_attention_sm80_forward(const AttentionParams& p, const Launch& launch) {
  if (p.batch == 0 || p.heads == 0 || p.rows == 0) return;
  const int64_t channels = std::max(p.head_dim, p.head_dim_v);
  if (channels <= 64) return launch_attention_sm80_forward<T, 64>(p, launch);
  if (channels <= 96) return launch_attention_sm80_forward<T, 96>(p, launch);
  if (channels <= 128) return launch_attention_sm80_forward<T, 128>(p, launch);
  if (channels <= 192) return launch_attention_sm80_forward<T, 192>(p, launch);
  launch_attention_sm80_forward<T, 256>(p, launch);
}

}  // namespace cuda
}  // namespace fastattn
