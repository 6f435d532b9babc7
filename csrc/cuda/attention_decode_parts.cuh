// Which part of which sequence a block of attention_decode.cuh takes: arithmetic on lengths, the same on host and
// device.
#pragma once

#include "cuda/common.cuh"

namespace fastattn {
namespace cuda {

constexpr int kDecodeRows = 8;    // up to this many rows of a sequence are a decoding step
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

__host__ __device__ inline Sequence decode_sequence(const DecodeParams& p, int64_t sequence) {
  return p.sequences != nullptr ? p.sequences[sequence] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
}

// The first slot of a sequence; packed ones have as many as they can need, by where they begin.
__host__ __device__ inline int64_t first_slot(const DecodeParams& p, int64_t sequence, int64_t k_begin) {
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
    if (first_slot(p, middle, p.sequences[middle].k_begin) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, slot - first_slot(p, low, p.sequences[low].k_begin)};
}

// Of the keys [begin, stop) those that rows first_row .. last_row see, from a multiple of a tile on. What lies in
// [full_begin, full_stop) every one of these rows sees; the rest is tested.
struct DecodeSpan {
  int begin, stop, full_begin, full_stop;
};

__host__ __device__ inline DecodeSpan decode_span(const DecodeParams& p, const Sequence& own, int64_t first_row,
                                                  int64_t last_row, int64_t begin, int64_t stop) {
  int64_t low = begin, high = stop, full_low = begin, full_high = stop;
  if (p.window_left >= 0) {
    const int64_t first = first_row + own.diagonal - p.window_left, last = last_row + own.diagonal - p.window_left;
    low = first > begin ? first / kDecodeKeys * kDecodeKeys : begin;
    full_low = last > begin ? last : begin;
  }
  if (p.window_right >= 0) {
    const int64_t first = first_row + own.diagonal + p.window_right, last = last_row + own.diagonal + p.window_right;
    high = last + 1 < stop ? last + 1 : stop;
    full_high = first + 1 < stop ? first + 1 : stop;
  }
  if (p.mask != nullptr) full_high = full_low;
  // Bounds far outside the part, of which nothing is left, need not fit 32 bits.
  if (low >= high) return {static_cast<int>(begin), static_cast<int>(begin), 0, 0};
  return {static_cast<int>(low), static_cast<int>(high), static_cast<int>(full_low < stop ? full_low : stop),
          static_cast<int>(full_high > begin ? full_high : begin)};
}

}  // namespace cuda
}  // namespace fastattn
