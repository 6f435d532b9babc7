// Activations of the feed-forward network and their derivatives, in the accumulation dtype.
//
// gelu(x) = x Φ(x), Φ the normal distribution. Φ(-|x|) = e^{-x²/2} R(|x|), R a polynomial in t = 1 / (1 + 0.33 |x|)
// without constant term, fitted to minimax relative error 5.5e-8 on |x| <= 14 (beyond, the exponential is 0 in
// float32): no 1 - erf, so nothing cancels. gelu_tanh and silu are x times a logistic function (tanh(u) = 2 sigmoid(2u)
// - 1): nothing cancels near 0 either.

struct Gauss {
  VecF x;        // within [-30, 30], where the rest is 0 at the ends: an infinite x gives no infinity times zero
  VecF tail;     // Φ(-|x|)
  VecF density;  // e^{-x²/2}, without 1/sqrt(2π)
};
inline Gauss gauss(VecF x) {
  x = max(VecF(-30.0f), min(VecF(30.0f), x));
  const VecF t = VecF(1.0f) / fma(VecF(0.33f), abs(x), VecF(1.0f));
  VecF r = fma(t, VecF(-0.020807540f), VecF(0.12307973f));
  r = fma(r, t, VecF(-0.26718589f));
  r = fma(r, t, VecF(0.22463044f));
  r = fma(r, t, VecF(-0.056526761f));
  r = fma(r, t, VecF(0.12181926f));
  r = fma(r, t, VecF(0.11106584f));
  r = fma(r, t, VecF(0.13230279f));
  r = fma(r, t, VecF(0.13162216f));
  const VecF density = exp(x * x * VecF(-0.5f));
  return {x, density * (r * t), density};
}

struct Relu {
  template <class V>
  static V value(V x) {
    return max(V::zero(), x);
  }
  template <class V>
  static V slope(V x, V* value) {
    *value = max(V::zero(), x);
    return select(le(x, V::zero()), V::zero(), V(1));
  }
};

struct Gelu {
  static VecF value(VecF x) {
    const Gauss g = gauss(x);
    return fnma(abs(g.x), g.tail, max(VecF::zero(), x));
  }
  static VecF slope(VecF x, VecF* value) {
    const Gauss g = gauss(x);
    *value = fnma(abs(g.x), g.tail, max(VecF::zero(), x));
    const VecF distribution = select(lt(x, VecF::zero()), g.tail, VecF(1.0f) - g.tail);
    return fma(g.x * VecF(0.39894228f), g.density, distribution);  // Φ + x φ
  }
  static VecD value(VecD x) {
    return per_lane(x, [](double t) { return 0.5 * t * std::erfc(t * -M_SQRT1_2); });
  }
  static VecD slope(VecD x, VecD* value_out) {
    *value_out = value(x);
    return per_lane(x, [](double t) {
      return 0.5 * std::erfc(t * -M_SQRT1_2) + t * std::exp(-0.5 * t * t) * (0.5 * M_SQRT1_2 * M_2_SQRTPI);
    });
  }
};

struct GeluTanh {
  // 2u = 2 sqrt(2/π) (x + 0.044715 x³)
  template <class V>
  static V value(V x) {
    const V twice_u = x * fma(x * x, V(0.071354816272600248), V(1.5957691216057308));
    return x / (V(1) + exp(V::zero() - twice_u));
  }
  template <class V>
  static V slope(V x, V* value) {
    const V square = x * x;
    const V twice_u = x * fma(square, V(0.071354816272600248), V(1.5957691216057308));
    const V gate = V(1) / (V(1) + exp(V::zero() - twice_u));
    *value = x * gate;
    const V growth = fma(square, V(0.21406444881780074), V(1.5957691216057308));
    return fma(*value * (V(1) - gate), growth, gate);
  }
};

struct Silu {
  template <class V>
  static V value(V x) {
    return x / (V(1) + exp(V::zero() - x));
  }
  template <class V>
  static V slope(V x, V* value) {
    const V gate = V(1) / (V(1) + exp(V::zero() - x));
    *value = x * gate;
    return fma(*value, V(1) - gate, gate);
  }
};

// f with the activation's type: `with_activation(p.activation, [&](auto activation) { using F = decltype(activation);
// ... })`.
template <class Function>
inline void with_activation(Activation activation, Function&& f) {
  switch (activation) {
    case Activation::kRelu:
      f(Relu{});
      break;
    case Activation::kGelu:
      f(Gelu{});
      break;
    case Activation::kGeluTanh:
      f(GeluTanh{});
      break;
    case Activation::kSilu:
      f(Silu{});
      break;
  }
}
