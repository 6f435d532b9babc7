// Products of float32 and float16 matrices on bfloat16 tiles (Henry, Tang & Heinecke, "Leveraging the bfloat16
// Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019).
//
// A number is held as a sum of bfloat16 parts, each the rounding of what the parts before it leave:
//   three parts hold a float32 exactly    x = h + m + l    x·y = hh + hm + mh + mm + hl + lh,  |dropped| <= 2^-24 |x·y|
//   two parts hold a float16 exactly      x = h + l        x·y = hh + hl + lh,                 |dropped| <= 2^-16 |x·y|
//   and a float32 to 2^-17 of it: half the products, what torch.set_float32_matmul_precision() calls "high"
// The small products are summed first. Parts below 2^-126 are flushed to zero by the tile unit.
//
// No part is infinite where x is finite (the first is clamped to bfloat16's largest), and an inf or NaN leaves a NaN or
// inf in some part, so that every sum it enters is not finite. Such a sum is computed again, from the numbers that the
// parts stand for, as fused multiply-adds in the order of k: inf and NaN come out as Gemm<float> gives them.
//
// A's rows are read up to K rounded to 32, where they must hold finite numbers, and up to M rounded to 16, where they
// may hold anything.

template <int Parts>
struct SplitFloat {};

#if defined(FASTATTN_TARGET_REDUCED_PRECISION)
constexpr int kFloat32Parts = 2;
#else
constexpr int kFloat32Parts = 3;
#endif

template <>
struct GemmOperandOf<float> {
  using type = SplitFloat<kFloat32Parts>;
};
template <>
struct GemmOperandOf<Half> {
  using type = SplitFloat<2>;
};

// Parts as floats whose low 16 bits count for nothing. An infinite x gives (largest, inf, NaN).
template <int Parts>
inline void split(VecF x, VecF (&part)[Parts]) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  constexpr int kSmallerWithSignOfFirst = 2;
#pragma GCC unroll 3
  for (int p = 0; p < Parts; ++p) {
    part[p] = x;
    if (p == 2) break;  // 8 bits are left
    part[p].v = _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x.v), half), upper));
    if (p == 0) part[p].v = _mm512_range_ps(part[p].v, largest, kSmallerWithSignOfFirst);
    x = x - part[p];
  }
}

// The number that parts `stride` apart stand for.
template <int Parts>
inline VecF join(const VecF (&part)[Parts]) {
  const VecF infinity(std::numeric_limits<float>::infinity());
  VecF rest = part[1];
  if constexpr (Parts == 3) rest = rest + part[2];
  return select(le(infinity, abs(part[1])), part[1], part[0] + rest);
}
template <int Parts>
inline float join(const BFloat16* at, int64_t stride) {
  VecF part[Parts];
  for (int p = 0; p < Parts; ++p) part[p] = VecF(to_acc(at[p * stride]));
  return _mm512_cvtss_f32(join(part).v);
}

// Loads of one pair of parts, 32 k deep, and their four products (tiles as in gemm_amx-inl.h).
template <bool kLoadA, bool kLoadB, bool kBothRows, bool kBothColumns>
inline void tile_products(const BFloat16* a, int64_t lda, const BFloat16* b) {
  if (kLoadA) tile_load<4>(a, lda * 2);
  if (kLoadB) tile_load<6>(b, 128);
  tile_dot_bfloat16<0, 4, 6>();
  if (kBothColumns) {
    if (kLoadB) tile_load<7>(b + 32, 128);
    tile_dot_bfloat16<1, 4, 7>();
  }
  if (kBothRows) {
    if (kLoadA) tile_load<5>(a + 16 * lda, lda * 2);
    tile_dot_bfloat16<2, 5, 6>();
    if (kBothColumns) tile_dot_bfloat16<3, 5, 7>();
  }
}

// Tiles 0..3 = A times one panel. Consecutive products share an operand, which is then not loaded again. kTurned is for
// operands in each other's place: the same products in the same order.
template <int Parts, bool kTurned, bool kBothRows, bool kBothColumns>
inline void tile_split_block(const BFloat16* a, int64_t lda, const BFloat16* b, int64_t part_b, int64_t K) {
  constexpr bool R = kBothRows, C = kBothColumns;
  const int64_t part_a = lda / Parts;
  tile_zero<0>();
  if (C) tile_zero<1>();
  if (R) tile_zero<2>();
  if (R && C) tile_zero<3>();
  for (int64_t k = 0; k < K; k += 32) {
    const BFloat16 *ak = a + k, *bk = b + k * 32;
    constexpr bool kFirst = !kTurned;  // which operand goes up its parts; the other goes down
    const int64_t up_a = kTurned ? 0 : part_a, up_b = kTurned ? part_b : 0;
    const int64_t down_a = kTurned ? part_a : 0, down_b = kTurned ? 0 : part_b;
    if constexpr (Parts == 2) {
      tile_products<true, true, R, C>(ak + down_a, lda, bk + down_b);
      tile_products<kTurned, kFirst, R, C>(ak, lda, bk);
      tile_products<kFirst, kTurned, R, C>(ak + up_a, lda, bk + up_b);
    } else {
      tile_products<true, true, R, C>(ak + 2 * down_a, lda, bk + 2 * down_b);
      tile_products<kTurned, kFirst, R, C>(ak + down_a, lda, bk + down_b);
      tile_products<kFirst, kTurned, R, C>(ak + part_a, lda, bk + part_b);
      tile_products<kTurned, kFirst, R, C>(ak + up_a, lda, bk + up_b);
      tile_products<kFirst, kTurned, R, C>(ak + 2 * up_a, lda, bk + 2 * up_b);
    }
  }
  // All small products of three parts are in before the first large one: their sum is rounded at its own size.
  for (int64_t k = 0; Parts == 3 && k < K; k += 32) tile_products<true, true, R, C>(a + k, lda, b + k * 32);
}

// One row of 16 sums again, from the numbers themselves.
template <int Parts>
inline VecF exact_sums(const BFloat16* a, int64_t lda, const BFloat16* b, int64_t part_b, int64_t K) {
  VecF sum = VecF::zero();
  for (int64_t k = 0; k < K; ++k) {
    VecF part[Parts];
    for (int p = 0; p < Parts; ++p) {
      const __m512i pairs = _mm512_loadu_si512(b + p * part_b + k / 2 * 64);
      const __m512i even = _mm512_slli_epi32(pairs, 16);
      const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      part[p].v = _mm512_castsi512_ps(k % 2 == 0 ? even : odd);
    }
    sum = fma(VecF(join<Parts>(a + k, lda / Parts)), join(part), sum);
  }
  return sum;
}

// C (+)= tiles 0..3, sums that are not finite computed again.
template <int Parts>
inline void tile_split_store(const BFloat16* a, int64_t lda, const BFloat16* b, int64_t part_b, int64_t K, float* c,
                             int64_t ldc, int64_t rows, int64_t columns, bool accumulate) {
  alignas(64) float block[32 * 32];
  const bool direct = !accumulate && rows == 32 && columns == 32;
  float* to = direct ? c : block;
  const int64_t ld = direct ? ldc : 32;
  const int halves = columns > 16 ? 2 : 1;
  tile_block_to_memory(to, ld, rows, columns);
  VecF probe[4] = {VecF::zero(), VecF::zero(), VecF::zero(), VecF::zero()};
  for (int64_t r = 0; r < rows; ++r) {
    for (int h = 0; h < halves; ++h) {
      VecF& lane = probe[r % 2 * 2 + h];
      lane = fma(VecF::load(to + r * ld + h * 16), VecF::zero(), lane);
    }
  }
  if (reduce_add(probe[0] + probe[1] + probe[2] + probe[3]) != 0.0f) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int h = 0; h < halves; ++h) {
        float* at = to + r * ld + h * 16;
        const VecF sum = VecF::load(at);
        const MaskF finite = lt(abs(sum), VecF(std::numeric_limits<float>::infinity()));
        select(finite, sum, exact_sums<Parts>(a + r * lda, lda, b + h * 32, part_b, K)).store(at);
      }
    }
  }
  if (!direct) add_block(block, rows, columns, c, ldc, accumulate);
}

template <int Parts>
struct Gemm<SplitFloat<Parts>> : GemmLayout<BFloat16, 32, 2, 32, Parts> {
  using Layout = GemmLayout<BFloat16, 32, 2, 32, Parts>;
  using T = BFloat16;
  using A = float;
  static constexpr int kMr = 32;
  static constexpr bool kTakesColumns = false;
  using Layout::kDepth;
  using Layout::kNr;

  static void store_packed(const VecF (&row)[2], T* to, int64_t K) {
    const int64_t stride = Layout::part_stride(K);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    constexpr int kFirstOrBoth = 0xf8;
    VecF even[Parts], odd[Parts];
    split(row[0], even);
    split(row[1], odd);
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even[p].v), 16);
      _mm512_storeu_si512(to + p * stride,
                          _mm512_ternarylogic_epi32(low, _mm512_castps_si512(odd[p].v), upper, kFirstOrBoth));
    }
  }
  static A packed_value(const T* at, int64_t K) { return join<Parts>(at, Layout::part_stride(K)); }

  // 16 consecutive k.
  static void store_row(VecF x, T* to, int64_t lda) {
    VecF part[Parts];
    split(x, part);
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(part[p].v), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * (lda / Parts)), _mm512_cvtepi32_epi16(low));
    }
  }
  // With zeros up to K rounded to kDepth.
  template <class S>
  static void convert_row(const S* from, int64_t K, T* to, int64_t lda) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(2 * i + 1);
    const __m512i upper_words = _mm512_load_si512(order);
    for (int64_t k = 0; k < K; k += 32) {
      VecF low[Parts], high[Parts];
      split(VecF::load_n(from + k, std::min<int64_t>(16, K - k)), low);
      split(VecF::load_n(from + k + 16, std::max<int64_t>(0, std::min<int64_t>(16, K - k - 16))), high);
#pragma GCC unroll 3
      for (int p = 0; p < Parts; ++p) {
        _mm512_storeu_si512(
            to + p * (lda / Parts) + k,
            _mm512_permutex2var_epi16(_mm512_castps_si512(low[p].v), upper_words, _mm512_castps_si512(high[p].v)));
      }
    }
  }

  template <class S>
  static void pack(const S* b, int64_t ldb, int64_t K, int64_t N, T* packed) {
    for (int64_t n = 0; n < N; n += 16) {
      const int64_t count = std::min<int64_t>(16, N - n);
      for (int64_t k = 0; k < round_up(K, kDepth); k += 2) {
        const VecF row[2] = {VecF::load_n(b + k * ldb + n, k < K ? count : 0),
                             VecF::load_n(b + (k + 1) * ldb + n, k + 1 < K ? count : 0)};
        store_packed(row, packed + Layout::packed_index(k, n, K), K);
      }
    }
    if (N % 32 != 0 && N % 32 <= 16) zero_half(K, round_up(N, 16), packed);
  }

  template <class S>
  static void pack_transposed(const S* bt, int64_t ldb, int64_t K, int64_t N, T* packed) {
    for (int64_t n = 0; n < N; n += 16) {
      for (int64_t k = 0; k < round_up(K, kDepth); k += 16) {
        const int64_t depth = std::max<int64_t>(0, std::min<int64_t>(16, K - k));
        VecF block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          block[i] = n + i < N ? VecF::load_n(bt + (n + i) * ldb + k, depth) : VecF::zero();
          if (n + i < N) __builtin_prefetch(bt + (n + i) * ldb + k + kPackAhead);
        }
        transpose(block);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
          const VecF row[2] = {block[i], block[i + 1]};
          store_packed(row, packed + Layout::packed_index(k + i, n, K), K);
        }
      }
    }
    if (N % 32 != 0 && N % 32 <= 16) zero_half(K, round_up(N, 16), packed);
  }

  static void multiply(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c, int64_t ldc,
                       bool accumulate) {
    multiply_blocks<false>(a, lda, packed, M, N, K, c, ldc, accumulate);
  }
  static void multiply_turned(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                              int64_t ldc, bool accumulate, const char* ahead, int64_t ahead_bytes) {
    fetch(ahead, ahead_bytes);
    multiply_blocks<true>(a, lda, packed, M, N, K, c, ldc, accumulate);
  }

 private:
  // Columns [n, n + 16) of a panel.
  static void zero_half(int64_t K, int64_t n, T* packed) {
    const VecF zero[2] = {VecF::zero(), VecF::zero()};
    for (int64_t k = 0; k < round_up(K, kDepth); k += 2) {
      store_packed(zero, packed + Layout::packed_index(k, n, K), K);
    }
  }

  template <bool kTurned>
  static void multiply_blocks(const T* a, int64_t lda, const T* packed, int64_t M, int64_t N, int64_t K, A* c,
                              int64_t ldc, bool accumulate) {
    const TileScope scope;
    const int64_t part_b = Layout::part_stride(K);
    for (int64_t n = 0; n < N; n += 32) {
      const T* b = packed + Layout::packed_index(0, n, K);
      const int64_t columns = std::min<int64_t>(32, N - n);
      for (int64_t m = 0; m < M; m += 32) {
        const int64_t rows = std::min<int64_t>(32, M - m);
        const T* from = a + m * lda;
        if (rows > 16) {
          columns > 16 ? tile_split_block<Parts, kTurned, true, true>(from, lda, b, part_b, K)
                       : tile_split_block<Parts, kTurned, true, false>(from, lda, b, part_b, K);
        } else {
          columns > 16 ? tile_split_block<Parts, kTurned, false, true>(from, lda, b, part_b, K)
                       : tile_split_block<Parts, kTurned, false, false>(from, lda, b, part_b, K);
        }
        tile_split_store<Parts>(from, lda, b, part_b, K, c + m * ldc + n, ldc, rows, columns, accumulate);
      }
    }
  }
};
