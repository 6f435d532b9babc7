// Which rows of which sequence a block takes and which keys they see: arithmetic on extents, the same on host and
// device.
#pragma once

#include "cuda/common.cuh"

namespace fastattn {
namespace cuda {

// The rows of a call as tiles of `tile_lines` lines. A line is a row of a head; with pack > 1, for few rows, line
// row * pack + h is that row of head h of the `pack` heads that share keys and values.
struct AttentionTiling {
  int tile_lines, pack;
  bool q_packed;    // the sequences lie one after the other in one batch entry
  int64_t groups;   // of `pack` heads, in all batch entries; of one if q_packed
  int64_t blocks;   // tiles of each, at most
  int fewest_rows;  // sequences of fewer, another kernel's, have none here
  int64_t section;

  __host__ __device__ int64_t tiles() const { return groups * blocks; }
};

// Keys and values that one section of groups reads: of the 50 MB of an H100's L2 what queries and results leave.
constexpr int64_t kSectionBytes = 32 << 20;

// Up to this many rows of a sequence are a decoding step (attention_decode.cuh), unless there is dropout.
constexpr int kDecodeRows = 8;

// In forward such sequences are left alone among packed ones: with the others' kernel they would have other bits than
// alone.
inline int fewest_rows_of_tiles(const AttentionParams& p) {
  return p.sequences != nullptr && p.q_stride[0] == 0 && p.dropout.threshold == 0 ? kDecodeRows + 1 : 0;
}

inline AttentionTiling attention_tiling(const AttentionParams& p, int tile_lines, int pack, int fewest_rows = 0) {
  AttentionTiling tiling;
  tiling.tile_lines = tile_lines, tiling.pack = pack, tiling.fewest_rows = fewest_rows;
  tiling.q_packed = p.sequences != nullptr && p.batch > 1 && p.q_stride[0] == 0;
  tiling.groups = p.heads / pack * (tiling.q_packed ? 1 : p.batch);
  tiling.blocks =
      tiling.q_packed ? p.rows * pack / tile_lines + p.batch : (p.rows * pack + tile_lines - 1) / tile_lines;
  const int64_t bytes = std::max<int64_t>(p.keys, 1) * (p.head_dim + p.head_dim_v) * 2;
  // Groups with the same keys and values stay together.
  const int64_t sharing = p.heads / p.heads_kv / pack;
  tiling.section = std::min(tiling.groups, std::max<int64_t>(1, kSectionBytes / bytes) * std::max<int64_t>(1, sharing));
  return tiling;
}

// The tile's sequence and its extents, its group of heads in that sequence, its first line. Of packed sequences there
// may be tiles beyond the last row. 32 bits, since all of it stays in registers: extents are below 2^31.
struct AttentionTile {
  int batch, group, first_line, q_begin, rows, k_begin, keys;
  int64_t diagonal;
  __host__ __device__ bool exists(int pack) const { return first_line < rows * pack; }
};

// Sequences have slots for tiles by where they begin: as many as they can need.
__host__ __device__ inline int64_t first_slot(const AttentionTiling& tiling, int64_t sequence, int64_t q_begin) {
  return q_begin * tiling.pack / tiling.tile_lines + sequence;
}

// Section by section, in each the last tiles of all its groups first: under a causal mask the longest.
__host__ __device__ inline AttentionTile attention_tile(const AttentionParams& p, const AttentionTiling& tiling,
                                                        int64_t index) {
  const int64_t begin = index / (tiling.blocks * tiling.section) * tiling.section;
  const int64_t count = tiling.groups - begin < tiling.section ? tiling.groups - begin : tiling.section;
  const int64_t rest = index - begin * tiling.blocks, heads = p.heads / tiling.pack;
  int64_t block = tiling.blocks - 1 - rest / count, batch = 0;
  const int64_t group = begin + rest % count;
  if (tiling.q_packed) {
    int64_t high = p.batch;
    while (high - batch > 1) {
      const int64_t middle = (batch + high) / 2;
      if (first_slot(tiling, middle, p.sequences[middle].q_begin) <= block) {
        batch = middle;
      } else {
        high = middle;
      }
    }
    block -= first_slot(tiling, batch, p.sequences[batch].q_begin);
  } else {
    batch = group / heads;
  }
  const Sequence own = p.sequences != nullptr ? p.sequences[batch] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
  return {static_cast<int>(batch),
          static_cast<int>(group % heads),
          static_cast<int>(block * tiling.tile_lines),
          static_cast<int>(own.q_begin),
          own.rows < tiling.fewest_rows ? 0 : static_cast<int>(own.rows),
          static_cast<int>(own.k_begin),
          static_cast<int>(own.keys),
          own.diagonal};
}

// Keys [begin, end).
struct KeyRange {
  int begin, end;
};

__host__ __device__ inline int clamped(int64_t key, int keys) {
  return key < 0 ? 0 : key < keys ? static_cast<int>(key) : keys;
}

// Those that `row` sees, by the window alone.
__host__ __device__ inline KeyRange keys_of_row(const AttentionParams& p, const AttentionTile& own, int row) {
  const int64_t at = row + own.diagonal;
  return {p.window_left >= 0 ? clamped(at - p.window_left, own.keys) : 0,
          p.window_right >= 0 ? clamped(at + p.window_right + 1, own.keys) : own.keys};
}

// Those that any of the rows first .. last sees, and those that all of them do (which may be none: end < begin).
__host__ __device__ inline KeyRange keys_of_any(const AttentionParams& p, const AttentionTile& own, int first,
                                                int last) {
  return {keys_of_row(p, own, first).begin, keys_of_row(p, own, last).end};
}
__host__ __device__ inline KeyRange keys_of_all(const AttentionParams& p, const AttentionTile& own, int first,
                                                int last) {
  return {keys_of_row(p, own, last).begin, keys_of_row(p, own, first).end};
}

// Blocks of kKeys keys that hold `keys`.
template <int kKeys>
__host__ __device__ inline KeyRange blocks_of_keys(const KeyRange& keys) {
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / kKeys, (keys.end + kKeys - 1) / kKeys};
}

}  // namespace cuda
}  // namespace fastattn
