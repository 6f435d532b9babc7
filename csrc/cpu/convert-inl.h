// Storage dtypes: conversion to and from the accumulation dtype, the choice of one at run time, addresses of rows.

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }

inline float to_acc(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline float to_acc(Half x) {
  // Shift exponent and mantissa into place and scale by 2^112 to correct the bias; inf and NaN have exponent 31.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  y *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &y, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits = 0x7f800000u | (static_cast<uint32_t>(x.bits & 0x3ff) << 13);
  bits |= sign;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

template <class T, class A>
inline T from_acc(A x);

template <>
inline float from_acc<float, float>(float x) {
  return x;
}
template <>
inline double from_acc<double, double>(double x) {
  return x;
}
template <>
inline float from_acc<float, double>(double x) {
  return static_cast<float>(x);
}
template <>
inline BFloat16 from_acc<BFloat16, float>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half from_acc<Half, float>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return Half{static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return Half{static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65520 or more: inf
  if (bits < 0x38800000) {
    // Subnormal half: adding 2^-1 aligns the mantissa so that the hardware rounds it to nearest even.
    float y;
    std::memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    std::memcpy(&bits, &y, sizeof bits);
    return Half{static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return Half{static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
}

// Call f with a null pointer of the storage type of `dtype`: `dispatch(p.dtype, [&](auto* type) { using T = ...; })`.
template <class F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      f(static_cast<float*>(nullptr));
      break;
#if defined(FASTATTN_TARGET_REDUCED_PRECISION)  // a table for float32 alone
    default:
      break;
#else
    case DType::kFloat64:
      f(static_cast<double*>(nullptr));
      break;
    case DType::kFloat16:
      f(static_cast<Half*>(nullptr));
      break;
    case DType::kBFloat16:
      f(static_cast<BFloat16*>(nullptr));
      break;
    case DType::kBool:
      break;
#endif
  }
}

// Row `row` of a head of a (batch, heads, rows, channels) tensor.
template <class S>
inline const S* row_at(const void* data, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t row) {
  return static_cast<const S*>(data) + b * stride[0] + h * stride[1] + row * stride[2];
}
template <class S>
inline S* row_at(void* data, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t row) {
  return const_cast<S*>(row_at<S>(static_cast<const void*>(data), stride, b, h, row));
}
