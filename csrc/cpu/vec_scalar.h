// Vec<T> of one lane: the readable twin of vec_avx2.h and vec_avx512.h, and the contract they follow.
//
// A Vec<float> holds kLanes float32 lanes, a Vec<double> half as many. Loads widen 16-bit storage, stores round to
// nearest even. load_n / store_n touch the first n lanes only (0 <= n <= kLanes); the other lanes load as zero.

template <class A>
struct Vec {
  static constexpr int kLanes = 1;
  A v;
  Vec() = default;
  explicit Vec(A x) : v(x) {}

  static Vec zero() { return Vec(A(0)); }
  template <class T>
  static Vec load(const T* p) {
    return Vec(static_cast<A>(to_acc(*p)));
  }
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    return n > 0 ? load(p) : zero();
  }
  // kLanes pairs of 16-bit numbers, one a lane (float only).
  template <class T>
  static Vec load_pairs(const T* p) {
    return load_pairs_n(p, 2);
  }
  template <class T>
  static Vec load_pairs_n(const T* p, int64_t n) {
    Vec pair = zero();
    std::memcpy(&pair.v, p, n * sizeof(T));
    return pair;
  }
  template <class T>
  void store(T* p) const {
    *p = from_acc<T>(v);
  }
  template <class T>
  void store_n(T* p, int64_t n) const {
    if (n > 0) store(p);
  }
  // Past the caches, for what nobody reads soon; p is a multiple of the bytes stored. finish_streams() before another
  // thread may read.
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  // Lane i holds start + i.
  static Vec iota(A start) { return Vec(start); }
};

using VecF = Vec<float>;
using VecD = Vec<double>;
inline void finish_streams() {}
using MaskF = bool;
using MaskD = bool;

template <class A>
inline Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v + b.v);
}
template <class A>
inline Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v - b.v);
}
template <class A>
inline Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v * b.v);
}
template <class A>
inline Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v / b.v);
}
// a * b + c and c - a * b, rounded once where the ISA fuses.
template <class A>
inline Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return Vec<A>(a.v * b.v + c.v);
}
template <class A>
inline Vec<A> fnma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return Vec<A>(c.v - a.v * b.v);
}
// As the x86 instructions: the second operand if either is NaN.
template <class A>
inline Vec<A> max(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v > b.v ? a.v : b.v);
}
template <class A>
inline Vec<A> min(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v < b.v ? a.v : b.v);
}
template <class A>
inline Vec<A> abs(Vec<A> a) {
  return Vec<A>(std::fabs(a.v));
}
template <class A>
inline Vec<A> sqrt(Vec<A> a) {
  return Vec<A>(std::sqrt(a.v));
}
template <class A>
inline A reduce_add(Vec<A> a) {
  return a.v;
}
template <class A>
inline A reduce_max(Vec<A> a) {
  return a.v;
}
template <class A>
inline bool lt(Vec<A> a, Vec<A> b) {
  return a.v < b.v;
}
template <class A>
inline bool le(Vec<A> a, Vec<A> b) {
  return a.v <= b.v;
}
template <class A>
inline bool is_nan(Vec<A> a) {
  return a.v != a.v;
}
// mask ? a : b
template <class A>
inline Vec<A> select(bool mask, Vec<A> a, Vec<A> b) {
  return mask ? a : b;
}
// A mask with the first n lanes set.
template <class A>
inline bool first_n(int64_t n) {
  return n > 0;
}
// A mask set where p[i] is true.
template <class A>
inline bool load_mask(const bool* p, int64_t n) {
  return n > 0 && *p;
}
// Sign bit of `sign` on the magnitude of `a`.
template <class A>
inline Vec<A> copysign(Vec<A> a, Vec<A> sign) {
  return Vec<A>(std::copysign(a.v, sign.v));
}
// a and b hold consecutive pairs; unzip leaves the first of each pair in a and the second in b, zip puts them back.
template <class A>
inline void unzip(Vec<A>*, Vec<A>*) {}
template <class A>
inline void zip(Vec<A>*, Vec<A>*) {}
inline Vec<float> round_nearest(Vec<float> a) { return Vec<float>(std::nearbyint(a.v)); }
// p * 2^rounded for an integral `rounded`.
inline Vec<float> scale_by_rounded(Vec<float> p, Vec<float> rounded) {
  return Vec<float>(std::ldexp(p.v, static_cast<int>(rounded.v)));
}

// 32-bit integer lanes, as many as Vec<float>: what Philox needs.
struct VecU32 {
  static constexpr int kLanes = 1;
  uint32_t v;
  VecU32() = default;
  explicit VecU32(uint32_t x) : v(x) {}
  static VecU32 iota(uint32_t start) { return VecU32(start); }
};
inline VecU32 operator+(VecU32 a, VecU32 b) { return VecU32(a.v + b.v); }
inline VecU32 operator^(VecU32 a, VecU32 b) { return VecU32(a.v ^ b.v); }
inline VecU32 shift_right(VecU32 a, int bits) { return VecU32(a.v >> bits); }
inline void mul_hi_lo(VecU32 a, uint32_t b, VecU32* hi, VecU32* lo) {
  const uint64_t product = static_cast<uint64_t>(a.v) * b;
  *hi = VecU32(static_cast<uint32_t>(product >> 32));
  *lo = VecU32(static_cast<uint32_t>(product));
}
// Lanes with a >= bound.
inline bool ge_unsigned(VecU32 a, uint32_t bound) { return a.v >= bound; }
// keep ? x * scale : 0 for a Vec<float>.
inline Vec<float> keep(bool mask, Vec<float> x) { return mask ? x : Vec<float>::zero(); }

// The first and the second number of every pair of T.
template <class T>
inline void unzip(T, VecF pairs, VecF (&number)[2]) {
  T half[2];
  std::memcpy(half, &pairs.v, sizeof half);
  for (int i = 0; i < 2; ++i) number[i] = VecF(to_acc(half[i]));
}

// block[i] lane j <-> block[j] lane i, for kLanes vectors.
inline void transpose(VecF (&)[1]) {}

// 32-bit numbers in 64-bit lanes: a product needs one multiplication instead of VecU32's two. What is above bit 31 is
// noise, which nothing looks at.
struct VecU64 {
  static constexpr int kLanes = 1;
  uint64_t v;
  VecU64() = default;
  explicit VecU64(uint32_t x) : v(x) {}
  // start, start + 1, ... in the order that words_in_order undoes.
  static VecU64 counters(uint32_t start) { return VecU64(start); }
};
inline VecU64 operator^(VecU64 a, VecU64 b) { return VecU64(a.v ^ b.v); }
inline void mul_hi_lo(VecU64 a, uint32_t b, VecU64* hi, VecU64* lo) {
  lo->v = (a.v & 0xffffffffu) * b;
  hi->v = lo->v >> 32;
}
// words = a, b, c, d of the first counter, then of the second, ...: 4 * VecU64::kLanes words in kWordVectors vectors.
constexpr int kWordVectors = 4;
inline void words_in_order(VecU64 a, VecU64 b, VecU64 c, VecU64 d, VecU32* words) {
  words[0] = VecU32(static_cast<uint32_t>(a.v)), words[1] = VecU32(static_cast<uint32_t>(b.v));
  words[2] = VecU32(static_cast<uint32_t>(c.v)), words[3] = VecU32(static_cast<uint32_t>(d.v));
}
