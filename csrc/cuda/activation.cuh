// Activations of the feed-forward network and their derivatives on CUDA: the formulas of cpu/activation-inl.h, eight
// values a call.
//
// Exponential and quotient are the hardware's (relative error of a few 2^-22): what is stored has 8 or 11 bits.
#pragma once

#include "cuda/common.cuh"

namespace fastattn {
namespace cuda {

// Consecutive columns of a row that one thread finishes: 16 bytes of a 16-bit dtype.
constexpr int kUnit = 8;

#if defined(__CUDACC__)
__device__ inline float fast_exp(float x) { return __expf(x); }
__device__ inline float fast_quotient(float x, float y) { return __fdividef(x, y); }
#else
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_quotient(float x, float y) { return x / y; }
#endif

// 1 / (1 + e^-x); beyond 88 the exponential is infinite, and past 2^126 the hardware's quotient is 0: the right limit.
__device__ inline float logistic(float x) { return fast_quotient(1.0f, 1.0f + fast_exp(-x)); }

struct Gauss {
  float x;        // within [-30, 30]
  float tail;     // Φ(-|x|)
  float density;  // e^{-x²/2}, without 1/sqrt(2π)
};
__device__ inline Gauss gauss(float x) {
  x = fmaxf(-30.0f, fminf(30.0f, x));
  const float t = fast_quotient(1.0f, fmaf(0.33f, fabsf(x), 1.0f));
  float r = fmaf(t, -0.020807540f, 0.12307973f);
  r = fmaf(r, t, -0.26718589f);
  r = fmaf(r, t, 0.22463044f);
  r = fmaf(r, t, -0.056526761f);
  r = fmaf(r, t, 0.12181926f);
  r = fmaf(r, t, 0.11106584f);
  r = fmaf(r, t, 0.13230279f);
  r = fmaf(r, t, 0.13162216f);
  const float density = fast_exp(x * x * -0.5f);
  return {x, density * (r * t), density};
}

// max(0, x) that keeps NaN.
__device__ inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }

// (act(x), act'(x)); what the caller drops is not computed.
struct Relu {
  static __device__ inline float value(float x, float* slope) {
    *slope = x <= 0.0f ? 0.0f : 1.0f;
    return positive_part(x);
  }
};

struct Gelu {
  static __device__ inline float value(float x, float* slope) {
    const Gauss g = gauss(x);
    // Φ + x φ
    *slope = fmaf(g.x * 0.39894228f, g.density, x < 0.0f ? g.tail : 1.0f - g.tail);
    return fmaf(-fabsf(g.x), g.tail, positive_part(x));
  }
};

struct GeluTanh {
  static __device__ inline float value(float x, float* slope) {
    const float square = x * x;
    const float gate = logistic(x * fmaf(square, 0.071354816272600248f, 1.5957691216057308f));
    const float value = x * gate, growth = fmaf(square, 0.21406444881780074f, 1.5957691216057308f);
    *slope = fmaf(value * (1.0f - gate), growth, gate);
    return value;
  }
};

struct Silu {
  static __device__ inline float value(float x, float* slope) {
    const float gate = logistic(x), value = x * gate;
    *slope = fmaf(value, 1.0f - gate, gate);
    return value;
  }
};

template <class F>
__device__ inline void activate_with(const float (&x)[kUnit], float (&value)[kUnit], float (&slope)[kUnit]) {
#pragma unroll
  for (int e = 0; e < kUnit; ++e) value[e] = F::value(x[e], &slope[e]);
}

// One branch for eight values, the same for the whole grid: a kernel serves every activation.
__device__ inline void activate(Activation activation, const float (&x)[kUnit], float (&value)[kUnit],
                                float (&slope)[kUnit]) {
  switch (activation) {
    case Activation::kRelu:
      return activate_with<Relu>(x, value, slope);
    case Activation::kGelu:
      return activate_with<Gelu>(x, value, slope);
    case Activation::kGeluTanh:
      return activate_with<GeluTanh>(x, value, slope);
    case Activation::kSilu:
      return activate_with<Silu>(x, value, slope);
  }
}

}  // namespace cuda
}  // namespace fastattn
