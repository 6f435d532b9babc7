// From q.k to the score of csrc/cpu/attention_score-inl.h, on the fragment that a lane has of a product's result:
//
//   s[4 j + e]: line g + 8 (e / 2), key 8 j + 2 t + e % 2      with lane = 4 g + t
//
// which is that of mma.m16n8k16 and of wgmma for the 16 lines of a warp.
#pragma once

#include <cmath>

#include "cuda/attention_blocks.cuh"

namespace fastattn {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = -INFINITY;

// One of the two lines of a lane.
struct ScoreLine {
  int row, head;
};

// The masks of most calls: window and extents. The score is scale * q.k, which the exponential takes in; scale > 0.
struct PlainScores {
  static constexpr bool kGeneral = false;
  static __host__ __device__ bool takes(const AttentionParams& p) {
    return p.mask == nullptr && p.slopes == nullptr && p.softcap <= 0 && p.dropout.threshold == 0 && p.scale > 0;
  }
  // What takes a score to the exponent of 2.
  static __device__ float unit(const AttentionParams& p) { return static_cast<float>(p.scale) * kLog2E; }
};

// Every other: softcap, ALiBi, a mask read element by element, dropout, any scale.
struct GeneralScores {
  static constexpr bool kGeneral = true;
  static __device__ float unit(const AttentionParams&) { return kLog2E; }
};

// What the mask adds to a score; -inf hides.
__device__ inline float mask_at(const AttentionParams& p, int64_t at) {
  switch (p.mask_dtype) {
    case DType::kBool:
      return static_cast<const uint8_t*>(p.mask)[at] != 0 ? 0.0f : kHidden;
    case DType::kFloat32:
      return static_cast<const float*>(p.mask)[at];
    case DType::kFloat16:
      return widen(static_cast<const Half*>(p.mask)[at]);
    default:
      return widen(static_cast<const BFloat16*>(p.mask)[at]);
  }
}

// Hides the keys outside a line's.
template <int kCount>
__device__ inline void hide_unseen(float (&s)[kCount], const KeyRange (&seen)[2], int first_key) {
  const int column = first_key + static_cast<int>(threadIdx.x % 4 * 2);
  const int begin[2] = {seen[0].begin - column, seen[1].begin - column};
  const int end[2] = {seen[0].end - column, seen[1].end - column};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int key = i / 4 * 8 + i % 2, line = i / 2 % 2;
    if (key < begin[line] || key >= end[line]) s[i] = kHidden;
  }
}

// The score but for the window.
template <int kCount>
__device__ inline void finish_scores(const AttentionParams& p, const AttentionTile& tile, const ScoreLine (&lines)[2],
                                     const KeyRange (&seen)[2], int first_key, float (&s)[kCount]) {
  const int first_column = first_key + static_cast<int>(threadIdx.x % 4 * 2);
  const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
  const float scale_over_cap = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : 0);
  float slope[2] = {0, 0};
  int distance[2];
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    if (p.slopes != nullptr) {
      slope[line] = static_cast<const float*>(p.slopes)[tile.batch * p.slopes_stride_batch + lines[line].head];
    }
    distance[line] = static_cast<int>(lines[line].row + tile.diagonal - first_column);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2, line = i / 2 % 2;
    float x = p.softcap > 0 ? cap * tanhf(s[i] * scale_over_cap) : s[i] * scale;
    if (p.slopes != nullptr) x -= slope[line] * fabsf(static_cast<float>(distance[line] - column));
    s[i] = x;
  }
  if (p.mask == nullptr) return;
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    const int64_t start = tile.batch * p.mask_stride[0] + lines[line].head * p.mask_stride[1] +
                          lines[line].row * p.mask_stride[2] + first_column * p.mask_stride[3];
#pragma unroll
    for (int i = 2 * line; i < kCount; i += i % 2 == 0 ? 1 : 3) {
      const int column = i / 4 * 8 + i % 2, key = first_column + column;
      if (key < seen[line].begin || key >= seen[line].end) continue;
      const float mask = mask_at(p, start + column * p.mask_stride[3]);
      s[i] = mask == kHidden ? kHidden : s[i] + mask;
    }
  }
}

// Weights that dropout drops become 0; what is kept is to be multiplied by dropout_scale.
template <int kCount>
__device__ inline void drop(const AttentionParams& p, int batch, const ScoreLine (&lines)[2], int first_key,
                            float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const ScoreLine& line = lines[i / 2 % 2];
    const uint32_t four = static_cast<uint32_t>((first_key + i / 4 * 8 + static_cast<int>(threadIdx.x % 4 * 2)) / 4);
    uint32_t words[4];
    philox(p.dropout.seed, four, static_cast<uint32_t>(line.row),
           static_cast<uint32_t>(batch * static_cast<int>(p.heads) + line.head), p.dropout.offset, words);
    const bool upper = threadIdx.x % 2 != 0;
    if ((upper ? words[2] : words[0]) < p.dropout.threshold) s[i] = 0;
    if ((upper ? words[3] : words[1]) < p.dropout.threshold) s[i + 1] = 0;
  }
}

}  // namespace cuda
}  // namespace fastattn
