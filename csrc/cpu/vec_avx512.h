// Vec for AVX-512 (F, DQ, BW, VL; AVX512-BF16 if FASTATTN_TARGET_AVX512_BF16): 16 float lanes, 8 double lanes.
// Contract in vec_scalar.h.

template <class A>
struct Vec;

inline __mmask16 lanes16(int64_t n) { return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(n))); }
inline __mmask8 lanes8(int64_t n) { return static_cast<__mmask8>(_bzhi_u32(0xff, static_cast<unsigned>(n))); }

inline __m512 widen(BFloat16, __m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 widen(Half, __m256i x) { return _mm512_cvtph_ps(x); }
inline __m256i narrow(Half, __m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(BFloat16, __m512 x) {
#if defined(FASTATTN_TARGET_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
#endif
}

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  explicit Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  static Vec zero() { return Vec(_mm512_setzero_ps()); }
  static Vec load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
  static Vec load_n(const float* p, int64_t n) { return Vec(_mm512_maskz_loadu_ps(lanes16(n), p)); }
  template <class T>
  static Vec load(const T* p) {
    return Vec(widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    return Vec(widen(T{}, _mm256_maskz_loadu_epi16(lanes16(n), p)));
  }
  // Pairs of 16-bit numbers, one a lane.
  template <class T>
  static Vec load_pairs(const T* p) {
    return Vec(_mm512_loadu_ps(reinterpret_cast<const float*>(p)));
  }
  template <class T>
  static Vec load_pairs_n(const T* p, int64_t n) {
    const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)));
    return Vec(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, lanes16(n), v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  template <class T>
  void stream(T* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, v));
  }
  template <class T>
  void store(T* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, v));
  }
  template <class T>
  void store_n(T* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, lanes16(n), narrow(T{}, v));
  }
  static Vec iota(float start) {
    return Vec(
        _mm512_add_ps(_mm512_set1_ps(start), _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  __m512d v;
  Vec() = default;
  explicit Vec(__m512d x) : v(x) {}
  explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
  static Vec zero() { return Vec(_mm512_setzero_pd()); }
  static Vec load(const double* p) { return Vec(_mm512_loadu_pd(p)); }
  static Vec load_n(const double* p, int64_t n) { return Vec(_mm512_maskz_loadu_pd(lanes8(n), p)); }
  static Vec load(const float* p) { return Vec(_mm512_cvtps_pd(_mm256_loadu_ps(p))); }
  static Vec load_n(const float* p, int64_t n) { return Vec(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes8(n), p))); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_n(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, lanes8(n), v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
  static Vec iota(double start) {
    return Vec(_mm512_add_pd(_mm512_set1_pd(start), _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7)));
  }
};

using VecF = Vec<float>;
using VecD = Vec<double>;
inline void finish_streams() { _mm_sfence(); }
struct MaskF {
  __mmask16 m;
};
struct MaskD {
  __mmask8 m;
};

inline VecF operator+(VecF a, VecF b) { return VecF(_mm512_add_ps(a.v, b.v)); }
inline VecF operator-(VecF a, VecF b) { return VecF(_mm512_sub_ps(a.v, b.v)); }
inline VecF operator*(VecF a, VecF b) { return VecF(_mm512_mul_ps(a.v, b.v)); }
inline VecF operator/(VecF a, VecF b) { return VecF(_mm512_div_ps(a.v, b.v)); }
inline VecF fma(VecF a, VecF b, VecF c) { return VecF(_mm512_fmadd_ps(a.v, b.v, c.v)); }
inline VecF fnma(VecF a, VecF b, VecF c) { return VecF(_mm512_fnmadd_ps(a.v, b.v, c.v)); }
inline VecF max(VecF a, VecF b) { return VecF(_mm512_max_ps(a.v, b.v)); }
inline VecF min(VecF a, VecF b) { return VecF(_mm512_min_ps(a.v, b.v)); }
inline VecF abs(VecF a) { return VecF(_mm512_abs_ps(a.v)); }
inline VecF sqrt(VecF a) { return VecF(_mm512_sqrt_ps(a.v)); }
inline MaskF lt(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskF le(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskF is_nan(VecF a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline VecF select(MaskF mask, VecF a, VecF b) { return VecF(_mm512_mask_blend_ps(mask.m, b.v, a.v)); }
inline MaskF operator&(MaskF a, MaskF b) { return {static_cast<__mmask16>(a.m & b.m)}; }
inline VecF copysign(VecF a, VecF sign) {
  return VecF(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sign.v),
                                                            _mm512_castps_si512(a.v), 0xca)));
}

inline VecD operator+(VecD a, VecD b) { return VecD(_mm512_add_pd(a.v, b.v)); }
inline VecD operator-(VecD a, VecD b) { return VecD(_mm512_sub_pd(a.v, b.v)); }
inline VecD operator*(VecD a, VecD b) { return VecD(_mm512_mul_pd(a.v, b.v)); }
inline VecD operator/(VecD a, VecD b) { return VecD(_mm512_div_pd(a.v, b.v)); }
inline VecD fma(VecD a, VecD b, VecD c) { return VecD(_mm512_fmadd_pd(a.v, b.v, c.v)); }
inline VecD fnma(VecD a, VecD b, VecD c) { return VecD(_mm512_fnmadd_pd(a.v, b.v, c.v)); }
inline VecD max(VecD a, VecD b) { return VecD(_mm512_max_pd(a.v, b.v)); }
inline VecD min(VecD a, VecD b) { return VecD(_mm512_min_pd(a.v, b.v)); }
inline VecD abs(VecD a) { return VecD(_mm512_abs_pd(a.v)); }
inline VecD sqrt(VecD a) { return VecD(_mm512_sqrt_pd(a.v)); }
inline MaskD lt(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskD le(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskD is_nan(VecD a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline VecD select(MaskD mask, VecD a, VecD b) { return VecD(_mm512_mask_blend_pd(mask.m, b.v, a.v)); }
inline MaskD operator&(MaskD a, MaskD b) { return {static_cast<__mmask8>(a.m & b.m)}; }
inline VecD copysign(VecD a, VecD sign) {
  return VecD(_mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_set1_epi64(INT64_MIN), _mm512_castpd_si512(sign.v),
                                                            _mm512_castpd_si512(a.v), 0xca)));
}

template <class A>
inline auto first_n(int64_t n) {
  if constexpr (std::is_same_v<A, float>) {
    return MaskF{lanes16(n)};
  } else {
    return MaskD{lanes8(n)};
  }
}
template <class A>
inline auto load_mask(const bool* p, int64_t n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes16(n), p);
  const __mmask16 set = _mm_test_epi8_mask(bytes, bytes);
  if constexpr (std::is_same_v<A, float>) {
    return MaskF{set};
  } else {
    return MaskD{static_cast<__mmask8>(set)};
  }
}

inline float reduce_add(VecF a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(VecF a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_add(VecD a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(VecD a) { return _mm512_reduce_max_pd(a.v); }

inline void unzip(VecF* a, VecF* b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 first = _mm512_permutex2var_ps(a->v, even, b->v);
  b->v = _mm512_permutex2var_ps(a->v, odd, b->v), a->v = first;
}
inline void zip(VecF* a, VecF* b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(a->v, low, b->v);
  b->v = _mm512_permutex2var_ps(a->v, high, b->v), a->v = first;
}
inline void unzip(VecD* a, VecD* b) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  const __m512d first = _mm512_permutex2var_pd(a->v, even, b->v);
  b->v = _mm512_permutex2var_pd(a->v, odd, b->v), a->v = first;
}
inline void zip(VecD* a, VecD* b) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512d first = _mm512_permutex2var_pd(a->v, low, b->v);
  b->v = _mm512_permutex2var_pd(a->v, high, b->v), a->v = first;
}

inline VecF round_nearest(VecF x) {
  return VecF(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// p * 2^rounded.
inline VecF scale_by_rounded(VecF p, VecF rounded) { return VecF(_mm512_scalef_ps(p.v, rounded.v)); }

struct VecU32 {
  static constexpr int kLanes = 16;
  __m512i v;
  VecU32() = default;
  explicit VecU32(__m512i x) : v(x) {}
  explicit VecU32(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
  static VecU32 iota(uint32_t start) {
    return VecU32(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  }
};
inline VecU32 operator+(VecU32 a, VecU32 b) { return VecU32(_mm512_add_epi32(a.v, b.v)); }
inline VecU32 operator^(VecU32 a, VecU32 b) { return VecU32(_mm512_xor_si512(a.v, b.v)); }
inline VecU32 shift_right(VecU32 a, int bits) { return VecU32(_mm512_srli_epi32(a.v, bits)); }
inline void mul_hi_lo(VecU32 a, uint32_t b, VecU32* hi, VecU32* lo) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  *lo = VecU32(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  *hi = VecU32(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
}
inline MaskF ge_unsigned(VecU32 a, uint32_t bound) {
  return {_mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(bound)))};
}
inline VecF keep(MaskF mask, VecF x) { return VecF(_mm512_maskz_mov_ps(mask.m, x.v)); }

// The first and the second number of every pair.
inline void unzip(BFloat16, VecF pairs, VecF (&number)[2]) {
  const __m512i bits = _mm512_castps_si512(pairs.v);
  number[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  number[1].v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void unzip(Half, VecF pairs, VecF (&number)[2]) {
  const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                         20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i sorted = _mm512_permutexvar_epi16(order, _mm512_castps_si512(pairs.v));
  number[0].v = _mm512_cvtph_ps(_mm512_castsi512_si256(sorted));
  number[1].v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(sorted, 1));
}

// 16 x 16: 4 x 4 blocks turn over within the 128-bit quarters of 4 neighbouring rows, then the quarters of 4 such
// groups.
inline void transpose(VecF (&block)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(block[i].v, block[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(block[i].v, block[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                 odd01 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    block[i].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    block[i + 4].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    block[i + 8].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    block[i + 12].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

struct VecU64 {
  static constexpr int kLanes = 8;
  __m512i v;
  VecU64() = default;
  explicit VecU64(__m512i x) : v(x) {}
  explicit VecU64(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
  static VecU64 counters(uint32_t start) {
    return VecU64(_mm512_add_epi64(_mm512_set1_epi64(start), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)));
  }
};
inline VecU64 operator^(VecU64 a, VecU64 b) { return VecU64(_mm512_xor_si512(a.v, b.v)); }
inline void mul_hi_lo(VecU64 a, uint32_t b, VecU64* hi, VecU64* lo) {
  lo->v = _mm512_mul_epu32(a.v, _mm512_set1_epi32(static_cast<int>(b)));
  hi->v = _mm512_srli_epi64(lo->v, 32);
}
constexpr int kWordVectors = 2;
inline void words_in_order(VecU64 a, VecU64 b, VecU64 c, VecU64 d, VecU32* words) {
  const __m512i ab = _mm512_mask_blend_epi32(0xaaaa, a.v, _mm512_slli_epi64(b.v, 32));
  const __m512i cd = _mm512_mask_blend_epi32(0xaaaa, c.v, _mm512_slli_epi64(d.v, 32));
  words[0] = VecU32(_mm512_unpacklo_epi64(ab, cd)), words[1] = VecU32(_mm512_unpackhi_epi64(ab, cd));
}
