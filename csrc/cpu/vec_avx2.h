// Vec for AVX2 + FMA + F16C: 8 float lanes, 4 double lanes. Contract in vec_scalar.h.

template <class A>
struct Vec;

// All-ones in the first n of 8 32-bit lanes.
inline __m256i lane_mask32(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline __m256i lane_mask64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
// The first n of 8 16-bit values: AVX2 has no masked 16-bit load or store.
inline __m128i load16_n(const uint16_t* p, int64_t n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, n * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store16_n(uint16_t* p, __m128i x, int64_t n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  std::memcpy(p, buffer, n * sizeof(uint16_t));
}

inline __m256 widen(BFloat16, __m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline __m256 widen(Half, __m128i x) { return _mm256_cvtph_ps(x); }
inline __m128i narrow(Half, __m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i narrow(BFloat16, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  __m256 v;
  Vec() = default;
  explicit Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  static Vec zero() { return Vec(_mm256_setzero_ps()); }
  static Vec load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
  static Vec load_n(const float* p, int64_t n) { return Vec(_mm256_maskload_ps(p, lane_mask32(n))); }
  template <class T>
  static Vec load(const T* p) {
    return Vec(widen(T{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    return Vec(widen(T{}, load16_n(reinterpret_cast<const uint16_t*>(p), n)));
  }
  // Pairs of 16-bit numbers, one a lane.
  template <class T>
  static Vec load_pairs(const T* p) {
    return Vec(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
  }
  template <class T>
  static Vec load_pairs_n(const T* p, int64_t n) {
    alignas(32) T buffer[16] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load_pairs(buffer);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm256_maskstore_ps(p, lane_mask32(n), v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  template <class T>
  void stream(T* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(T{}, v));
  }
  template <class T>
  void store(T* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(T{}, v));
  }
  template <class T>
  void store_n(T* p, int64_t n) const {
    store16_n(reinterpret_cast<uint16_t*>(p), narrow(T{}, v), n);
  }
  static Vec iota(float start) {
    return Vec(_mm256_add_ps(_mm256_set1_ps(start), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)));
  }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  __m256d v;
  Vec() = default;
  explicit Vec(__m256d x) : v(x) {}
  explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
  static Vec zero() { return Vec(_mm256_setzero_pd()); }
  static Vec load(const double* p) { return Vec(_mm256_loadu_pd(p)); }
  static Vec load_n(const double* p, int64_t n) { return Vec(_mm256_maskload_pd(p, lane_mask64(n))); }
  static Vec load(const float* p) { return Vec(_mm256_cvtps_pd(_mm_loadu_ps(p))); }
  static Vec load_n(const float* p, int64_t n) {
    return Vec(_mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(lane_mask32(n)))));
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_n(double* p, int64_t n) const { _mm256_maskstore_pd(p, lane_mask64(n), v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
  static Vec iota(double start) { return Vec(_mm256_add_pd(_mm256_set1_pd(start), _mm256_setr_pd(0, 1, 2, 3))); }
};

using VecF = Vec<float>;
using VecD = Vec<double>;
inline void finish_streams() { _mm_sfence(); }
// Lane masks are vectors of all-ones or zero.
struct MaskF {
  __m256 m;
};
struct MaskD {
  __m256d m;
};

inline VecF operator+(VecF a, VecF b) { return VecF(_mm256_add_ps(a.v, b.v)); }
inline VecF operator-(VecF a, VecF b) { return VecF(_mm256_sub_ps(a.v, b.v)); }
inline VecF operator*(VecF a, VecF b) { return VecF(_mm256_mul_ps(a.v, b.v)); }
inline VecF operator/(VecF a, VecF b) { return VecF(_mm256_div_ps(a.v, b.v)); }
inline VecF fma(VecF a, VecF b, VecF c) { return VecF(_mm256_fmadd_ps(a.v, b.v, c.v)); }
inline VecF fnma(VecF a, VecF b, VecF c) { return VecF(_mm256_fnmadd_ps(a.v, b.v, c.v)); }
inline VecF max(VecF a, VecF b) { return VecF(_mm256_max_ps(a.v, b.v)); }
inline VecF min(VecF a, VecF b) { return VecF(_mm256_min_ps(a.v, b.v)); }
inline VecF abs(VecF a) { return VecF(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)); }
inline VecF sqrt(VecF a) { return VecF(_mm256_sqrt_ps(a.v)); }
inline MaskF lt(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskF le(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskF is_nan(VecF a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline VecF select(MaskF mask, VecF a, VecF b) { return VecF(_mm256_blendv_ps(b.v, a.v, mask.m)); }
inline MaskF operator&(MaskF a, MaskF b) { return {_mm256_and_ps(a.m, b.m)}; }
inline VecF copysign(VecF a, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return VecF(_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v)));
}

inline VecD operator+(VecD a, VecD b) { return VecD(_mm256_add_pd(a.v, b.v)); }
inline VecD operator-(VecD a, VecD b) { return VecD(_mm256_sub_pd(a.v, b.v)); }
inline VecD operator*(VecD a, VecD b) { return VecD(_mm256_mul_pd(a.v, b.v)); }
inline VecD operator/(VecD a, VecD b) { return VecD(_mm256_div_pd(a.v, b.v)); }
inline VecD fma(VecD a, VecD b, VecD c) { return VecD(_mm256_fmadd_pd(a.v, b.v, c.v)); }
inline VecD fnma(VecD a, VecD b, VecD c) { return VecD(_mm256_fnmadd_pd(a.v, b.v, c.v)); }
inline VecD max(VecD a, VecD b) { return VecD(_mm256_max_pd(a.v, b.v)); }
inline VecD min(VecD a, VecD b) { return VecD(_mm256_min_pd(a.v, b.v)); }
inline VecD abs(VecD a) { return VecD(_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)); }
inline VecD sqrt(VecD a) { return VecD(_mm256_sqrt_pd(a.v)); }
inline MaskD lt(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskD le(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskD is_nan(VecD a) { return {_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)}; }
inline VecD select(MaskD mask, VecD a, VecD b) { return VecD(_mm256_blendv_pd(b.v, a.v, mask.m)); }
inline MaskD operator&(MaskD a, MaskD b) { return {_mm256_and_pd(a.m, b.m)}; }
inline VecD copysign(VecD a, VecD sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return VecD(_mm256_or_pd(_mm256_andnot_pd(bit, a.v), _mm256_and_pd(bit, sign.v)));
}

template <class A>
inline auto first_n(int64_t n) {
  if constexpr (std::is_same_v<A, float>) {
    return MaskF{_mm256_castsi256_ps(lane_mask32(n))};
  } else {
    return MaskD{_mm256_castsi256_pd(lane_mask64(n))};
  }
}
template <class A>
inline auto load_mask(const bool* p, int64_t n) {
  alignas(8) uint8_t buffer[8] = {};
  std::memcpy(buffer, p, n);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(buffer));
  if constexpr (std::is_same_v<A, float>) {
    return MaskF{_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256()))};
  } else {
    return MaskD{_mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_cvtepu8_epi64(bytes), _mm256_setzero_si256()))};
  }
}

inline float reduce_add(VecF a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(VecF a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline double reduce_add(VecD a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
inline double reduce_max(VecD a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}

inline void unzip(VecF* a, VecF* b) {
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a->v, b->v, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a->v, b->v, 0xdd));
  a->v = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)), b->v = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
inline void zip(VecF* a, VecF* b) {
  const __m256 low = _mm256_unpacklo_ps(a->v, b->v), high = _mm256_unpackhi_ps(a->v, b->v);
  a->v = _mm256_permute2f128_ps(low, high, 0x20), b->v = _mm256_permute2f128_ps(low, high, 0x31);
}
inline void unzip(VecD* a, VecD* b) {
  const __m256d even = _mm256_unpacklo_pd(a->v, b->v), odd = _mm256_unpackhi_pd(a->v, b->v);
  a->v = _mm256_permute4x64_pd(even, 0xd8), b->v = _mm256_permute4x64_pd(odd, 0xd8);
}
inline void zip(VecD* a, VecD* b) {
  const __m256d low = _mm256_unpacklo_pd(a->v, b->v), high = _mm256_unpackhi_pd(a->v, b->v);
  a->v = _mm256_permute2f128_pd(low, high, 0x20), b->v = _mm256_permute2f128_pd(low, high, 0x31);
}

// p * 2^n for integral n in [-253, 254], in two steps so that subnormal results round once.
inline VecF scale_by_power(VecF p, __m256i n) {
  const __m256i half = _mm256_srai_epi32(n, 1), rest = _mm256_sub_epi32(n, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return VecF(_mm256_mul_ps(_mm256_mul_ps(p.v, a), b));
}
inline VecF round_nearest(VecF x) { return VecF(_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
// 2^x * p for the polynomial p of exp2 below and the rounded x.
inline VecF scale_by_rounded(VecF p, VecF rounded) { return scale_by_power(p, _mm256_cvtps_epi32(rounded.v)); }

struct VecU32 {
  static constexpr int kLanes = 8;
  __m256i v;
  VecU32() = default;
  explicit VecU32(__m256i x) : v(x) {}
  explicit VecU32(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
  static VecU32 iota(uint32_t start) {
    return VecU32(
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(start)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
};
inline VecU32 operator+(VecU32 a, VecU32 b) { return VecU32(_mm256_add_epi32(a.v, b.v)); }
inline VecU32 operator^(VecU32 a, VecU32 b) { return VecU32(_mm256_xor_si256(a.v, b.v)); }
inline VecU32 shift_right(VecU32 a, int bits) { return VecU32(_mm256_srli_epi32(a.v, bits)); }
inline void mul_hi_lo(VecU32 a, uint32_t b, VecU32* hi, VecU32* lo) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  *lo = VecU32(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  *hi = VecU32(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
}
inline MaskF ge_unsigned(VecU32 a, uint32_t bound) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(bound));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, limit), a.v))};
}
inline VecF keep(MaskF mask, VecF x) { return VecF(_mm256_and_ps(mask.m, x.v)); }

// The first and the second number of every pair.
inline void unzip(BFloat16, VecF pairs, VecF (&number)[2]) {
  const __m256i bits = _mm256_castps_si256(pairs.v);
  number[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  number[1].v = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void unzip(Half, VecF pairs, VecF (&number)[2]) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13,
                                         2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_castps_si256(pairs.v), order), 0xd8);
  number[0].v = _mm256_cvtph_ps(_mm256_castsi256_si128(sorted));
  number[1].v = _mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1));
}

// 8 x 8: pairs within 128-bit halves, then quads, then halves exchanged.
inline void transpose(VecF (&block)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(block[i].v, block[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(block[i].v, block[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    block[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    block[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

struct VecU64 {
  static constexpr int kLanes = 4;
  __m256i v;
  VecU64() = default;
  explicit VecU64(__m256i x) : v(x) {}
  explicit VecU64(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
  static VecU64 counters(uint32_t start) {
    return VecU64(_mm256_add_epi64(_mm256_set1_epi64x(start), _mm256_setr_epi64x(0, 2, 1, 3)));
  }
};
inline VecU64 operator^(VecU64 a, VecU64 b) { return VecU64(_mm256_xor_si256(a.v, b.v)); }
inline void mul_hi_lo(VecU64 a, uint32_t b, VecU64* hi, VecU64* lo) {
  lo->v = _mm256_mul_epu32(a.v, _mm256_set1_epi32(static_cast<int>(b)));
  hi->v = _mm256_srli_epi64(lo->v, 32);
}
constexpr int kWordVectors = 2;
inline void words_in_order(VecU64 a, VecU64 b, VecU64 c, VecU64 d, VecU32* words) {
  const __m256i ab = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa);
  const __m256i cd = _mm256_blend_epi32(c.v, _mm256_slli_epi64(d.v, 32), 0xaa);
  words[0] = VecU32(_mm256_unpacklo_epi64(ab, cd)), words[1] = VecU32(_mm256_unpackhi_epi64(ab, cd));
}
