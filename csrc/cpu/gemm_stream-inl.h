// A few rows times a transposed matrix, C (+)= A·Bᵀ with the rows of `bt` (nn.Linear's weight) along k: decoding a
// token.
//
// The weight is read once, from memory, and that is all the time there is: nothing of it is packed; squares of it turn
// over in registers and are multiplied there, or its rows are the left operand of a tile product. Every sum is formed
// in the packed product's order (k blocks of depth_block), so that a row's result has the same bits whichever of the
// two computes it. The hardware does not follow a square's rows by itself: fetching the next squares' rows meanwhile
// takes one core from 18 to 26 GB/s (float32, K = 576 and 1536, Zen 5), what a plain dot product per column reaches.

// The longest k block, about 1 KiB of operand.
template <class G>
constexpr int64_t kMostDepth = 1024 / (sizeof(typename G::T) * G::kParts) / 32 * 32;

#if defined(FASTATTN_TARGET_AMX)

constexpr int64_t kStreamRows = 16;  // one tile of columns

// Cᵀ = Bᵀ·Aᵀ: 32 rows of the weight at a time as they lie, or in parts, times the few rows, which are packed. Meanwhile
// the next 32 rows are fetched.
template <class S>
inline void stream_multiply(int64_t rows, const S* a, int64_t lda, const S* bt, int64_t ldb, int64_t columns, int64_t K,
                            int64_t block, float* c, int64_t ldc, bool accumulate) {
  using G = GemmOf<S>;
  using T = typename G::T;
  constexpr int64_t kLine = 64 / sizeof(S);
  alignas(64) T few[kMostDepth<G> * G::kParts * G::kNr], converted[32 * G::kParts * (kMostDepth<G> + 32)];
  alignas(64) float sums[32 * 16];
  const TileScope scope;
  for (int64_t k = 0; k < K; k += block) {
    const int64_t depth = std::min(block, K - k);
    G::pack_transposed(a + k, lda, depth, rows, few);
    for (int64_t n = 0; n < columns; n += 32) {
      const int64_t count = std::min<int64_t>(32, columns - n);
      const S* weight = bt + n * ldb + k;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < depth; d += kLine) __builtin_prefetch(weight + (i + 32) * ldb + d, 0, 2);
        if constexpr (!std::is_same_v<S, T>) {
          const int64_t stride = G::kParts * (block + 32);
          G::convert_row(weight + i * ldb, depth, converted + i * stride, stride);
        }
      }
      if constexpr (std::is_same_v<S, T>) {
        G::multiply_turned(weight, ldb, few, count, rows, depth, sums, 16);
      } else {
        G::multiply_turned(converted, G::kParts * (block + 32), few, count, rows, depth, sums, 16);
      }
      for (int64_t i = 0; i < count; i += 16) {
        VecF square[16];
        for (int j = 0; j < 16; ++j) square[j] = VecF::load(sums + (i + j) * 16);
        transpose(square);
        const int64_t width = std::min<int64_t>(16, count - i);
        for (int64_t r = 0; r < rows; ++r) {
          float* to = c + r * ldc + n + i;
          (accumulate || k > 0 ? VecF::load_n(to, width) + square[r] : square[r]).store_n(to, width);
        }
      }
    }
  }
}

#else

constexpr int64_t kStreamRows = 4;

// k elements of a row of the weight in one lane-wide square, and the arithmetic on its columns after turning it over.
template <class S>
struct StreamOps {
  static constexpr int kStep = 1;
  static VecF load(const S* row, int64_t count) { return VecF::load_n(row, count); }
  static VecF multiply_add(const S* a, int64_t, VecF column, VecF sum) { return fma(VecF(to_acc(*a)), column, sum); }
};
#if defined(FASTATTN_TARGET_AVX512_BF16)
template <>
struct StreamOps<BFloat16> {
  static constexpr int kStep = 2;
  static VecF load(const BFloat16* row, int64_t count) {
    const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(count)));
    return VecF(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, row)));
  }
  // A pair of k; `left` is 1 for the last of an odd K.
  static VecF multiply_add(const BFloat16* a, int64_t left, VecF column, VecF sum) {
    using Ops = GemmOpsBFloat16;
    const Ops::Operand row = left == 1 ? Ops::broadcast_last(a) : Ops::broadcast(a);
    return Ops::multiply_add(row, (Ops::Operand)column.v, sum);
  }
};
#endif

// R rows of A by kLanes columns, the rows [0, columns) of bt.
template <class S, int R>
inline void stream_square_columns(const S* a, int64_t lda, const S* bt, int64_t ldb, int64_t columns, int64_t K,
                                  int64_t block, float* c, int64_t ldc, bool accumulate) {
  using Ops = StreamOps<S>;
  constexpr int kLanes = VecF::kLanes, kDepth = kLanes * Ops::kStep;
  VecF total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = accumulate ? VecF::load_n(c + r * ldc, columns) : VecF::zero();
  for (int64_t start = 0; start < K; start += block) {
    const int64_t end = std::min(K, start + block);
    VecF sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = VecF::zero();
    for (int64_t k = start; k < end; k += kDepth) {
      const int64_t depth = std::min<int64_t>(kDepth, end - k);
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = Ops::load(bt + i * ldb + k, i < columns ? depth : 0);
        __builtin_prefetch(bt + (i + kLanes) * ldb + k, 0, 2);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i * Ops::kStep >= depth) break;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t at = i * Ops::kStep;
          sum[r] = Ops::multiply_add(a + r * lda + k + at, depth - at, square[i], sum[r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r] = start == 0 && !accumulate ? sum[r] : total[r] + sum[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r].store_n(c + r * ldc, columns);
}

// rows <= kStreamRows, any number of columns.
template <class S, int R = kStreamRows>
inline void stream_multiply(int64_t rows, const S* a, int64_t lda, const S* bt, int64_t ldb, int64_t columns, int64_t K,
                            int64_t block, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R > 0) {
    if (rows < R) return stream_multiply<S, R - 1>(rows, a, lda, bt, ldb, columns, K, block, c, ldc, accumulate);
    for (int64_t n = 0; n < columns; n += VecF::kLanes) {
      stream_square_columns<S, R>(a, lda, bt + n * ldb, ldb, std::min<int64_t>(VecF::kLanes, columns - n), K, block,
                                  c + n, ldc, accumulate);
    }
  }
}

#endif

template <class S>
inline bool streams(int64_t rows) {
  return !std::is_same_v<S, double> && rows <= kStreamRows;
}
