// A few rows times a transposed matrix, C (+)= A·Bᵀ with the rows of `bt` (nn.Linear's weight) along k: decoding a
// token.
//
// The weight is read once, from memory, and that is all the time there is: nothing is packed, squares of it turn over
// in registers and are multiplied there. Every sum is formed in the packed product's order (k blocks of depth_block),
// so that a row's result has the same bits whichever of the two computes it. The hardware does not follow a square's
// rows by itself: fetching the next squares' rows meanwhile takes one core from 18 to 26 GB/s (float32, K = 576 and
// 1536, Zen 5), what a plain dot product per column reaches.

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

// Squares exist for float sums. AMX adds up in an order of its own, which a row must not leave when its batch is small.
template <class S>
inline bool streams(int64_t rows) {
#if defined(FASTATTN_TARGET_AMX)
  if (std::is_same_v<S, BFloat16>) return false;
#endif
  return !std::is_same_v<S, double> && rows <= kStreamRows;
}

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
