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

// A line of a block, kept in shared memory, since registers are for accumulators: where it lies and which keys it sees.
// One past the last row sees none.
struct alignas(16) DecodeLine {
  ScoreLine at;
  KeyRange seen;
};

// Thread i < 16 writes line i of the tile; of the keys those before `end`.
__device__ inline void store_lines(const DecodeParams& p, const AttentionTile& own, int end, DecodeLine* lines) {
  if (threadIdx.x >= kDecodeLines) return;
  const int group = static_cast<int>(p.heads / p.heads_kv), line = own.first_line + static_cast<int>(threadIdx.x);
  const ScoreLine at = {line / group, own.group * group + line % group};
  KeyRange seen = at.row < own.rows ? keys_of_row(p, own, at.row) : KeyRange{0, 0};
  seen.end = seen.end < end ? seen.end : end;
  lines[threadIdx.x] = {at, seen};
}

// The row of `at` in p.sums.
__device__ inline int64_t cell_of(const DecodeParams& p, int64_t slot, const ScoreLine& at) {
  return (slot * p.heads + at.head) * p.part_rows + at.row;
}

__device__ inline void store_zero(char* chunk) { *reinterpret_cast<Packed<float>*>(chunk) = {}; }

// A warp's ring: tiles of 16 keys, K and V of each in turn.
template <class T, int kD>
class DecodeRing {
 public:
  using Tile = DecodeTile<T, kD>;

  // Tiles begin, begin + step, ... of 16 keys from `first` on; keys from `stop` on load as zero.
  __device__ DecodeRing(const DecodeParams& p, const AttentionTile& own, int first, int stop, char* memory)
      : p_(p),
        memory_(memory),
        sequence_(own.batch),
        head_(own.group),
        k_begin_(own.k_begin),
        first_fresh_(own.keys - own.rows),
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
    // More at a time, and sm_120 spills 256 channels of float32.
#pragma unroll 8
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

// In a product 0 · NaN is NaN. So keys whose values hold a NaN or an infinity leave the tile, and the lines with a
// weight on such a key become NaN.
template <class T, int kD>
__device__ inline void guard_values(char* v, const float (&weight)[8], float (&acc)[kD / 2]) {
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
  float add[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if ((keys >> key & 1) != 0 && weight[i] != 0) add[i / 2 % 2] = NAN;
  }
#pragma unroll
  for (int line = 0; line < 2; ++line) add[line] = quad_reduce(add[line], [](float x, float y) { return x + y; });
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) acc[i] += add[i / 2 % 2];
}

// acc, l and m of the block's lines from those of its warps, which take the place of their rings. m in base 2.
template <class T, int kD>
__device__ inline void merge_warps(const DecodeParams& p, const SoftmaxState& state, const float (&sums)[kD / 2],
                                   float unit, int64_t slot, int rows, const DecodeLine* lines, char* memory) {
  using Tile = DecodeTile<T, kD>;
  constexpr int kLines = kDecodeLines;
  float* acc = reinterpret_cast<float*>(memory);
  float* m = reinterpret_cast<float*>(memory + Tile::kRingBytes + Tile::kTileBytes);
  float* l = m + Tile::kWarps * kLines;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int line = warp * kLines + lane / 4 + 8 * half;
    const float total = quad_reduce(state.l[half], [](float x, float y) { return x + y; });
    if (lane % 4 == 0) m[line] = state.m[half] == kHidden ? kHidden : state.m[half] * unit, l[line] = total;
#pragma unroll
    for (int i = 2 * half; i < kD / 2; i += i % 2 == 0 ? 1 : 3) {
      acc[line * kD + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kLines * kD; i += Tile::kThreads) {
    const int line = i / kD, channel = i % kD;
    const ScoreLine at = lines[line].at;
    if (at.row >= rows || channel >= p.head_dim_v) continue;
    float highest = kHidden, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) highest = fmaxf(highest, m[w * kLines + line]);
    const float shift = highest == kHidden ? 0.0f : highest;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      const float factor = exp2_fast(m[w * kLines + line] - shift);
      sum += factor * l[w * kLines + line];
      value += factor * acc[(w * kLines + line) * kD + channel];
    }
    const int64_t cell = cell_of(p, slot, at);
    p.acc[cell * p.head_dim_v + channel] = value;
    if (channel == 0) p.sums[cell] = sum, p.sums[p.slots * p.heads * p.part_rows + cell] = highest;
  }
}

template <class T, int kD>
__device__ inline void load_queries(const DecodeParams& p, const AttentionTile& own, const DecodeLine* lines, char* q) {
  using Tile = DecodeTile<T, kD>;
  const bool aligned = p.aligned && p.head_dim % Tile::kVector == 0;
  for (int i = threadIdx.x; i < kDecodeLines * Tile::kChunks; i += Tile::kThreads) {
    const int line = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const ScoreLine at = lines[line].at;
    Packed<T> values = {};
    if (at.row < own.rows) {
      const T* row = static_cast<const T*>(p.q) + own.batch * p.q_stride[0] + at.head * p.q_stride[1] +
                     (int64_t{own.q_begin} + at.row) * p.q_stride[2];
      values = load_packed(row, chunk * Tile::kVector, static_cast<int>(p.head_dim), aligned);
    }
    *reinterpret_cast<Packed<T>*>(q + tile_offset<Tile::kChunks>(line, chunk)) = values;
  }
}

// Writes this call's own keys and values of a part to the cache, which nobody reads them from.
template <class T>
__device__ inline void append_fresh(const DecodeParams& p, const AttentionTile& own, KeyRange part, int threads) {
  const int first = own.keys - own.rows;
  for (int key = first > part.begin ? first : part.begin; key < part.end; ++key) {
    int64_t entry = own.batch, line = int64_t{own.k_begin} + key;
    if (p.block_table != nullptr) {
      entry = p.block_table[own.batch * p.max_pages + key / p.page_size], line = key % p.page_size;
    }
    const auto copy = [&](const void* from, const int64_t (&from_stride)[3], const void* to, const int64_t (&stride)[3],
                          int64_t channels) {
      const T* source = static_cast<const T*>(from) + own.batch * from_stride[0] + own.group * from_stride[1] +
                        (key - first) * from_stride[2];
      T* target = static_cast<T*>(const_cast<void*>(to)) + entry * stride[0] + own.group * stride[1] + line * stride[2];
      for (int64_t channel = threadIdx.x; channel < channels; channel += threads) target[channel] = source[channel];
    };
    copy(p.fresh_k, p.fresh_k_stride, p.k, p.k_stride, p.head_dim);
    copy(p.fresh_v, p.fresh_v_stride, p.v, p.v_stride, p.head_dim_v);
  }
}

// acc, l and m of one part of the keys for 16 lines of one key head. A block: (slot, key head, tile of lines), lines
// fastest, so that blocks that read the same keys run together.
template <class T, int kD, class Scores>
__global__ void __launch_bounds__(DecodeTile<T, kD>::kThreads, 1)
    attention_decode_kernel(const __grid_constant__ DecodeParams p) {
  using Tile = DecodeTile<T, kD>;
  note_dynamic_shared<Tile::kSharedBytes>();
  char* memory = dynamic_shared();
  const int64_t slot = blockIdx.x / p.tiles / p.heads_kv;
  const DecodePart place = part_of_slot(p, slot);
  const AttentionTile own =
      tile_of_sequence(p, static_cast<int>(place.sequence), static_cast<int>(blockIdx.x / p.tiles % p.heads_kv),
                       static_cast<int>(blockIdx.x % p.tiles) * kDecodeLines);
  const KeyRange part = keys_of_part(place.index, own.keys);
  const int group = static_cast<int>(p.heads / p.heads_kv);
  const int first_row = own.first_line / group, past_row = (own.first_line + kDecodeLines - 1) / group;
  if (part.begin >= part.end || first_row >= own.rows || own.rows > kDecodeRows) return;

  if (p.fresh_k != nullptr && own.first_line == 0) append_fresh<T>(p, own, part, Tile::kThreads);
  const int last_row = past_row < own.rows ? past_row : own.rows - 1;
  const KeyRange span = decode_span(p, own, first_row, last_row, part);
  const KeyRange seen_by_all = keys_of_all(p, own, first_row, last_row);
  const int warp = threadIdx.x / 32, first = span.begin + warp * kDecodeKeys;
  char* q = memory + Tile::kRingBytes;
  auto* lines = reinterpret_cast<DecodeLine*>(q + Tile::kTileBytes + Tile::kSumBytes);
  store_lines(p, own, span.end, lines);
  DecodeRing<T, kD> ring(p, own, first, span.end, memory + warp * Tile::kSlots * Tile::kTileBytes);
  for (int i = 0; i < Tile::kSlots - 1; ++i) ring.issue();
  __syncthreads();
  load_queries<T, kD>(p, own, lines, q);
  __syncthreads();

  const float unit = Scores::unit(p);
  SoftmaxState state;
  float acc[kD / 2] = {};
  for (int key = first; key < span.end; key += Tile::kWarps * kDecodeKeys) {
    float s[8], factor[2];
    DecodeProducts<T, kD>::scores(q, ring.take(), s);
    const bool edge = key < seen_by_all.begin || key + kDecodeKeys > seen_by_all.end || key + kDecodeKeys > span.end ||
                      (Scores::kGeneral && p.mask != nullptr);
    if (Scores::kGeneral || edge) {
      const DecodeLine *upper = lines + threadIdx.x % 32 / 4, *lower = upper + 8;
      const KeyRange seen[2] = {upper->seen, lower->seen};
      if constexpr (Scores::kGeneral) {
        const ScoreLine at[2] = {upper->at, lower->at};
        finish_scores(p, own, at, seen, key, s);
      }
      if (edge) hide_unseen(s, seen, key);
    }
    state.step(s, unit, factor);
    scale_lines(acc, factor);
    char* v = ring.take();
    if (edge) guard_values<T, kD>(v, s, acc);
    DecodeProducts<T, kD>::accumulate(s, v, acc);
  }
  cp_async_wait<0>();
  __syncthreads();
  merge_warps<T, kD>(p, state, acc, unit, slot, own.rows, lines, memory);
}

constexpr int kCombineThreads = 128;

// out and lse of one row of a head from its parts. A block: (sequence, head, row), rows fastest. With packed queries
// rows of longer sequences are left alone, else rows that no sequence has get zeros and -inf.
template <class T>
__global__ void __launch_bounds__(kCombineThreads, 1) attention_combine_kernel(const __grid_constant__ DecodeParams p) {
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
  const int64_t cell = first_part_slot(p, sequence, own.k_begin) * step + head * p.part_rows + row;
  if (thread < count) {
    m_part[thread] = p.sums[p.slots * step + cell + thread * step];
    l_part[thread] = p.sums[cell + thread * step];
  }
  __syncthreads();
  const bool sinks = p.sinks != nullptr && row >= 0 && row < own.rows;
  const float sink = sinks ? static_cast<const float*>(p.sinks)[head] * kLog2E : kHidden;
  float m = sink;
  for (int i = 0; i < count; ++i) m = fmaxf(m, m_part[i]);
  const float shift = m == kHidden ? 0.0f : m;
  if (thread < count) factor[thread] = exp2_fast(m_part[thread] - shift);
  __syncthreads();
  float l = exp2_fast(sink - shift);
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
        l == 0 ? kHidden : m * kLn2 + logf(l);
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
  const auto kernel = PlainScores::takes(p) ? attention_decode_kernel<T, kD, PlainScores>
                                            : attention_decode_kernel<T, kD, GeneralScores>;
  launch("attention_decode", kernel, config, p);
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
