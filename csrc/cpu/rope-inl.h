// Rotary position embedding (Su et al., "RoFormer", 2021). Contract: RopeParams in params.h.
//
//   first  = a cos - b sin        with (a, b) = (x[i], x[i + half_dim])   half layout (GPT-NeoX, Llama in transformers)
//   second = b cos + a sin                   = (x[2i], x[2i + 1])         interleaved layout (GPT-J, Llama's own
//   weights)
// Channels from 2 * half_dim on are copied.

template <class T>
inline void rope_row_half(const T* x, T* y, const Acc<T>* cos, const Acc<T>* sin, Acc<T> sign, int64_t half_dim) {
  using V = Vec<Acc<T>>;
  for (int64_t i = 0; i < half_dim; i += V::kLanes) {
    const int64_t n = std::min<int64_t>(V::kLanes, half_dim - i);
    const V a = V::load_n(x + i, n), b = V::load_n(x + half_dim + i, n);
    const V c = V::load_n(cos + i, n), s = V::load_n(sin + i, n) * V(sign);
    fnma(b, s, a * c).store_n(y + i, n);
    fma(a, s, b * c).store_n(y + half_dim + i, n);
  }
}

template <class T>
inline void rope_row_interleaved(const T* x, T* y, const Acc<T>* cos, const Acc<T>* sin, Acc<T> sign,
                                 int64_t half_dim) {
  for (int64_t i = 0; i < half_dim; ++i) {
    const Acc<T> a = to_acc(x[2 * i]), b = to_acc(x[2 * i + 1]), s = sin[i] * sign;
    y[2 * i] = from_acc<T>(a * cos[i] - b * s);
    y[2 * i + 1] = from_acc<T>(b * cos[i] + a * s);
  }
}

template <class T>
inline void rope_rows(const RopeParams& p, Range range) {
  using A = Acc<T>;
  for (int64_t item = range.begin; item < range.end; ++item) {
    const int64_t n = item % p.rows, h = item / p.rows % p.heads, b = item / p.rows / p.heads;
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + h * p.x_stride[1] + n * p.x_stride[2];
    T* y = static_cast<T*>(p.y) + b * p.y_stride[0] + h * p.y_stride[1] + n * p.y_stride[2];
    const int64_t angle = b * p.angle_stride_batch + n * p.half_dim;
    const A *cos = static_cast<const A*>(p.cos) + angle, *sin = static_cast<const A*>(p.sin) + angle;
    const A sign = p.conjugate ? A(-1) : A(1);
    if (p.interleaved) {
      rope_row_interleaved(x, y, cos, sin, sign, p.half_dim);
    } else {
      rope_row_half(x, y, cos, sin, sign, p.half_dim);
    }
    std::copy(x + 2 * p.half_dim, x + p.head_dim, y + 2 * p.half_dim);
  }
}

inline void rope(const RopeParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { rope_rows<std::remove_pointer_t<decltype(type)>>(p, range); });
}
