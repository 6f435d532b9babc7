// Attention of a few queries to many keys (decoding) on CUDA: the kernels. Contract of the tensors: AttentionParams in
// cpu/params.h; parts and slots: attention_decode_parts.cuh.
//
// Bound by reading keys and values. The keys of a sequence are cut into parts, a block each; a tile has the queries of
// all heads that read one key head, so that K and V are read once for 16 of those: line r is query r / group of head
// r % group. A part leaves acc, l and m of the online softmax, and a second kernel merges them in order ("Flash-
// Decoding", Dao et al., 2023):
//   m = max_t m_t;  l = sum_t 2^(m_t - m) l_t;  out = sum_t 2^(m_t - m) acc_t / l;  lse = m ln 2 + ln l
// A sink enters there, once. Parts depend on the sequence's own length alone, so that its bits do not depend on the
// batch around it, nor on the device.
//
// Within a part every warp takes the tiles w, w + kWarps, ... of 16 keys through a ring of shared memory that is its
// own: cp.async in 16-byte pieces, kSlots - 1 tiles of K or V under way, no barrier wider than the warp. Scores and
// outputs of 16-bit types are mma.m16n8k16 products; float32 is exact, on the same fragments without tensor cores. The
// warps' sums are merged in order at the end, in the same memory.
//
// Budget: 64 KiB of ring and 16 lines of Q, at most 81 KiB, which every chip since sm_80 has; kD / 2 accumulators a
// thread.
#pragma once

#include "cuda/attention_decode_math.cuh"
#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {

// Where line `line` of a block is: row, head, and its cell in p.sums.
struct DecodeLine {
  int64_t row, head, cell;
};
__device__ inline DecodeLine decode_line(const DecodeParams& p, int64_t slot, int head_kv, int line) {
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const int64_t row = line / group, head = int64_t{head_kv} * group + line % group;
  return {row, head, (slot * p.heads + head) * p.part_rows + row};
}

// What the score of a line needs beside its products, kept in shared memory: registers are for accumulators.
struct alignas(16) DecodeScore {
  int64_t mask;  // where its row of the mask begins, in elements
  float slope;
  int row;
};

// Thread i < 16 writes what line i needs.
__device__ inline void store_line_score(const DecodeParams& p, const Sequence& own, int64_t sequence, int head_kv,
                                        int first_line, DecodeScore* lines) {
  if (threadIdx.x >= kDecodeLines) return;
  const DecodeLine at = decode_line(p, 0, head_kv, first_line + static_cast<int>(threadIdx.x));
  DecodeScore line{0, 0.0f, static_cast<int>(at.row)};
  if (p.slopes != nullptr) line.slope = static_cast<const float*>(p.slopes)[sequence * p.slopes_stride_batch + at.head];
  // A line past the last row of the sequence reads the mask of row 0.
  line.mask =
      sequence * p.mask_stride[0] + at.head * p.mask_stride[1] + (at.row < own.rows ? at.row : 0) * p.mask_stride[2];
  lines[threadIdx.x] = line;
}

// softcap, ALiBi and mask of a product; whether the mask leaves the key.
template <class T>
__device__ inline bool general_score(const DecodeParams& p, const DecodeScore& line, int diagonal, int key, int stop,
                                     float* x) {
  float value = *x * static_cast<float>(p.scale);
  if (p.softcap > 0) {
    const float cap = static_cast<float>(p.softcap);
    value = cap * tanhf(value / cap);
  }
  value -= line.slope * fabsf(static_cast<float>(line.row + diagonal - key));
  bool visible = true;
  if (p.mask != nullptr && key < stop) {
    const int64_t at = line.mask + key * p.mask_stride[3];
    if (p.mask_dtype == DType::kBool) {
      visible = static_cast<const uint8_t*>(p.mask)[at] != 0;
    } else {
      const float bias = p.mask_dtype == DType::kFloat32 ? static_cast<const float*>(p.mask)[at]
                                                         : widen(static_cast<const T*>(p.mask)[at]);
      visible = bias != -INFINITY;
      value += bias;
    }
  }
  *x = value * kLog2E;
  return visible;
}

// Products of 16 lines and keys [key, key + 16) to scores in base 2; with kTested -inf where a key is not visible.
// Returns bit 4 tile + e where s[tile][e] is.
template <class T, bool kGeneral, bool kTested>
__device__ inline unsigned finish_scores(const DecodeParams& p, const DecodeScore* lines, int diagonal, int first,
                                         int stop, float (&s)[2][4]) {
  unsigned seen = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const DecodeScore line = lines[threadIdx.x % 32 / 4 + 8 * half];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = first + j / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + j % 2;
      float& x = s[j / 2][2 * half + j % 2];
      bool visible = true;
      if constexpr (kGeneral) {
        visible = general_score<T>(p, line, diagonal, key, stop, &x);
      } else {
        x *= static_cast<float>(p.scale) * kLog2E;
      }
      if constexpr (kTested) {
        const int distance = key - line.row - diagonal;
        visible = visible && key < stop && (p.window_left < 0 || distance >= -p.window_left) &&
                  (p.window_right < 0 || distance <= p.window_right);
        x = visible ? x : -INFINITY;
        seen |= static_cast<unsigned>(visible) << (j / 2 * 4 + 2 * half + j % 2);
      }
    }
  }
  return seen;
}

__device__ inline void store_zero(char* chunk) { *reinterpret_cast<Packed<float>*>(chunk) = {}; }

// A warp's ring: tiles of 16 keys, K and V of each in turn.
template <class T, int kD>
class DecodeRing {
 public:
  using Tile = DecodeTile<T, kD>;

  // Tiles begin, begin + step, ... of 16 keys from `first` on; keys from `stop` on load as zero.
  __device__ DecodeRing(const DecodeParams& p, const Sequence& own, int64_t sequence, int head_kv, int first, int stop,
                        char* memory)
      : p_(p),
        memory_(memory),
        sequence_(static_cast<int>(sequence)),
        head_(head_kv),
        k_begin_(static_cast<int>(own.k_begin)),
        first_fresh_(static_cast<int>(own.keys - own.rows)),
        next_(first),
        stop_(stop) {
    // Chunks past the last channel stay zero: no copy touches them.
    for (int i = threadIdx.x % 32; i < Tile::kSlots * kDecodeKeys * Tile::kChunks; i += 32) {
      const int line = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const int64_t channels = line / kDecodeKeys % 2 == 0 ? p.head_dim : p.head_dim_v;
      if (chunk * Tile::kVector >= channels) {
        store_zero(memory_ + line / kDecodeKeys * Tile::kTileBytes +
                   tile_offset<Tile::kChunks>(line % kDecodeKeys, chunk));
      }
    }
    look_up();
  }

  // Starts the copy of the next tile, K and V in turn; every call is one group of cp.async, an empty one at the end.
  __device__ void issue() {
    if (next_ < stop_) {
      const int key = next_ + static_cast<int>(threadIdx.x % 16);
      const bool is_k = issued_ % 2 == 0;
      const T* row = key < stop_ ? row_of(key, is_k) : nullptr;
      char* tile = memory_ + issued_ % Tile::kSlots * Tile::kTileBytes;
      if (p_.aligned) {
        copy(row, is_k ? p_.head_dim : p_.head_dim_v, tile);
      } else {
        copy_elements(row, is_k ? p_.head_dim : p_.head_dim_v, tile);
      }
      if (!is_k) {
        next_ += Tile::kWarps * kDecodeKeys;
        look_up();
      }
    }
    ++issued_;
    cp_async_commit();
  }

  // The oldest tile, once it has arrived; the slot of the tile before it is filled anew.
  __device__ char* take() {
    cp_async_wait<Tile::kSlots - 2>();
    __syncwarp();
    char* tile = memory_ + taken_++ % Tile::kSlots * Tile::kTileBytes;
    issue();
    return tile;
  }

 private:
  // The page of the lane's key in the next tile, a tile before it is needed.
  __device__ void look_up() {
    const int key = next_ + static_cast<int>(threadIdx.x % 16);
    if (p_.block_table == nullptr || key >= stop_) return;
    page_ = p_.block_table[sequence_ * p_.max_pages + key / static_cast<int>(p_.page_size)];
  }

  __device__ const T* row_of(int key, bool is_k) const {
    if (p_.fresh_k != nullptr && key >= first_fresh_) {
      const int64_t (&stride)[3] = is_k ? p_.fresh_k_stride : p_.fresh_v_stride;
      return static_cast<const T*>(is_k ? p_.fresh_k : p_.fresh_v) + sequence_ * stride[0] + head_ * stride[1] +
             (key - first_fresh_) * stride[2];
    }
    const int64_t (&stride)[3] = is_k ? p_.k_stride : p_.v_stride;
    const T* base = static_cast<const T*>(is_k ? p_.k : p_.v) + head_ * stride[1];
    if (p_.block_table != nullptr) return base + page_ * stride[0] + key % static_cast<int>(p_.page_size) * stride[2];
    return base + sequence_ * stride[0] + (int64_t{k_begin_} + key) * stride[2];
  }

  static __device__ const T* row_of_lane(const T* row, int lane) {
    return reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), lane));
  }

  __device__ void copy(const T* row, int64_t channels, char* tile) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Tile::kChunks / 2; ++i) {
      const int line = (i * 32 + lane) / Tile::kChunks, chunk = (i * 32 + lane) % Tile::kChunks;
      const T* from = row_of_lane(row, line);
      const int left = static_cast<int>(channels) - chunk * Tile::kVector;
      const int bytes = from == nullptr ? 0 : left < Tile::kVector ? left * static_cast<int>(sizeof(T)) : 16;
      if (left > 0) {
        cp_async16(tile + tile_offset<Tile::kChunks>(line, chunk),
                   from == nullptr ? static_cast<const T*>(p_.k) : from + chunk * Tile::kVector, bytes);
      }
    }
  }

  __device__ void copy_elements(const T* row, int64_t channels, char* tile) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < Tile::kChunks / 2; ++i) {
      const int line = (i * 32 + lane) / Tile::kChunks, chunk = (i * 32 + lane) % Tile::kChunks;
      const T* from = row_of_lane(row, line);
      Packed<T> values = {};
      if (from != nullptr) values = load_packed(from, chunk * Tile::kVector, static_cast<int>(channels), false);
      *reinterpret_cast<Packed<T>*>(tile + tile_offset<Tile::kChunks>(line, chunk)) = values;
    }
  }

  const DecodeParams& p_;
  char* memory_;
  const int sequence_, head_, k_begin_, first_fresh_;
  int next_;
  const int stop_;
  int issued_ = 0, taken_ = 0;
  int page_ = 0;
};

// m, l and acc of a warp's lines; m and l of line g + 8 i are [i]. l is the thread's own share until `join`.
template <class T, int kD>
struct DecodeState {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
  float acc[kD / 8][4] = {};

  // One step of the online softmax: scores in base 2 to the weights of their values.
  __device__ void fold(float (&s)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float m_new = fmaxf(m[half], highest);
      // A line that has seen nothing yet keeps m = -inf; subtracting 0 instead gives 2^-inf = 0.
      const float shift = m_new == -INFINITY ? 0.0f : m_new;
      const float alpha = exp2f(m[half] - shift);
      m[half] = m_new;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = s[j / 2][2 * half + j % 2];
        x = exp2f(x - shift);
        sum += x;
      }
      l[half] = l[half] * alpha + sum;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) acc[n][2 * half] *= alpha, acc[n][2 * half + 1] *= alpha;
    }
  }

  __device__ void join() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 1);
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 2);
    }
  }
};

// In a product 0 · NaN is NaN. So keys whose values hold a NaN or an infinity leave the tile, and the lines that see
// such a key become NaN. `seen` is that of finish_scores.
template <class T, int kD>
__device__ inline void guard_values(char* v, unsigned seen, float (&acc)[kD / 8][4]) {
  using Tile = DecodeTile<T, kD>;
  const int lane = threadIdx.x % 32;
  bool broken = false;
#pragma unroll 1
  for (int chunk = lane / 16; chunk < Tile::kChunks; chunk += 2) {
    const auto* values = reinterpret_cast<const Packed<T>*>(v + tile_offset<Tile::kChunks>(lane % 16, chunk));
#pragma unroll
    for (int e = 0; e < Tile::kVector; ++e) {
      const float x = widen(values->value[e]);
      broken = broken || !(x - x == 0);
    }
  }
  const unsigned halves = __ballot_sync(0xffffffffu, broken), keys = (halves | halves >> 16) & 0xffffu;
  if (keys == 0) return;
  if (keys >> lane % 16 & 1) {
    for (int chunk = lane / 16; chunk < Tile::kChunks; chunk += 2) {
      store_zero(v + tile_offset<Tile::kChunks>(lane % 16, chunk));
    }
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int poisoned = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = j / 2 * 8 + lane % 4 * 2 + j % 2;
      poisoned |= static_cast<int>(seen >> (j / 2 * 4 + 2 * half + j % 2) & keys >> key & 1);
    }
    poisoned |= __shfl_xor_sync(0xffffffffu, poisoned, 1);
    poisoned |= __shfl_xor_sync(0xffffffffu, poisoned, 2);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      acc[n][2 * half] += poisoned ? NAN : 0.0f, acc[n][2 * half + 1] += poisoned ? NAN : 0.0f;
    }
  }
}

// acc, l and m of the block's lines from those of its warps, which take the place of their rings.
template <class T, int kD>
__device__ inline void merge_warps(const DecodeParams& p, const DecodeState<T, kD>& state, int64_t rows, int64_t slot,
                                   int head_kv, int first_line, char* memory) {
  using Tile = DecodeTile<T, kD>;
  constexpr int kLines = kDecodeLines;
  float* acc = reinterpret_cast<float*>(memory);
  float* m = reinterpret_cast<float*>(memory + Tile::kRingBytes + Tile::kTileBytes);
  float* l = m + Tile::kWarps * kLines;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int line = warp * kLines + lane / 4 + 8 * half;
    if (lane % 4 == 0) m[line] = state.m[half], l[line] = state.l[half];
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      acc[line * kD + 8 * n + lane % 4 * 2] = state.acc[n][2 * half];
      acc[line * kD + 8 * n + lane % 4 * 2 + 1] = state.acc[n][2 * half + 1];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kLines * kD; i += Tile::kThreads) {
    const int line = i / kD, channel = i % kD;
    const DecodeLine at = decode_line(p, slot, head_kv, first_line + line);
    if (at.row >= rows || channel >= p.head_dim_v) continue;
    float highest = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) highest = fmaxf(highest, m[w * kLines + line]);
    const float shift = highest == -INFINITY ? 0.0f : highest;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      const float factor = exp2f(m[w * kLines + line] - shift);
      sum += factor * l[w * kLines + line];
      value += factor * acc[(w * kLines + line) * kD + channel];
    }
    p.acc[at.cell * p.head_dim_v + channel] = value;
    if (channel == 0) p.sums[at.cell] = sum, p.sums[p.slots * p.heads * p.part_rows + at.cell] = highest;
  }
}

template <class T, int kD>
__device__ inline void load_lines(const DecodeParams& p, const Sequence& own, int64_t sequence, int head_kv,
                                  int first_line, char* q) {
  using Tile = DecodeTile<T, kD>;
  const bool aligned = p.aligned && p.head_dim % Tile::kVector == 0;
  for (int i = threadIdx.x; i < kDecodeLines * Tile::kChunks; i += Tile::kThreads) {
    const int line = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const DecodeLine at = decode_line(p, 0, head_kv, first_line + line);
    Packed<T> values = {};
    if (at.row < own.rows) {
      const T* row = static_cast<const T*>(p.q) + sequence * p.q_stride[0] + at.head * p.q_stride[1] +
                     (own.q_begin + at.row) * p.q_stride[2];
      values = load_packed(row, chunk * Tile::kVector, static_cast<int>(p.head_dim), aligned);
    }
    *reinterpret_cast<Packed<T>*>(q + tile_offset<Tile::kChunks>(line, chunk)) = values;
  }
}

// Writes this call's own keys and values among [begin, stop) to the cache, which nobody reads them from.
template <class T>
__device__ inline void append_fresh(const DecodeParams& p, const Sequence& own, int64_t sequence, int head_kv,
                                    int64_t begin, int64_t stop, int threads) {
  const int64_t first = own.keys - own.rows;
  for (int64_t key = first > begin ? first : begin; key < stop; ++key) {
    int64_t entry = sequence, line = own.k_begin + key;
    if (p.block_table != nullptr) {
      entry = p.block_table[sequence * p.max_pages + key / p.page_size], line = key % p.page_size;
    }
    const auto copy = [&](const void* from, const int64_t (&from_stride)[3], const void* to, const int64_t (&stride)[3],
                          int64_t channels) {
      const T* source = static_cast<const T*>(from) + sequence * from_stride[0] + head_kv * from_stride[1] +
                        (key - first) * from_stride[2];
      T* target = static_cast<T*>(const_cast<void*>(to)) + entry * stride[0] + head_kv * stride[1] + line * stride[2];
      for (int64_t channel = threadIdx.x; channel < channels; channel += threads) target[channel] = source[channel];
    };
    copy(p.fresh_k, p.fresh_k_stride, p.k, p.k_stride, p.head_dim);
    copy(p.fresh_v, p.fresh_v_stride, p.v, p.v_stride, p.head_dim_v);
  }
}

// acc, l and m of one part of the keys for 16 lines of one key head. A block: (slot, key head, tile of lines), lines
// fastest, so that blocks that read the same keys run together.
template <class T, int kD, bool kGeneral>
__global__ void __launch_bounds__(DecodeTile<T, kD>::kThreads, 1) attention_decode_kernel(DecodeParams p) {
  using Tile = DecodeTile<T, kD>;
  note_dynamic_shared<Tile::kSharedBytes>();
  char* memory = dynamic_shared();
  const int first_line = static_cast<int>(blockIdx.x % p.tiles) * kDecodeLines;
  const int head_kv = static_cast<int>(blockIdx.x / p.tiles % p.heads_kv);
  const int64_t slot = blockIdx.x / p.tiles / p.heads_kv;
  const DecodePart part = part_of_slot(p, slot);
  const Sequence own = decode_sequence(p, part.sequence);
  const int64_t length = part_length(own.keys), group = p.heads / p.heads_kv;
  const int64_t part_begin = part.index * length,
                part_stop = part_begin + length < own.keys ? part_begin + length : own.keys;
  const int64_t first_row = first_line / group, past_row = (first_line + kDecodeLines - 1) / group;
  if (part.index < 0 || part_begin >= part_stop || first_row >= own.rows || own.rows > kDecodeRows) return;

  if (p.fresh_k != nullptr && first_line == 0) {
    append_fresh<T>(p, own, part.sequence, head_kv, part_begin, part_stop, Tile::kThreads);
  }
  const int64_t last_row = past_row < own.rows ? past_row : own.rows - 1;
  const DecodeSpan span = decode_span(p, own, first_row, last_row, part_begin, part_stop);
  const int warp = threadIdx.x / 32;
  char* q = memory + Tile::kRingBytes;
  const int first = span.begin + warp * kDecodeKeys;
  DecodeRing<T, kD> ring(p, own, part.sequence, head_kv, first, span.stop,
                         memory + warp * Tile::kSlots * Tile::kTileBytes);
  for (int i = 0; i < Tile::kSlots - 1; ++i) ring.issue();
  load_lines<T, kD>(p, own, part.sequence, head_kv, first_line, q);
  auto* lines = reinterpret_cast<DecodeScore*>(q + Tile::kTileBytes + Tile::kSumBytes);
  store_line_score(p, own, part.sequence, head_kv, first_line, lines);
  __syncthreads();

  const int diagonal = static_cast<int>(own.diagonal);
  DecodeState<T, kD> state;
  for (int key = first; key < span.stop; key += Tile::kWarps * kDecodeKeys) {
    float s[2][4];
    DecodeProducts<T, kD>::scores(q, ring.take(), s);
    const bool tested = key < span.full_begin || key + kDecodeKeys > span.full_stop;
    unsigned seen = 0;
    if (tested) {
      seen = finish_scores<T, kGeneral, true>(p, lines, diagonal, key, span.stop, s);
    } else {
      finish_scores<T, kGeneral, false>(p, lines, diagonal, key, span.stop, s);
    }
    state.fold(s);
    char* v = ring.take();
    if (tested) guard_values<T, kD>(v, seen, state.acc);
    DecodeProducts<T, kD>::accumulate(s, v, state.acc);
  }
  state.join();
  cp_async_wait<0>();
  __syncthreads();
  merge_warps<T, kD>(p, state, own.rows, slot, head_kv, first_line, memory);
}

constexpr int kCombineThreads = 128;

// out and lse of one row of a head from its parts. A block: (sequence, head, row), rows fastest. With packed queries
// rows of longer sequences are left alone, else rows that no sequence has get zeros and -inf.
template <class T>
__global__ void __launch_bounds__(kCombineThreads, 1) attention_combine_kernel(DecodeParams p) {
  __shared__ float m_part[kMostParts], l_part[kMostParts], factor[kMostParts];
  const int64_t head = blockIdx.x / p.part_rows % p.heads, sequence = blockIdx.x / p.part_rows / p.heads;
  const Sequence own = decode_sequence(p, sequence);
  int64_t row = blockIdx.x % p.part_rows;
  if (p.q_packed) {
    if (own.rows > kDecodeRows || row >= own.rows) return;
  } else {
    row -= own.q_begin;
  }
  const int count = row >= 0 && row < own.rows ? static_cast<int>(parts_of(own.keys)) : 0;
  const int64_t step = p.heads * p.part_rows, thread = threadIdx.x;
  const int64_t cell = first_slot(p, sequence, own.k_begin) * step + head * p.part_rows + row;
  if (thread < count) {
    m_part[thread] = p.sums[p.slots * step + cell + thread * step];
    l_part[thread] = p.sums[cell + thread * step];
  }
  __syncthreads();
  const bool sinks = p.sinks != nullptr && row >= 0 && row < own.rows;
  const float sink = sinks ? static_cast<const float*>(p.sinks)[head] * kLog2E : -INFINITY;
  float m = sink;
  for (int i = 0; i < count; ++i) m = fmaxf(m, m_part[i]);
  const float shift = m == -INFINITY ? 0.0f : m;
  if (thread < count) factor[thread] = exp2f(m_part[thread] - shift);
  __syncthreads();
  float l = exp2f(sink - shift);
  for (int i = 0; i < count; ++i) l += factor[i] * l_part[i];
  const float inverse = l == 0 ? 0.0f : 1 / l;
  T* out = static_cast<T*>(p.out) + sequence * p.out_stride[0] + head * p.out_stride[1] +
           (own.q_begin + row) * p.out_stride[2];
  for (int64_t channel = thread; channel < p.head_dim_v; channel += kCombineThreads) {
    const float* acc = p.acc + cell * p.head_dim_v + channel;
    float value = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) value += factor[i] * acc[i * step * p.head_dim_v];
    narrow(value * inverse, out + channel);
  }
  if (thread == 0 && p.lse != nullptr) {
    static_cast<float*>(p.lse)[sequence * p.row_stride[0] + head * p.row_stride[1] + own.q_begin + row] =
        l == 0 ? -INFINITY : m * kLn2 + logf(l);
  }
}

inline bool starts_aligned(const void* x, const int64_t (&stride)[3], int64_t vector) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride[0] % vector == 0 && stride[1] % vector == 0 &&
         stride[2] % vector == 0;
}

template <class T, int kD, class Launch>
inline void launch_decode_kernel(const DecodeParams& p, Launch&& launch) {
  using Tile = DecodeTile<T, kD>;
  const LaunchConfig config{p.slots * p.heads_kv * p.tiles, Tile::kThreads, Tile::kSharedBytes};
  if (p.mask != nullptr || p.slopes != nullptr || p.softcap > 0) {
    launch("attention_decode", attention_decode_kernel<T, kD, true>, config, p);
  } else {
    launch("attention_decode", attention_decode_kernel<T, kD, false>, config, p);
  }
}

template <class T, class Launch>
inline void launch_attention_decode(DecodeParams p, Launch&& launch) {
  constexpr int64_t kVector = 16 / sizeof(T);
  p.aligned = starts_aligned(p.q, p.q_stride, kVector) && starts_aligned(p.k, p.k_stride, kVector) &&
              starts_aligned(p.v, p.v_stride, kVector) && starts_aligned(p.fresh_k, p.fresh_k_stride, kVector) &&
              starts_aligned(p.fresh_v, p.fresh_v_stride, kVector);
  const int64_t widest = std::max(p.head_dim, p.head_dim_v);
  if (p.slots == 0 || p.tiles == 0) {
  } else if (widest <= 64) {
    launch_decode_kernel<T, 64>(p, launch);
  } else if (widest <= 128) {
    launch_decode_kernel<T, 128>(p, launch);
  } else {
    launch_decode_kernel<T, 256>(p, launch);
  }
  const int64_t rows = p.part_rows * p.heads * p.batch;
  if (rows > 0) launch("attention_combine", attention_combine_kernel<T>, LaunchConfig{rows, kCombineThreads}, p);
}

}  // namespace cuda
}  // namespace fastattn
