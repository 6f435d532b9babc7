// A few rows times a transposed matrix, C (+)= A·Bᵀ with the rows of `bt` (nn.Linear's weight) along k: decoding a
// token.
//
// The weight is read once, from memory, and that is all the time there is: nothing of it is packed; squares of it, 32
// bits an element, turn over in registers and are multiplied there. Every sum is formed in the packed product's order
// (k blocks of depth_block), so that a row's result has the same bits whichever of the two computes it. The hardware
// does not follow a square's rows by itself: fetching the next squares' rows meanwhile takes one core from 18 to 26
// GB/s (float32, K = 576 and 1536, Zen 5), what a plain dot product per column reaches. A row's sum is one chain of
// dependent additions, which alone would set the time of one or two rows of 16-bit numbers: two groups of columns
// alternate (39 to 52 GB/s from L3, bfloat16).

// The longest k block: about 1 KiB of operand. A float32 sum loses digits with the length of its chain: with blocks of
// 256 the feed-forward network lost 1.11 to 1.16 times what torch's does.
template <class G>
constexpr int64_t kMostDepth =
    std::is_same_v<typename G::T, float> ? 192 : 1024 / (sizeof(typename G::T) * G::kParts) / 32 * 32;

// With tiles a few rows are a turned product like any other; with few registers there is no room for many sums.
#if defined(FASTATTN_TARGET_AMX)
constexpr int64_t kStreamRows = 0;
#else
constexpr int64_t kStreamRows = VecF::kLanes == 16 ? 8 : 4;
#endif

// A square's element: kStep consecutive k, which become kStep / kTogether factors of a multiply_add.
template <class S, bool kPairs = sizeof(S) == 2 && (VecF::kLanes > 1)>
struct StreamOps {
  static constexpr int kStep = 1, kTogether = 1;
  static VecF load(const S* row) { return VecF::load(row); }
  static VecF load_n(const S* row, int64_t count) { return VecF::load_n(row, count); }
  static void factors(VecF square, VecF (&factor)[1]) { factor[0] = square; }
  static VecF multiply_add(const float* a, int64_t, VecF column, VecF sum) { return fma(VecF(*a), column, sum); }
};
template <class S>
struct StreamOps<S, true> {
  static constexpr int kStep = 2, kTogether = 1;
  static VecF load(const S* row) { return VecF::load_pairs(row); }
  static VecF load_n(const S* row, int64_t count) { return VecF::load_pairs_n(row, count); }
  static void factors(VecF square, VecF (&factor)[2]) { unzip(S{}, square, factor); }
  static VecF multiply_add(const float* a, int64_t, VecF column, VecF sum) { return fma(VecF(*a), column, sum); }
};
#if defined(FASTATTN_TARGET_AVX512_BF16)
template <>
struct StreamOps<BFloat16, true> {
  static constexpr int kStep = 2, kTogether = 2;
  static VecF load(const BFloat16* row) { return VecF::load_pairs(row); }
  static VecF load_n(const BFloat16* row, int64_t count) { return VecF::load_pairs_n(row, count); }
  static void factors(VecF square, VecF (&factor)[1]) { factor[0] = square; }
  // `left` is 1 for the last of an odd K.
  static VecF multiply_add(const BFloat16* a, int64_t left, VecF column, VecF sum) {
    using Ops = GemmOpsBFloat16;
    const Ops::Operand row = left == 1 ? Ops::broadcast_last(a) : Ops::broadcast(a);
    return Ops::multiply_add(row, (Ops::Operand)column.v, sum);
  }
};
#endif

// Rows up to which the chains of sums, not the weight's arrival, set the time.
template <class S>
constexpr int kStreamChains = StreamOps<S>::kStep == 1 ? 0 : StreamOps<S>::kTogether;

// sum[r] += R rows of A times one square: `depth` k of the rows [0, columns) of bt.
template <class S, int R, bool kWhole>
__attribute__((always_inline)) inline void stream_square(const GemmOperand<S>* a, int64_t lda, const S* bt, int64_t ldb,
                                                         int64_t columns, int64_t depth, int64_t next, VecF (&sum)[R]) {
  using Ops = StreamOps<S>;
  constexpr int kFactors = Ops::kStep / Ops::kTogether;
  VecF square[VecF::kLanes];
  const S *row = bt, *ahead = bt + next * ldb;
#pragma GCC unroll 16
  for (int i = 0; i < VecF::kLanes; ++i) {
    square[i] = kWhole ? Ops::load(row) : Ops::load_n(row, i < columns ? depth : 0);
    __builtin_prefetch(ahead, 0, 2);
    row += ldb, ahead += ldb;
    asm("" : "+r"(row), "+r"(ahead));  // else the compiler keeps 32 pointers, on the stack
  }
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < VecF::kLanes; ++i) {
    VecF factor[kFactors];
    Ops::factors(square[i], factor);
#pragma GCC unroll 2
    for (int f = 0; f < kFactors; ++f) {
      const int64_t k = i * Ops::kStep + f;
      if (!kWhole && k >= depth) return;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r] = Ops::multiply_add(a + r * lda + k, kWhole ? Ops::kTogether : depth - k, factor[f], sum[r]);
      }
    }
  }
}

// R rows of A by C groups of kLanes columns; of the last only `columns` exist unless kWhole. Compiled each by itself:
// all row counts in one function lose up to half their speed (two rows, bfloat16).
template <class S, int R, int C, bool kWhole>
__attribute__((noinline)) void stream_columns(const GemmOperand<S>* a, int64_t lda, const S* bt, int64_t ldb,
                                              int64_t columns, int64_t K, int64_t block, float* c, int64_t ldc) {
  constexpr int kLanes = VecF::kLanes, kDepth = kLanes * StreamOps<S>::kStep, kNext = C * kLanes;
  VecF total[C][R];
  for (int64_t start = 0; start < K; start += block) {
    const int64_t end = std::min(K, start + block);
    VecF sum[C][R];
#pragma GCC unroll 2
    for (int g = 0; g < C; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[g][r] = VecF::zero();
    }
    int64_t k = start;
    for (; k + kDepth <= end; k += kDepth) {
#pragma GCC unroll 2
      for (int g = 0; g < C; ++g) {
        stream_square<S, R, kWhole>(a + k, lda, bt + g * kLanes * ldb + k, ldb, columns, kDepth, kNext, sum[g]);
      }
    }
    if (k < end) {
#pragma GCC unroll 2
      for (int g = 0; g < C; ++g) {
        stream_square<S, R, false>(a + k, lda, bt + g * kLanes * ldb + k, ldb, columns, end - k, kNext, sum[g]);
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < C; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[g][r] = start == 0 ? sum[g][r] : total[g][r] + sum[g][r];
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < C; ++g) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      kWhole ? total[g][r].store(c + r * ldc + g * kLanes) : total[g][r].store_n(c + r * ldc, columns);
    }
  }
}

// C = A·Bᵀ for rows <= kStreamRows and any number of columns; K > 0.
template <class S, int R = kStreamRows>
inline void stream_multiply(int64_t rows, const GemmOperand<S>* a, int64_t lda, const S* bt, int64_t ldb,
                            int64_t columns, int64_t K, int64_t block, float* c, int64_t ldc) {
  if constexpr (R > 0) {
    if (rows < R) return stream_multiply<S, R - 1>(rows, a, lda, bt, ldb, columns, K, block, c, ldc);
    constexpr int kLanes = VecF::kLanes, kGroups = kLanes == 16 && R <= kStreamChains<S> ? 2 : 1;
    // Two groups of rows of the weight in one set of L1 would drive each other out.
    const bool alternate = kGroups > 1 && ldb * sizeof(S) % 4096 != 0;
    int64_t n = 0;
    for (; alternate && n + kGroups * kLanes <= columns; n += kGroups * kLanes) {
      stream_columns<S, R, kGroups, true>(a, lda, bt + n * ldb, ldb, kLanes, K, block, c + n, ldc);
    }
    for (; n + kLanes <= columns; n += kLanes) {
      stream_columns<S, R, 1, true>(a, lda, bt + n * ldb, ldb, kLanes, K, block, c + n, ldc);
    }
    if (n < columns) {
      stream_columns<S, R, 1, false>(a, lda, bt + n * ldb, ldb, columns - n, K, block, c + n, ldc);
    }
  }
}
