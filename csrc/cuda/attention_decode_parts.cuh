// Which part of which sequence a block of attention_decode.cuh takes: arithmetic on lengths, the same on host and
// device.
#pragma once

#include "cuda/attention_blocks.cuh"

namespace fastattn {
namespace cuda {

constexpr int kDecodeLines = 16;  // lines of a block: the rows of one mma.m16n8k16
constexpr int kDecodeKeys = 16;   // keys of a warp's tile
// Keys of a part, and how many parts a sequence has at most: longer ones have longer parts.
constexpr int kPartKeys = 256, kMostParts = 64;

struct DecodeParams : AttentionParams {
  bool q_packed, k_packed;  // the sequences lie one after the other in one batch entry
  bool aligned;             // every row of k and v starts at a multiple of 16 bytes
  int tiles;                // of lines, of one key head
  int part_rows;            // rows of a sequence in `acc` and `sums`
  int parts_each;           // parts of a sequence, unless k_packed
  int64_t slots;            // parts of all sequences
  float* acc;               // (slots, heads, part_rows, head_dim_v)
  float* sums;              // (2, slots, heads, part_rows): l, m in base 2
  // Null, or this call's own keys and values (batch, heads_kv, rows, channels), each sequence's last: they are read
  // from here, and the block of their part writes them to the cache.
  const void *fresh_k, *fresh_v;
  int64_t fresh_k_stride[3], fresh_v_stride[3];
};

__host__ __device__ inline int64_t part_length(int64_t keys) {
  constexpr int64_t kStep = int64_t{kPartKeys} * kMostParts;
  return (keys + kStep - 1) / kStep * kPartKeys;
}

__host__ __device__ inline int64_t parts_of(int64_t keys) {
  return keys > 0 ? (keys + part_length(keys) - 1) / part_length(keys) : 0;
}

// Those of a sequence's part; none past its last.
__host__ __device__ inline KeyRange keys_of_part(int64_t index, int64_t keys) {
  const int64_t length = part_length(keys), begin = index * length, end = begin + length;
  if (index < 0 || begin >= keys) return {0, 0};
  return {static_cast<int>(begin), static_cast<int>(end < keys ? end : keys)};
}

__host__ __device__ inline Sequence decode_sequence(const DecodeParams& p, int64_t sequence) {
  return p.sequences != nullptr ? p.sequences[sequence] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
}

// The first slot of a sequence; packed ones have as many as they can need, by where they begin.
__host__ __device__ inline int64_t first_part_slot(const DecodeParams& p, int64_t sequence, int64_t k_begin) {
  return p.k_packed ? k_begin / kPartKeys + sequence : sequence * p.parts_each;
}

// Most parts of a sequence of up to `capacity` keys: just beyond a multiple of kPartKeys * kMostParts parts are longer
// and so fewer.
__host__ __device__ inline int64_t most_parts(int64_t capacity) {
  const int64_t parts = (capacity + kPartKeys - 1) / kPartKeys;
  return parts < kMostParts ? parts : kMostParts;
}

// The parameters of both kernels but acc, sums and what is appended.
inline DecodeParams decode_params(const AttentionParams& attention, bool q_packed, bool k_packed) {
  DecodeParams p{};
  static_cast<AttentionParams&>(p) = attention;
  p.q_packed = q_packed, p.k_packed = k_packed;
  p.part_rows = static_cast<int>(std::min<int64_t>(p.rows, kDecodeRows));
  p.tiles = static_cast<int>((p.part_rows * (p.heads / p.heads_kv) + kDecodeLines - 1) / kDecodeLines);
  p.parts_each = static_cast<int>(most_parts(p.keys));
  p.slots = k_packed ? p.keys / kPartKeys + p.batch : p.batch * p.parts_each;
  return p;
}

struct DecodePart {
  int64_t sequence, index;  // the part's index in its sequence may be past its last
};

__host__ __device__ inline DecodePart part_of_slot(const DecodeParams& p, int64_t slot) {
  if (!p.k_packed) return {slot / p.parts_each, slot % p.parts_each};
  int64_t low = 0, high = p.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_part_slot(p, middle, p.sequences[middle].k_begin) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, slot - first_part_slot(p, low, p.sequences[low].k_begin)};
}

__host__ __device__ inline AttentionTile tile_of_sequence(const DecodeParams& p, int sequence, int head_kv,
                                                          int first_line) {
  const Sequence own = decode_sequence(p, sequence);
  return {sequence,
          head_kv,
          first_line,
          static_cast<int>(own.q_begin),
          static_cast<int>(own.rows),
          static_cast<int>(own.k_begin),
          static_cast<int>(own.keys),
          own.diagonal};
}

// Of the keys of a part those that rows first .. last see, from a multiple of a tile on.
__host__ __device__ inline KeyRange decode_span(const AttentionParams& p, const AttentionTile& own, int first, int last,
                                                KeyRange part) {
  const KeyRange any = keys_of_any(p, own, first, last);
  return {any.begin > part.begin ? any.begin / kDecodeKeys * kDecodeKeys : part.begin,
          any.end < part.end ? any.end : part.end};
}

}  // namespace cuda
}  // namespace fastattn
