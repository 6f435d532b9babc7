// Rotary position embedding (Su et al., "RoFormer", 2021). Contract: RopeParams in params.h.
//
//   first  = a cos - b sin        with (a, b) = (x[i], x[i + half_dim])   half layout (GPT-NeoX, Llama in transformers)
//   second = b cos + a sin                   = (x[2i], x[2i + 1])         interleaved layout (GPT-J, Llama's own
//   weights)
// Channels from 2 * half_dim on are copied. y may be x: a pair is read before it is written.

template <class A>
struct Rotation {
  Vec<A> cos, sin;
  void turn(Vec<A>* a, Vec<A>* b) const {
    const Vec<A> first = fnma(*b, sin, *a * cos);
    *b = fma(*a, sin, *b * cos);
    *a = first;
  }
};

template <class T>
inline void rope_row_half(const T* x, T* y, const Acc<T>* cos, const Acc<T>* sin, Vec<Acc<T>> sign, int64_t half_dim) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  for (; i + V::kLanes <= half_dim; i += V::kLanes) {
    V a = V::load(x + i), b = V::load(x + half_dim + i);
    Rotation<Acc<T>>{V::load(cos + i), V::load(sin + i) * sign}.turn(&a, &b);
    a.store(y + i), b.store(y + half_dim + i);
  }
  if (i == half_dim) return;
  const int64_t n = half_dim - i;
  V a = V::load_n(x + i, n), b = V::load_n(x + half_dim + i, n);
  Rotation<Acc<T>>{V::load_n(cos + i, n), V::load_n(sin + i, n) * sign}.turn(&a, &b);
  a.store_n(y + i, n), b.store_n(y + half_dim + i, n);
}

template <class T>
inline void rope_row_interleaved(const T* x, T* y, const Acc<T>* cos, const Acc<T>* sin, Vec<Acc<T>> sign,
                                 int64_t half_dim) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  for (; i + V::kLanes <= half_dim; i += V::kLanes) {
    V a = V::load(x + 2 * i), b = V::load(x + 2 * i + V::kLanes);
    unzip(&a, &b);
    Rotation<Acc<T>>{V::load(cos + i), V::load(sin + i) * sign}.turn(&a, &b);
    zip(&a, &b);
    a.store(y + 2 * i), b.store(y + 2 * i + V::kLanes);
  }
  if (i == half_dim) return;
  const int64_t n = half_dim - i, n_b = std::max<int64_t>(2 * n - V::kLanes, 0), n_a = 2 * n - n_b;
  V a = V::load_n(x + 2 * i, n_a), b = V::load_n(x + 2 * i + n_a, n_b);
  unzip(&a, &b);
  Rotation<Acc<T>>{V::load_n(cos + i, n), V::load_n(sin + i, n) * sign}.turn(&a, &b);
  zip(&a, &b);
  a.store_n(y + 2 * i, n_a), b.store_n(y + 2 * i + n_a, n_b);
}

// Rows in x's memory order: what lies closer together, heads or positions, is the inner loop.
template <class T>
inline void rope_rows(const RopeParams& p, Range range) {
  using A = Acc<T>;
  const bool heads_inner = p.x_stride[1] < p.x_stride[2];
  const int64_t inner = heads_inner ? p.heads : p.rows, outer = heads_inner ? p.rows : p.heads;
  const int inner_axis = heads_inner ? 1 : 2;
  const int64_t x_step = p.x_stride[inner_axis], y_step = p.y_stride[inner_axis];
  const Vec<A> sign(p.conjugate ? A(-1) : A(1));
  for (int64_t item = range.begin; item < range.end;) {
    const int64_t run = item / inner, first = item % inner, b = run / outer, o = run % outer;
    const int64_t count = std::min(inner - first, range.end - item);
    const int64_t h = heads_inner ? first : o, n = heads_inner ? o : first;
    const T* x = row_at<T>(p.x, p.x_stride, b, h, n);
    T* y = row_at<T>(p.y, p.y_stride, b, h, n);
    const int64_t angle = b * p.angle_stride_batch + n * p.half_dim, angle_step = heads_inner ? 0 : p.half_dim;
    const A *cos = static_cast<const A*>(p.cos) + angle, *sin = static_cast<const A*>(p.sin) + angle;
    for (int64_t k = 0; k < count; ++k, x += x_step, y += y_step, cos += angle_step, sin += angle_step) {
      if (p.interleaved) {
        rope_row_interleaved(x, y, cos, sin, sign, p.half_dim);
      } else {
        rope_row_half(x, y, cos, sin, sign, p.half_dim);
      }
      if (2 * p.half_dim < p.head_dim && x != y) std::copy(x + 2 * p.half_dim, x + p.head_dim, y + 2 * p.half_dim);
    }
    item += count;
  }
}

inline void rope(const RopeParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { rope_rows<std::remove_pointer_t<decltype(type)>>(p, range); });
}
