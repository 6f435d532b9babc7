// Attention backward on mma.sync (Dao, "FlashAttention-2", 2023, §3.1): contract in cpu/params.h
// (AttentionBackwardParams, of which p.delta is always there), formulas of a pair in attention_gradient.cuh, tiles and
// products in attention_sm80.cuh. No atomics: every gradient is written by one thread, in a fixed order of summation.
//
// P is computed anew from q, k and lse. Every kernel holds two tiles of kLines lines, walks the tiles of kRows rows
// that any of them sees, and computes from each s = fixed_0 moving_0ᵀ and ds = fixed_1 moving_1ᵀ; then
//
//             fixed    moving
//   dq        q, dout  k, v      dq += dS' k
//   dk, dv    k, v     q, dout   dk += dS'ᵀ q;  dv += (P z)ᵀ dout, over all heads of a key head
//   dmask     q, dout  k, v      += dS, over all that the mask is broadcast along
//
// with P and dS in registers: in the second the scores are transposed, so that they are left operands there too. A
// warp has 16 lines. Moving tiles are double-buffered by cp.async.
//
//   channels  warps  rows  shared memory
//   64        8      64    64 KiB
//   96        8      32    72
//   128       8      32    96, as the 99 KiB of a block of sm_86 allow
//   192       4      32    96
//   256       4      16    96
//
// dk and dv together take kD accumulators a thread; from 192 channels on they are kernels of their own, which computes
// s once more.
#pragma once

#include "cuda/attention_gradient.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

struct AttentionSm80BackwardCall : AttentionBackwardParams {
  AttentionTiling tiling;
  KeyTiling key_tiling;
  bool q_aligned, k_aligned, v_aligned, dout_aligned;
};

enum class Sm80Gradient { kQueries, kKeysAndValues, kKeys, kValues };

template <int kD>
struct BackwardSm80 {
  static constexpr int kWarps = kD <= 128 ? 8 : 4, kThreads = 32 * kWarps, kLines = 16 * kWarps;
  static constexpr int kRows = kD <= 64 ? 64 : kD <= 192 ? 32 : 16;
  static constexpr int kLineBytes = kLines * kD * 2, kRowBytes = kRows * kD * 2;
  // lse and delta of the rows of both buffers, and a word for each warp.
  static constexpr int kStatisticsBytes = 2 * 2 * kRows * 4;
  static constexpr int kSharedBytes = 2 * kLineBytes + 4 * kRowBytes + kStatisticsBytes + 4 * kWarps;
};

// Rows of a head of a sequence: the first of them, in elements.
template <class T>
struct Rows {
  const T* x;
  int64_t stride;
  int count, channels;
  bool aligned;

  template <int kRows, int kD, int kThreads>
  __device__ void load(char* tile, int first) const {
    const auto row = [&](int r) -> const T* { return first + r < count ? x + (first + r) * stride : nullptr; };
    Tile<T, kRows, kD>::template load<kThreads>(tile, x, row, channels, aligned);
  }
};

template <class T>
__device__ inline Rows<T> rows_of(const void* x, const int64_t (&stride)[3], int batch, int head, int first, int count,
                                  int64_t channels, bool aligned) {
  const T* start = static_cast<const T*>(x) + batch * stride[0] + head * stride[1] + first * stride[2];
  return {start, stride[2], count, static_cast<int>(channels), aligned};
}

template <class T>
struct Sm80Operands {
  const AttentionSm80BackwardCall& p;
  const AttentionTile& own;

  __device__ Rows<T> q(int head) const {
    return rows_of<T>(p.q, p.q_stride, own.batch, head, own.q_begin, own.rows, p.head_dim, p.q_aligned);
  }
  __device__ Rows<T> dout(int head) const {
    return rows_of<T>(p.dout, p.dout_stride, own.batch, head, own.q_begin, own.rows, p.head_dim_v, p.dout_aligned);
  }
  __device__ Rows<T> k(int head_kv) const {
    return rows_of<T>(p.k, p.k_stride, own.batch, head_kv, own.k_begin, own.keys, p.head_dim, p.k_aligned);
  }
  __device__ Rows<T> v(int head_kv) const {
    return rows_of<T>(p.v, p.v_stride, own.batch, head_kv, own.k_begin, own.keys, p.head_dim_v, p.v_aligned);
  }
  // Where row 0 is in lse and its like.
  __device__ int64_t statistics(int head) const {
    return own.batch * p.row_stride[0] + head * p.row_stride[1] + own.q_begin;
  }
};

// The place of each tile in the shared memory of a block.
template <int kD>
struct BackwardTiles {
  using Shape = BackwardSm80<kD>;
  char* shared;
  __device__ char* fixed(int which) const { return shared + which * Shape::kLineBytes; }
  __device__ char* moving(int buffer, int which) const {
    return shared + 2 * Shape::kLineBytes + (2 * buffer + which) * Shape::kRowBytes;
  }
  // lse (which 0, in base 2) and delta of the moving rows of `buffer`.
  __device__ float* statistics(int buffer, int which) const {
    return reinterpret_cast<float*>(moving(2, 0)) + (2 * buffer + which) * Shape::kRows;
  }
  __device__ uint32_t* words() const { return reinterpret_cast<uint32_t*>(statistics(2, 0)); }
};

template <class T, int kD, bool kGeneral, Sm80Gradient kOf>
struct BackwardSm80Block {
  using Shape = BackwardSm80<kD>;
  static constexpr bool kTransposed = kOf != Sm80Gradient::kQueries;
  static constexpr bool kOfValues = kOf == Sm80Gradient::kValues || kOf == Sm80Gradient::kKeysAndValues;
  static constexpr bool kOfScores = kOf != Sm80Gradient::kValues;
  static constexpr int kLines = Shape::kLines, kRows = Shape::kRows, kThreads = Shape::kThreads;

  const AttentionSm80BackwardCall& p;
  const AttentionTile& own;
  const Sm80Operands<T> operands;
  const BackwardTiles<kD> tiles;
  const int warp_line;
  // Moving tiles [begin, end) of each of `members` heads from `head` on.
  int head, members;
  KeyRange seen, whole;  // rows of the moving operand that any line sees, and that all lines see
  int begin, end;
  float lse2[2] = {0, 0}, delta[2] = {0, 0}, distances[2] = {0, 0};
  float acc[1][kD / 2], acc_v[1][kD / 2];  // of dq or dk, and of dv

  __device__ BackwardSm80Block(const AttentionSm80BackwardCall& call, const AttentionTile& tile)
      : p(call),
        own(tile),
        operands{call, tile},
        tiles{dynamic_shared()},
        warp_line(static_cast<int>(threadIdx.x) / 32 * 16) {
    const int group = static_cast<int>(p.heads / p.heads_kv), extent = kTransposed ? own.keys : own.rows;
    const int past = own.first_line + kLines, last = (past < extent ? past : extent) - 1;
    head = kTransposed ? own.group * group : own.group;
    members = kTransposed ? group : 1;
    seen = kTransposed ? rows_of_any(p, own, own.first_line, last) : keys_of_any(p, own, own.first_line, last);
    whole = kTransposed ? rows_of_all(p, own, own.first_line, last) : keys_of_all(p, own, own.first_line, last);
    // The mask has no place for lines beyond the last.
    if (kGeneral && past > extent) whole = {0, 0};
    const KeyRange blocks = blocks_of_keys<kRows>(seen);
    begin = blocks.begin, end = blocks.end;
#pragma unroll
    for (float& x : acc[0]) x = 0;
#pragma unroll
    for (float& x : acc_v[0]) x = 0;
  }

  __device__ int steps() const { return members * (end - begin); }

  __device__ void load_fixed() {
    const int first = own.first_line;
    if constexpr (kTransposed) {
      operands.k(own.group).template load<kLines, kD, kThreads>(tiles.fixed(0), first);
      if (kOfScores) operands.v(own.group).template load<kLines, kD, kThreads>(tiles.fixed(1), first);
    } else {
      operands.q(head).template load<kLines, kD, kThreads>(tiles.fixed(0), first);
      operands.dout(head).template load<kLines, kD, kThreads>(tiles.fixed(1), first);
      const int64_t at = operands.statistics(head);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + warp_line + static_cast<int>(threadIdx.x % 32) / 4 + 8 * half;
        if (row >= own.rows) continue;
        lse2[half] = lse_in_base_2(static_cast<const float*>(p.lse)[at + row]);
        delta[half] = static_cast<const float*>(p.delta)[at + row];
      }
    }
  }

  // Starts the copies of the moving tiles of `step`, if there is one; a group of cp.async in any case.
  __device__ void load_moving(int step, int buffer) {
    if (step < steps()) {
      const int member = step / (end - begin), first = (begin + step % (end - begin)) * kRows;
      if constexpr (kTransposed) {
        operands.q(head + member).template load<kRows, kD, kThreads>(tiles.moving(buffer, 0), first);
        operands.dout(head + member).template load<kRows, kD, kThreads>(tiles.moving(buffer, 1), first);
        const int r = static_cast<int>(threadIdx.x), row = first + r;
        if (r < kRows) {
          const int64_t at = operands.statistics(head + member) + row;
          tiles.statistics(buffer, 0)[r] = row < own.rows ? lse_in_base_2(static_cast<const float*>(p.lse)[at]) : 0.0f;
          tiles.statistics(buffer, 1)[r] = row < own.rows ? static_cast<const float*>(p.delta)[at] : 0.0f;
        }
      } else {
        const int head_kv = head / static_cast<int>(p.heads / p.heads_kv);
        operands.k(head_kv).template load<kRows, kD, kThreads>(tiles.moving(buffer, 0), first);
        operands.v(head_kv).template load<kRows, kD, kThreads>(tiles.moving(buffer, 1), first);
      }
    }
    cp_async_commit();
  }

  __device__ void add(int step, int buffer) {
    const int member = step / (end - begin), first = (begin + step % (end - begin)) * kRows;
    // Of keys and values always: with a branch around the test ptxas spills 128 channels on sm_90.
    const bool tested = (kGeneral && kTransposed) || first < whole.begin || first + kRows > whole.end;
    float s[1][kRows / 2] = {}, ds[1][kRows / 2] = {};
    multiply_rows<T, kD, kLines, kRows, 1>(tiles.fixed(0), warp_line, tiles.moving(buffer, 0), s);
    if constexpr (kOfScores) {
      multiply_rows<T, kD, kLines, kRows, 1>(tiles.fixed(1), warp_line, tiles.moving(buffer, 1), ds);
    }
    differentiate_pairs<kGeneral, kTransposed, false>(
        p, own, pair_place(p, own.batch, head + member), own.first_line + warp_line, first, tested, lse2, delta,
        tiles.statistics(buffer, 0), tiles.statistics(buffer, 1), s[0], ds[0], distances);
    if constexpr (kOfValues) multiply_columns<T, kD, kRows, 1>(s, tiles.moving(buffer, 1), acc_v);
    if constexpr (kTransposed && kOfScores) multiply_columns<T, kD, kRows, 1>(ds, tiles.moving(buffer, 0), acc);
    if constexpr (!kTransposed) {
      RowBits broken = 0;
      if (tested || kGeneral) {
        __syncthreads();  // all warps have read the keys that may now be cleared
        broken = clear_broken<T, kRows, kD, kThreads>(tiles.moving(buffer, 0), tiles.words());
      }
      multiply_columns<T, kD, kRows, 1>(ds, tiles.moving(buffer, 0), acc);
      if (broken != 0) poison_lines<kRows>(ds[0], broken, acc[0]);
    }
  }

  // dq, and each row's part of the slope's gradient; or dk and dv.
  __device__ void store() {
    const float scale = static_cast<float>(p.scale);
    const float kept = p.dropout.threshold != 0 ? static_cast<float>(p.dropout_scale) : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = own.first_line + warp_line + static_cast<int>(threadIdx.x % 32) / 4 + 8 * half;
      const bool inside = line < (kTransposed ? own.keys : own.rows);
      const int64_t row = kTransposed ? own.batch * p.key_stride[0] + own.group * p.key_stride[1] + own.k_begin + line
                                      : operands.statistics(head) + line;
      if constexpr (kOfScores) {
        T* to = static_cast<T*>(kTransposed ? p.dk : p.dq) + row * p.head_dim;
        store_line<T>(acc[0], half, scale, inside, to, static_cast<int>(p.head_dim), p.head_dim % 8 == 0);
      }
      if constexpr (kOfValues) {
        T* to = static_cast<T*>(p.dv) + row * p.head_dim_v;
        store_line<T>(acc_v[0], half, kept, inside, to, static_cast<int>(p.head_dim_v), p.head_dim_v % 8 == 0);
      }
      if constexpr (kGeneral && !kTransposed) {
        if (p.slope_rows == nullptr) continue;
        const float total = quad_reduce(distances[half], [](float x, float y) { return x + y; });
        if (inside && threadIdx.x % 4 == 0) static_cast<float*>(p.slope_rows)[row] = total;
      }
    }
  }
};

// Blocks of a multiprocessor that ptxas is told of; 0: it is not. Left alone it spills dq's kernel of 96 channels for a
// second block on sm_120, told of one that of dk and dv of 128.
constexpr int told_blocks(Sm80Gradient of) { return of == Sm80Gradient::kQueries ? 1 : 0; }

template <class T, int kD, bool kGeneral, Sm80Gradient kOf>
__global__ void __launch_bounds__(BackwardSm80<kD>::kThreads, told_blocks(kOf))
    attention_sm80_backward_kernel(const __grid_constant__ AttentionSm80BackwardCall p) {
  using Block = BackwardSm80Block<T, kD, kGeneral, kOf>;
  note_dynamic_shared<BackwardSm80<kD>::kSharedBytes>();
  const AttentionTile own =
      Block::kTransposed ? key_tile(p, p.key_tiling, blockIdx.x) : attention_tile(p, p.tiling, blockIdx.x);
  if (own.first_line >= (Block::kTransposed ? own.keys : own.rows)) return;
  Block block(p, own);
  block.load_fixed();
  block.load_moving(0, 0);
  const int steps = block.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    block.load_moving(step + 1, (step + 1) % 2);
    cp_async_wait<1>();
    __syncthreads();
    block.add(step, step % 2);
    __syncthreads();
  }
  cp_async_wait<0>();
  block.store();
}

}  // namespace cuda
}  // namespace fastattn
