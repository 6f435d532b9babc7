// The two products of attention_decode.cuh on 16 lines and 16 keys of a warp, and where their operands lie.
//
// Scores are fragments of attention_score.cuh; acc[4 n + e] is of the same line and channel 8 n + 2 t + e % 2.
#pragma once

#include "cuda/attention_decode_parts.cuh"
#include "cuda/attention_softmax.cuh"

namespace fastattn {
namespace cuda {

// What fits around a ring of 64 KiB, by the bytes of a row.
template <class T, int kD>
struct DecodeTile {
  static constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte chunk
  static constexpr int kChunks = kD / kVector;    // of a row
  static constexpr int kTileBytes = kDecodeKeys * kD * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kD * sizeof(T) <= 256 ? 4 : 2, kThreads = 32 * kWarps;
  static constexpr int kRingBytes = 64 * 1024, kSlots = kRingBytes / kWarps / kTileBytes;
  // l and m of every warp's lines.
  static constexpr int kSumBytes = 2 * kWarps * kDecodeLines * static_cast<int>(sizeof(float));
  // The ring, Q, these, and 16 bytes a line.
  static constexpr int kSharedBytes = kRingBytes + kTileBytes + kSumBytes + 16 * kDecodeLines;
  static_assert(kSlots >= 2 && kSlots % 2 == 0, "K and V alternate in the ring");
  static_assert(kWarps * kDecodeLines * kD * static_cast<int>(sizeof(float)) <= kRingBytes,
                "the warps' sums take its place");
};

// Byte offset of a 16-byte chunk of a line of a tile: one chunk of eight lines lies in as many bank groups. The place
// that swizzled_chunk gives, with line and chunk apart: in that form float32 of 256 channels spills (sm_80).
template <int kChunks>
__host__ __device__ inline int tile_offset(int line, int chunk) {
  return line * (16 * kChunks) + chunk / 8 * 128 + (chunk % 8 ^ line % 8) * 16;
}

template <class T, int kD>
struct DecodeProducts {
  static constexpr int kChunks = DecodeTile<T, kD>::kChunks;

  // s = q kᵀ
  static __device__ void scores(const char* q, const char* k, float (&s)[8]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = 0;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, q + tile_offset<kChunks>(lane % 16, 2 * step + lane / 16));
      ldmatrix_x4(b, k + tile_offset<kChunks>(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(s[4 * tile]), a, {b[2 * tile], b[2 * tile + 1]});
      }
    }
  }

  // acc += p v
  static __device__ void accumulate(const float (&p)[8], const char* v, float (&acc)[kD / 2]) {
    const int lane = threadIdx.x % 32;
    const uint32_t a[4] = {pack_pair<T>(p[0], p[1]), pack_pair<T>(p[2], p[3]), pack_pair<T>(p[4], p[5]),
                           pack_pair<T>(p[6], p[7])};
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + tile_offset<kChunks>(lane % 16, 2 * step + lane / 16));
      mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(acc[8 * step]), a, {b[0], b[1]});
      mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(acc[8 * step + 4]), a, {b[2], b[3]});
    }
  }
};

template <int kD>
struct DecodeProducts<float, kD> {
  static constexpr int kChunks = DecodeTile<float, kD>::kChunks;

  static __device__ void scores(const char* q, const char* k, float (&s)[8]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = 0;
#pragma unroll(kD < 256 ? 2 : 1)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Packed<float> line[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) line[half] = load(q, g + 8 * half, chunk);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Packed<float> key = load(k, j / 2 * 8 + 2 * t + j % 2, chunk);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[j / 2 * 4 + 2 * half + j % 2];
#pragma unroll
          for (int i = 0; i < 4; ++i) x = fmaf(line[half].value[i], key.value[i], x);
        }
      }
    }
  }

  static __device__ void accumulate(const float (&p)[8], const char* v, float (&acc)[kD / 2]) {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll 1
    for (int from = 0; from < 4; ++from) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = j / 2 * 8 + 2 * from + j % 2;
        float weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weight[half] = __shfl_sync(0xffffffffu, p[j / 2 * 4 + 2 * half + j % 2], lane / 4 * 4 + from);
        }
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          const float* pair = reinterpret_cast<const float*>(v + tile_offset<kChunks>(key, 2 * n + t / 2)) + t % 2 * 2;
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[4 * n + e] = fmaf(weight[e / 2], pair[e % 2], acc[4 * n + e]);
        }
      }
    }
  }

 private:
  static __device__ Packed<float> load(const char* tile, int line, int chunk) {
    return *reinterpret_cast<const Packed<float>*>(tile + tile_offset<kChunks>(line, chunk));
  }
};

}  // namespace cuda
}  // namespace fastattn
