// One (row, key) of a backward pass: from q.k, dout.v and the row's lse and delta to the weight of the value and the
// gradients of the score. With P = exp(score - lse), z the dropout factor and delta = dout.out - dlse:
//
//   weight = P z;   dS = P (z dout.v - delta) at mask and slope;   dS' = dS (1 - tanh^2) (softcap) at scale * q.k
//
// A fragment's lines are rows of q and its columns keys, or (kTransposed) the other way round: element i of a lane,
// 4 g + t, is line g + 8 (i / 2 % 2) and column 8 (i / 4) + 2 t + i % 2.
#pragma once

#include "cuda/attention_softmax.cuh"

namespace fastattn {
namespace cuda {

// Rows that see `key`, by the window alone.
__host__ __device__ inline KeyRange rows_of_key(const AttentionParams& p, const AttentionTile& own, int key) {
  const int64_t at = key - own.diagonal;
  return {p.window_right >= 0 ? clamped(at - p.window_right, own.rows) : 0,
          p.window_left >= 0 ? clamped(at + p.window_left + 1, own.rows) : own.rows};
}

// Rows that see any of the keys first .. last, and those that see them all (which may be none: end < begin).
__host__ __device__ inline KeyRange rows_of_any(const AttentionParams& p, const AttentionTile& own, int first,
                                                int last) {
  return {rows_of_key(p, own, first).begin, rows_of_key(p, own, last).end};
}
__host__ __device__ inline KeyRange rows_of_all(const AttentionParams& p, const AttentionTile& own, int first,
                                                int last) {
  return {rows_of_key(p, own, last).begin, rows_of_key(p, own, first).end};
}

// The tiles of `lines` keys of a call, for the gradients of keys and values.
struct KeyTiling {
  int lines;
  bool packed;     // the sequences lie one after the other in one batch entry
  int64_t blocks;  // tiles of a key head, at most: of one sequence, or (packed) of all
  int64_t groups;  // batch entries (packed: 1) times key heads
  __host__ __device__ int64_t tiles() const { return groups * blocks; }
};

inline KeyTiling key_tiling(const AttentionBackwardParams& p, int lines) {
  const bool packed = p.sequences != nullptr && p.batch > 1 && p.key_stride[0] == 0;
  const int64_t blocks = packed ? p.keys / lines + p.batch : (p.keys + lines - 1) / lines;
  return {lines, packed, blocks, p.heads_kv * (packed ? 1 : p.batch)};
}

// As attention_tile, with lines of keys and groups of the heads of a key head. First tiles first: under a causal mask
// the longest.
__host__ __device__ inline AttentionTile key_tile(const AttentionParams& p, const KeyTiling& tiling, int64_t index) {
  const int64_t group = index % tiling.groups;
  int64_t block = index / tiling.groups, batch = group / p.heads_kv;
  if (tiling.packed) {
    int64_t high = p.batch;
    batch = 0;
    while (high - batch > 1) {
      const int64_t middle = (batch + high) / 2;
      if (p.sequences[middle].k_begin / tiling.lines + middle <= block) {
        batch = middle;
      } else {
        high = middle;
      }
    }
    block -= p.sequences[batch].k_begin / tiling.lines + batch;
  }
  const Sequence own = p.sequences != nullptr ? p.sequences[batch] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
  return {static_cast<int>(batch),
          static_cast<int>(group % p.heads_kv),
          static_cast<int>(block * tiling.lines),
          static_cast<int>(own.q_begin),
          static_cast<int>(own.rows),
          static_cast<int>(own.k_begin),
          static_cast<int>(own.keys),
          own.diagonal};
}

// What the pairs of a head of a sequence share.
struct PairPlace {
  int64_t mask;  // where its mask begins, in elements
  float slope;
  uint32_t random;  // Philox's third counter
};

__device__ inline PairPlace pair_place(const AttentionParams& p, int batch, int head) {
  PairPlace at;
  at.mask = batch * p.mask_stride[0] + head * p.mask_stride[1];
  at.slope = p.slopes == nullptr ? 0.0f : static_cast<const float*>(p.slopes)[batch * p.slopes_stride_batch + head];
  at.random = static_cast<uint32_t>(batch * static_cast<int>(p.heads) + head);
  return at;
}

// lse as the exponent takes it: in base 2, and infinite for a row that saw nothing, whose weights are 0.
__device__ inline float lse_in_base_2(float lse) { return lse == kHidden ? INFINITY : lse * kLog2E; }

struct PairGradient {
  float weight, at_score, at_product;
};

// `tested`: whether some pair of the tile is hidden by window or extents.
template <bool kGeneral>
__device__ inline PairGradient pair_gradient(const AttentionParams& p, const AttentionTile& own, const PairPlace& at,
                                             int row, int key, bool tested, bool keep, float product, float dweight,
                                             float lse2, float delta) {
  bool visible = true;
  if (tested) {
    const KeyRange keys = keys_of_row(p, own, row);
    visible = row < own.rows && key >= keys.begin && key < keys.end;
  }
  if constexpr (!kGeneral) {
    const float weight = visible ? exp2_fast(fmaf(product, static_cast<float>(p.scale) * kLog2E, -lse2)) : 0.0f;
    const float gradient = visible ? weight * (dweight - delta) : 0.0f;
    return {weight, gradient, gradient};
  } else {
    float x = product * static_cast<float>(p.scale), slope_of_cap = 1;
    if (p.softcap > 0) {
      const float t = tanhf(product * static_cast<float>(p.scale / p.softcap));
      x = static_cast<float>(p.softcap) * t, slope_of_cap = 1 - t * t;
    }
    if (p.slopes != nullptr) x -= at.slope * fabsf(static_cast<float>(row + own.diagonal - key));
    if (p.mask != nullptr && visible) {
      const float mask = mask_at(p, at.mask + row * p.mask_stride[2] + key * p.mask_stride[3]);
      visible = mask != kHidden;
      x += mask;
    }
    const float weight = visible ? exp2_fast(fmaf(x, kLog2E, -lse2)) : 0.0f;
    const float upstream = keep ? dweight * static_cast<float>(p.dropout_scale) : 0.0f;
    const float gradient = visible ? weight * (upstream - delta) : 0.0f;
    return {keep ? weight : 0.0f, gradient, visible ? gradient * slope_of_cap : 0.0f};
  }
}

// Bit i: whether dropout keeps element i of a fragment whose line 0 and column 0 are `line` and `column` (multiples
// of 4). Four keys share a draw; lanes that have them share it too.
template <bool kTransposed, int kCount>
__device__ inline uint32_t kept_pairs(const AttentionParams& p, const PairPlace& at, int line, int column) {
  static_assert(kCount % 8 == 0 && kCount <= 32, "two groups of columns at a time, a bit each");
  if (p.dropout.threshold == 0) return ~0u;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t kept = 0;
#pragma unroll
  for (int group = 0; group < kCount / 4; group += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      if constexpr (kTransposed) {
        // Lane r of the four that have these keys draws for the r-th of four rows; then each has its key's words.
        const int row = column + (group + g % 4 / 2) * 8 + 2 * t + g % 2;
        philox(p.dropout.seed, static_cast<uint32_t>((line + 8 * half + g) / 4), static_cast<uint32_t>(row), at.random,
               p.dropout.offset, words);
        transpose_quad<4>(words);
      } else {
        // Of a pair of lanes one draws for each group of columns; a lane's keys are half of the four.
        const int own = t % 2;
        philox(p.dropout.seed, static_cast<uint32_t>((column + (group + own) * 8 + 2 * t) / 4),
               static_cast<uint32_t>(line + 8 * half + g), at.random, p.dropout.offset, words);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t other = __shfl_xor_sync(0xffffffffu, own ? words[e] : words[2 + e], 1);
          const uint32_t mine = own ? words[2 + e] : words[e];
          words[e] = own ? other : mine, words[2 + e] = own ? mine : other;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int element = 4 * (group + i / 2) + 2 * half + i % 2;
        kept |= static_cast<uint32_t>(words[i] >= p.dropout.threshold) << element;
      }
    }
  }
  return kept;
}

// From the products of a tile, s and ds, to P z and, of dq and dk (kScore: of the mask), dS. `line` and `column` are
// the first of the warp's fragment; lse and delta of a line are given, those of columns (kTransposed) in shared memory.
template <bool kGeneral, bool kTransposed, bool kScore, int kCount>
__device__ inline void differentiate_pairs(const AttentionParams& p, const AttentionTile& own, const PairPlace& at,
                                           int line, int column, bool tested, const float (&lse2)[2],
                                           const float (&delta)[2], const float* column_lse2, const float* column_delta,
                                           float (&s)[kCount], float (&ds)[kCount], float (&distances)[2]) {
  uint32_t kept = ~0u;
  if constexpr (kGeneral) kept = kept_pairs<kTransposed, kCount>(p, at, line, column);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int half = i / 2 % 2, l = line + g + 8 * half, offset = i / 4 * 8 + 2 * t + i % 2, c = column + offset;
    const int row = kTransposed ? c : l, key = kTransposed ? l : c;
    const PairGradient pair = pair_gradient<kGeneral>(p, own, at, row, key, tested, (kept >> i & 1) != 0, s[i], ds[i],
                                                      kTransposed ? column_lse2[offset] : lse2[half],
                                                      kTransposed ? column_delta[offset] : delta[half]);
    s[i] = pair.weight;
    ds[i] = kScore ? pair.at_score : pair.at_product;
    if constexpr (kGeneral && !kTransposed && !kScore) {
      distances[half] -= pair.at_score * fabsf(static_cast<float>(row + own.diagonal - key));
    }
  }
}

}  // namespace cuda
}  // namespace fastattn
