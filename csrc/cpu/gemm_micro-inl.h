// The register-blocked matrix product under attention and the feed-forward network: C (+)= A·B for one cache-sized
// block.
//
// A is read where it lies (rows of T, unit stride along k); B is packed first, into panels of kNr columns in which one
// vector load gives kNr columns of one k (of kStep consecutive k for 16-bit operands):
//
//   element (k, n)  at  (n / kNr) * kNr * Kpad  +  (k / kStep) * kNr * kStep  +  (n % kNr) * kStep  +  k % kStep
//
// Kpad is K rounded up to kDepth; padding holds zeros. Each element of C is one chain of fused multiply-adds in the
// order of k, whatever M and N are, so a row's result does not depend on its neighbours. With `accumulate` the finished
// sum is added to C.
//
// Registers: kMr rows times kVectors vectors of accumulators, kVectors of B, one broadcast of A. AVX-512 has 32: 14 * 2
// + 2 + 1 = 31; AVX2 has 16: 6 * 2 + 2 + 1 = 15. Rows are split evenly (64 rows are 13+13+13+13+12), so that a
// remainder never runs at a few rows' speed.

// The type in which operands of storage type S enter a product: the accumulation type, bfloat16 itself where it has a
// dot product, and on AMX bfloat16 parts (gemm_split-inl.h). Half has no dot product worth using on any of the targets.
template <class S>
struct GemmOperandOf {
  using type = Acc<S>;
};
#if defined(FASTATTN_TARGET_AVX512_BF16)
template <>
struct GemmOperandOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class S>
using GemmOperand = typename GemmOperandOf<S>::type;

constexpr int kGemmVectors = VecF::kLanes == 1 ? 4 : 2;
constexpr int kGemmRows = VecF::kLanes == 16 ? 14 : VecF::kLanes == 8 ? 6 : 2;

// Rows of a converted A that a product may read, a multiple of this many: a tile's.
constexpr int64_t kGemmRowsRead = 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The columns of a block of C that exist.
template <class Ops, int R, int V>
inline void store_edge(const Vec<typename Ops::A> (&sum)[R][V], typename Ops::A* c, int64_t ldc, int64_t columns,
                       bool accumulate) {
  using Vector = Vec<typename Ops::A>;
  constexpr int kLanes = Vector::kLanes;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t n = std::max<int64_t>(0, std::min<int64_t>(kLanes, columns - v * kLanes));
      typename Ops::A* out = c + r * ldc + v * kLanes;
      (accumulate ? Vector::load_n(out, n) + sum[r][v] : sum[r][v]).store_n(out, n);
    }
  }
}

// C (+)= A·B for `count` blocks of R rows, one below the other, and `panels` panels of V vectors side by side: every
// block of rows passes all panels while it is in the L1 cache. Meanwhile `ahead_step` bytes of what comes next arrive
// in L2 per step of k. Ops supplies the arithmetic: T, A, kStep, kNr, Vec<A> fma(a pointer, B vector, accumulator).
// kColumns: A comes by columns, element (m, k) at a[k / kStep * lda + m * kStep + k % kStep].
template <class Ops, int R, int V, bool kColumns, bool kAccumulate>
inline void gemm_blocks(int64_t count, int64_t panels, int64_t panel_size, const typename Ops::T* a, int64_t lda,
                        const typename Ops::T* b, int64_t K, typename Ops::A* c, int64_t ldc, int64_t columns,
                        const char* ahead, int64_t ahead_step) {
  using Vector = Vec<typename Ops::A>;
  constexpr int kLanes = Vector::kLanes, kRowOfB = Ops::kNr * Ops::kStep;
  const int64_t row_step = kColumns ? Ops::kStep : lda, step = kColumns ? lda : Ops::kStep;
  const int64_t steps = (K + (kColumns ? Ops::kStep - 1 : 0)) / Ops::kStep;
  for (int64_t block = 0; block < count; ++block) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const typename Ops::T *row_a = a + block * R * row_step, *row_b = b + panel * panel_size;
      typename Ops::A* row_c = c + block * R * ldc + panel * Ops::kNr;
      Vector sum[R][V];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Vector::zero();
      }
      for (int64_t s = 0; s < steps; ++s) {
        typename Ops::Operand column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) column[v] = Ops::load(row_b + v * kLanes * Ops::kStep);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const typename Ops::Operand row = Ops::broadcast(row_a + r * row_step);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] = Ops::multiply_add(row, column[v], sum[r][v]);
        }
        row_a += step;
        row_b += kRowOfB;
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
      }
      if (!kColumns && Ops::kStep > 1 && K % Ops::kStep != 0) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const typename Ops::Operand row = Ops::broadcast_last(row_a + r * lda);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            sum[r][v] = Ops::multiply_add(row, Ops::load(row_b + v * kLanes * Ops::kStep), sum[r][v]);
          }
        }
      }
      if (columns != V * kLanes) {
        store_edge<Ops, R, V>(sum, row_c, ldc, columns, kAccumulate);
        continue;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          typename Ops::A* out = row_c + r * ldc + v * kLanes;
          (kAccumulate ? Vector::load(out) + sum[r][v] : sum[r][v]).store(out);
        }
      }
    }
  }
}

// gemm_blocks for a row count known at run time.
template <class Ops, int V, bool kColumns, int R = kGemmRows, class... Args>
inline void gemm_rows(int64_t rows, bool accumulate, Args... args) {
  if constexpr (R > 0) {
    if (rows != R) return gemm_rows<Ops, V, kColumns, R - 1>(rows, accumulate, args...);
    accumulate ? gemm_blocks<Ops, R, V, kColumns, true>(args...) : gemm_blocks<Ops, R, V, kColumns, false>(args...);
  }
}

// f(rows of each, how many, first row, blocks before) for blocks of at most kGemmRows rows: split evenly, so that the
// first of them have one row more.
template <class F>
inline void for_row_blocks(int64_t M, const F& f) {
  const int64_t blocks = (M + kGemmRows - 1) / kGemmRows;
  if (blocks == 0) return;
  const int64_t low = M / blocks, tall = M - low * blocks;
  if (tall > 0) f(low + 1, tall, int64_t{0}, int64_t{0});
  f(low, blocks - tall, tall * (low + 1), tall);
}

// A packed B up to this size stays in the L1 cache while the rows of A pass it once.
constexpr int64_t kGemmSmallOperand = 32 << 10;

// gemm_blocks for the columns [n, n + columns) of panels in which only one vector may exist.
template <class Ops, class... Args>
inline void gemm_panel(int64_t rows, bool accumulate, int64_t columns, Args... args) {
  if (columns <= Vec<typename Ops::A>::kLanes) {
    gemm_rows<Ops, 1, false>(rows, accumulate, args...);
  } else {
    gemm_rows<Ops, kGemmVectors, false>(rows, accumulate, args...);
  }
}

// All blocks of C. A small B is passed as a whole by every block of rows; a larger one panel by panel, so that a panel
// stays in the L1 or L2 cache while the rows of A pass, and every block of rows fetches its share of the next panel,
// which would otherwise stall the first of them.
template <class Ops>
inline void gemm_multiply(const typename Ops::T* a, int64_t lda, const typename Ops::T* packed, int64_t M, int64_t N,
                          int64_t K, typename Ops::A* c, int64_t ldc, bool accumulate) {
  const int64_t blocks = (M + kGemmRows - 1) / kGemmRows;
  if (blocks == 0) return;
  const int64_t panel_size = Ops::kNr * round_up(K, Ops::kStep);
  const int64_t together =
      panel_size * N * static_cast<int64_t>(sizeof(*packed)) <= kGemmSmallOperand * Ops::kNr ? N / Ops::kNr : 0;
  const int64_t share = panel_size * static_cast<int64_t>(sizeof(*packed)) / blocks;
  const int64_t share_step = share / std::max<int64_t>(1, K / Ops::kStep);
  for (int64_t n = 0; n < N;) {
    const int64_t panels = n == 0 && together > 0 ? together : 1;
    const typename Ops::T* b = packed + n / Ops::kNr * panel_size;
    const bool more = together == 0 && n + Ops::kNr < N;
    const char* ahead = reinterpret_cast<const char*>(more ? b + panel_size : b);
    const int64_t ahead_step = more ? share_step : 0;
    const int64_t columns = std::min<int64_t>(Ops::kNr, N - n);
    for_row_blocks(M, [&](int64_t rows, int64_t count, int64_t row, int64_t before) {
      gemm_panel<Ops>(rows, accumulate, columns, count, panels, panel_size, a + row * lda, lda, b, K, c + row * ldc + n,
                      ldc, columns, ahead + before * share, ahead_step);
    });
    n += panels * Ops::kNr;
  }
}

// At most kGemmRows rows of A, which stay in the L1 cache while the panels of B pass from L2. During the first of them
// `ahead_bytes` bytes of what comes next arrive in L2.
template <class Ops>
inline void gemm_multiply_few(const typename Ops::T* a, int64_t lda, const typename Ops::T* packed, int64_t M,
                              int64_t N, int64_t K, typename Ops::A* c, int64_t ldc, bool accumulate, const char* ahead,
                              int64_t ahead_bytes) {
  const int64_t panel_size = Ops::kNr * round_up(K, Ops::kStep);
  const int64_t step = ahead_bytes / std::max<int64_t>(1, K / Ops::kStep);
  for (int64_t n = 0; n < N; n += Ops::kNr) {
    const int64_t columns = std::min<int64_t>(Ops::kNr, N - n);
    gemm_panel<Ops>(M, accumulate, columns, int64_t{1}, int64_t{1}, panel_size, a, lda,
                    packed + n / Ops::kNr * panel_size, K, c + n, ldc, columns, ahead, n == 0 ? step : 0);
  }
}

// gemm_multiply for a left operand given by columns (element (m, k) at a[k / kStep * lda + m * kStep + k % kStep],
// zeros after an odd K) and whole panels: N is a multiple of kNr.
template <class Ops>
inline void gemm_multiply_columns(const typename Ops::T* a, int64_t lda, const typename Ops::T* packed, int64_t M,
                                  int64_t N, int64_t K, typename Ops::A* c, int64_t ldc, bool accumulate) {
  const int64_t panel_size = Ops::kNr * round_up(K, Ops::kStep);
  for_row_blocks(M, [&](int64_t rows, int64_t count, int64_t row, int64_t /*before*/) {
    gemm_rows<Ops, kGemmVectors, true>(rows, accumulate, count, N / Ops::kNr, panel_size, a + row * Ops::kStep, lda,
                                       packed, K, c + row * ldc, ldc, int64_t{Ops::kNr},
                                       reinterpret_cast<const char*>(packed), int64_t{0});
  });
}

// float and double operands.
template <class Type>
struct GemmOps {
  using T = Type;
  using A = Type;
  using Operand = Vec<A>;
  static constexpr int kStep = 1, kNr = kGemmVectors * Vec<A>::kLanes;
  static Operand load(const T* b) { return Operand::load(b); }
  static Operand broadcast(const T* a) { return Operand(*a); }
  static Operand broadcast_last(const T* a) { return broadcast(a); }
  static Vec<A> multiply_add(Operand a, Operand b, Vec<A> c) { return fma(a, b, c); }
};

// Elements of each row fetched ahead while rows are turned into columns: one cache line a row per square is too sparse
// for the hardware's prefetcher (weights from L3: 0.64 to 0.3 ms for 3072 x 768 bfloat16).
constexpr int kPackAhead = 64;

// One panel of pack_transposed: columns n of B are rows of bt. Blocks of kLanes x kLanes turn over in registers.
template <class S>
inline void pack_panel_transposed(const S* bt, int64_t ldb, int64_t K, int64_t columns, float* panel) {
  constexpr int kLanes = VecF::kLanes, kNr = kGemmVectors * kLanes;
  for (int64_t n = 0; n < kNr; n += kLanes) {
    for (int64_t k = 0; k < K; k += kLanes) {
      const int64_t depth = std::min<int64_t>(kLanes, K - k);
      VecF block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = n + i < columns ? VecF::load_n(bt + (n + i) * ldb + k, depth) : VecF::zero();
        if (n + i < columns) __builtin_prefetch(bt + (n + i) * ldb + k + kPackAhead);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < depth) block[i].store(panel + (k + i) * kNr + n);
      }
    }
  }
}
template <class S>
inline void pack_panel_transposed(const S* bt, int64_t ldb, int64_t K, int64_t columns, double* panel) {
  constexpr int kNr = kGemmVectors * VecD::kLanes;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < kNr; ++n) panel[k * kNr + n] = n < columns ? to_acc(bt[n * ldb + k]) : 0.0;
  }
}

// The packed form of B above. A product may hold every number in kParts elements of T: part p of a packed element lies
// p * part_stride(K) behind the first, and part p of an element of A (row stride lda) p * lda / kParts behind it.
template <class Type, int Nr, int Step, int Depth, int Parts = 1>
struct GemmLayout {
  using T = Type;
  static constexpr int kNr = Nr, kStep = Step, kDepth = Depth, kParts = Parts;

  static int64_t part_stride(int64_t K) { return round_up(K, kDepth) * kNr; }
  static int64_t packed_size(int64_t K, int64_t N) { return kParts * round_up(K, kDepth) * round_up(N, kNr); }
  static int64_t packed_index(int64_t k, int64_t n, int64_t K) {
    return n / kNr * kParts * part_stride(K) + k / kStep * kNr * kStep + n % kNr * kStep + k % kStep;
  }
  // Padding of packed panels beyond K, which the product reads (kDepth > kStep: AMX).
  static void zero_packed_tail(T* packed, int64_t K, int64_t N) {
    const int64_t done = round_up(K, kStep) * kNr, stride = part_stride(K);
    if (stride == done) return;
    for (int64_t part = 0; part < round_up(N, kNr) / kNr * kParts; ++part) {
      std::fill_n(packed + part * stride + done, stride - done, T{});
    }
  }
};

template <class Type>
struct Gemm : GemmLayout<Type, GemmOps<Type>::kNr, 1, 1> {
  using T = Type;
  using A = T;
  static constexpr int kMr = kGemmRows, kNr = GemmOps<T>::kNr;

  // kStep consecutive k of one vector of columns, `to` their place in a panel of depth K.
  static void store_packed(const Vec<A> (&row)[1], T* to, int64_t /*K*/) { row[0].store(to); }
  static A packed_value(const T* at, int64_t /*K*/) { return *at; }
  // A vector of consecutive k of a row of A.
  static void store_row(Vec<A> x, T* to, int64_t /*lda*/) { x.store(to); }
  // A whole row of A from another storage type.
  template <class S>
  static void convert_row(const S* from, int64_t K, T* to, int64_t /*lda*/) {
    constexpr int kLanes = Vec<A>::kLanes;
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) Vec<A>::load(from + k).store(to + k);
    if (k < K) Vec<A>::load_n(from + k, K - k).store_n(to + k, K - k);
  }

  template <class S>
  static void pack(const S* b, int64_t ldb, int64_t K, int64_t N, T* packed) {
    using V = Vec<A>;
    for (int64_t n = 0; n < N; n += kNr) {
      T* panel = packed + n * K;
      for (int64_t k = 0; k < K; ++k) {
        const S* row = b + k * ldb + n;
        for (int v = 0; v < kGemmVectors; ++v) {
          const int64_t count = std::max<int64_t>(0, std::min<int64_t>(V::kLanes, N - n - v * V::kLanes));
          V::load_n(row + v * V::kLanes, count).store(panel + k * kNr + v * V::kLanes);
        }
      }
    }
  }

  template <class S>
  static void pack_transposed(const S* bt, int64_t ldb, int64_t K, int64_t N, T* packed) {
    for (int64_t n = 0; n < N; n += kNr) {
      pack_panel_transposed(bt + n * ldb, ldb, K, std::min<int64_t>(kNr, N - n), packed + n * K);
    }
  }

  static void multiply(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c, int64_t ldc,
                       bool accumulate) {
    gemm_multiply<GemmOps<T>>(a, lda, packed, M, N, K, c, ldc, accumulate);
  }

  // C (+)= A·B for at most kMr rows, with the bits that the product of the turned matrices, Bᵀ·Aᵀ, has.
  static void multiply_turned(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                              int64_t ldc, bool accumulate, const char* ahead, int64_t ahead_bytes) {
    gemm_multiply_few<GemmOps<T>>(a, lda, packed, M, N, K, c, ldc, accumulate, ahead, ahead_bytes);
  }

  static constexpr bool kTakesColumns = true;
  static void multiply_columns(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                               int64_t ldc, bool accumulate) {
    gemm_multiply_columns<GemmOps<T>>(a, lda, packed, M, N, K, c, ldc, accumulate);
  }
};

#if defined(FASTATTN_TARGET_AVX512_BF16)

// bfloat16 operands: one 32-bit broadcast of A and one vector of B hold two k for each of 16 columns.
struct GemmOpsBFloat16 {
  using T = BFloat16;
  using A = float;
  using Operand = __m512bh;
  static constexpr int kStep = 2, kNr = kGemmVectors * 16;
  static Operand load(const T* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Operand broadcast(const T* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  // The last k of an odd K: what follows it in memory may be anything, or nothing.
  static Operand broadcast_last(const T* a) { return (__m512bh)_mm512_set1_epi32(a->bits); }
  static VecF multiply_add(Operand a, Operand b, VecF c) { return VecF(_mm512_dpbf16_ps(c.v, a, b)); }
};

// 32 words a row, rows k and k + 1 interleaved: word 2n is row k's n-th, word 2n + 1 row (k + 1)'s.
inline void pack_panel_pairs(const BFloat16* b, int64_t ldb, int64_t K, int64_t columns, int64_t depth,
                             BFloat16* panel) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(columns)));
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512i first = _mm512_maskz_loadu_epi16(k < K ? mask : 0, b + k * ldb);
    const __m512i second = _mm512_maskz_loadu_epi16(k + 1 < K ? mask : 0, b + (k + 1) * ldb);
    _mm512_storeu_si512(panel + k * 32, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(panel + k * 32 + 32, _mm512_permutex2var_epi16(first, high, second));
  }
}

// Pairs along k are already adjacent in bt: a transposition of 32-bit elements.
inline void pack_panel_pairs_transposed(const BFloat16* bt, int64_t ldb, int64_t K, int64_t columns, int64_t depth,
                                        BFloat16* panel) {
  for (int64_t n = 0; n < 32; n += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      const int64_t count = std::max<int64_t>(0, std::min<int64_t>(32, K - k));
      const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(count)));
      VecF block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask32 present = n + i < columns ? mask : 0;
        block[i] = VecF(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, bt + (n + i) * ldb + k)));
        if (present != 0) __builtin_prefetch(bt + (n + i) * ldb + k + kPackAhead);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (k + 2 * i < depth) _mm512_storeu_ps(panel + (k / 2 + i) * 64 + n * 2, block[i].v);
      }
    }
  }
}

#if defined(FASTATTN_TARGET_AMX)
#include "cpu/gemm_amx-inl.h"
constexpr int kGemmBFloat16Rows = 32, kGemmBFloat16Depth = 32;
#else
constexpr int kGemmBFloat16Rows = kGemmRows, kGemmBFloat16Depth = 2;
#endif

template <>
struct Gemm<BFloat16> : GemmLayout<BFloat16, GemmOpsBFloat16::kNr, 2, kGemmBFloat16Depth> {
  using A = float;
  static constexpr int kMr = kGemmBFloat16Rows;

  static void store_packed(const VecF (&row)[2], T* to, int64_t /*K*/) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(row[1].v, row[0].v);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
  }
  static A packed_value(const T* at, int64_t /*K*/) { return to_acc(*at); }
  static void store_row(VecF x, T* to, int64_t /*lda*/) { x.store(to); }

  template <class S>
  static void pack(const S* b, int64_t ldb, int64_t K, int64_t N, T* packed) {
    const int64_t depth = round_up(K, kDepth);
    for (int64_t n = 0; n < N; n += kNr) {
      pack_panel_pairs(b + n, ldb, K, std::min<int64_t>(kNr, N - n), depth, packed + n * depth);
    }
  }

  template <class S>
  static void pack_transposed(const S* bt, int64_t ldb, int64_t K, int64_t N, T* packed) {
    const int64_t depth = round_up(K, kDepth);
    for (int64_t n = 0; n < N; n += kNr) {
      pack_panel_pairs_transposed(bt + n * ldb, ldb, K, std::min<int64_t>(kNr, N - n), depth, packed + n * depth);
    }
  }

  static void multiply(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c, int64_t ldc,
                       bool accumulate) {
#if defined(FASTATTN_TARGET_AMX)
    gemm_multiply_amx(a, lda, packed, M, N, K, c, ldc, accumulate);
#else
    gemm_multiply<GemmOpsBFloat16>(a, lda, packed, M, N, K, c, ldc, accumulate);
#endif
  }

  static void multiply_turned(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                              int64_t ldc, bool accumulate, const char* ahead, int64_t ahead_bytes) {
#if defined(FASTATTN_TARGET_AMX)
    fetch(ahead, ahead_bytes);
    gemm_multiply_amx(a, lda, packed, M, N, K, c, ldc, accumulate);
#else
    gemm_multiply_few<GemmOpsBFloat16>(a, lda, packed, M, N, K, c, ldc, accumulate, ahead, ahead_bytes);
#endif
  }

#if defined(FASTATTN_TARGET_AMX)
  static constexpr bool kTakesColumns = false;
#else
  static constexpr bool kTakesColumns = true;
  static void multiply_columns(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                               int64_t ldc, bool accumulate) {
    gemm_multiply_columns<GemmOpsBFloat16>(a, lda, packed, M, N, K, c, ldc, accumulate);
  }
#endif
};

#endif  // FASTATTN_TARGET_AVX512_BF16

#if defined(FASTATTN_TARGET_AMX)
#include "cpu/gemm_split-inl.h"
#endif

// The product for operands of storage type S.
template <class S>
using GemmOf = Gemm<GemmOperand<S>>;

// GemmParams in params.h: pack B, convert A, multiply.
template <class S>
inline void gemm_product_of(const GemmParams& p) {
  using G = GemmOf<S>;
  using T = typename G::T;
  constexpr bool kInPlace = std::is_same_v<S, T>;
  const S *a = static_cast<const S*>(p.a), *b = static_cast<const S*>(p.b);
  const int64_t lda = kInPlace ? p.lda : round_up(p.K, G::kDepth) * G::kParts;
  const int64_t converted_size = kInPlace ? 0 : round_up(p.M, kGemmRowsRead) * lda;
  ScratchCursor scratch(thread_scratch((G::packed_size(p.K, p.N) + converted_size) * sizeof(T) + 128));
  T* packed = scratch.take<T>(G::packed_size(p.K, p.N));
  if (p.transposed) {
    G::pack_transposed(b, p.ldb, p.K, p.N, packed);
  } else {
    G::pack(b, p.ldb, p.K, p.N, packed);
  }
  const T* operand = nullptr;
  if constexpr (kInPlace) {
    operand = a;
  } else {
    T* converted = scratch.take<T>(converted_size);
    for (int64_t m = 0; m < p.M; ++m) G::convert_row(a + m * p.lda, p.K, converted + m * lda, lda);
    operand = converted;
  }
  for (int64_t i = 0; i < p.repeats; ++i) {
    G::multiply(operand, lda, packed, p.M, p.N, p.K, static_cast<Acc<S>*>(p.c), p.ldc, p.accumulate);
  }
}

inline void gemm_product(const GemmParams& p) {
  dispatch(p.dtype, [&](auto* type) { gemm_product_of<std::remove_pointer_t<decltype(type)>>(p); });
}
