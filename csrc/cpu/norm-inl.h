// Layer normalization (Ba, Kiros, Hinton, 2016) and RMS normalization (Zhang, Sennrich, 2019), one row at a time.
// Contract: NormForwardParams and NormBackwardParams in params.h.
//
//   h = dropout(x) + residual       mean = Σh / N (0 for rms)       rstd = 1 / sqrt(Σ(h - mean)² / N + eps)
//   xhat = (h - mean) rstd          y = xhat w + b
//
//   g = dy w    c1 = Σg / N (0 for rms)    c2 = Σ(g xhat) / N       dh_total = dh + rstd (g - c1 - xhat c2)
//   dx = dropout mask · dh_total    dweight = Σ_rows dy xhat        dbias = Σ_rows dy
//
// The variance is centred (a second pass over a row that the first left in cache), so a large mean cancels nothing.
// dweight and dbias: every chunk of rows adds up its own partial sums, norm_backward_reduce adds the chunks in order.
// Chunks depend on the shape alone, so the result does not depend on threads.

// A whole vector, and the last n < kLanes columns of a row.
template <class A>
struct WholeVector {
  template <class T>
  Vec<A> load(const T* p) const {
    return Vec<A>::load(p);
  }
  template <class T>
  void store(Vec<A> x, T* p) const {
    x.store(p);
  }
  Vec<A> only(Vec<A> x) const { return x; }
};
template <class A>
struct PartVector {
  int64_t n;
  template <class T>
  Vec<A> load(const T* p) const {
    return Vec<A>::load_n(p, n);
  }
  template <class T>
  void store(Vec<A> x, T* p) const {
    x.store_n(p, n);
  }
  // Zero in the lanes beyond the row.
  Vec<A> only(Vec<A> x) const { return select(first_n<A>(n), x, Vec<A>::zero()); }
};

// f(column, slot, vector) over the vectors of n columns; consecutive calls use slots 0 to 3, so that four sums hide the
// add's latency.
template <class A, class F>
inline void each_vector(int64_t n, F f) {
  constexpr int kLanes = Vec<A>::kLanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(i, 0, WholeVector<A>{});
    f(i + kLanes, 1, WholeVector<A>{});
    f(i + 2 * kLanes, 2, WholeVector<A>{});
    f(i + 3 * kLanes, 3, WholeVector<A>{});
  }
  for (; i + kLanes <= n; i += kLanes) f(i, 0, WholeVector<A>{});
  if (i < n) f(i, 1, PartVector<A>{n - i});
}

// No default member initializer: a constructor that the compiler writes itself is compiled outside the target region.
template <class A>
struct FourSums {
  Vec<A> slot[4];
  static FourSums zero() { return {{Vec<A>::zero(), Vec<A>::zero(), Vec<A>::zero(), Vec<A>::zero()}}; }
  A total() const { return reduce_add((slot[0] + slot[1]) + (slot[2] + slot[3])); }
};

// A vector of n parameters in the accumulation dtype: `values` itself where it already is, else widened into `scratch`;
// all `fill` where there is none.
template <class A>
inline const A* widened(const void* values, DType dtype, int64_t n, A fill, A* scratch) {
  if (values == nullptr) {
    std::fill(scratch, scratch + n, fill);
    return scratch;
  }
  if (dtype == (std::is_same_v<A, float> ? DType::kFloat32 : DType::kFloat64)) return static_cast<const A*>(values);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* p = static_cast<const T*>(values);
    for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<A>(to_acc(p[i]));
  });
  return scratch;
}

// Dropout factors are drawn this many columns at a time, so that they stay in the first cache.
constexpr int64_t kDropoutColumns = 512;
constexpr int64_t kDropoutScratch = kDropoutColumns + 64;

// out = x · (dropout factor of row) + addend; addend may be null.
template <class T>
inline void drop_and_add(const T* x, const T* addend, T* out, int64_t n, const Dropout& dropout, int64_t row,
                         float* factor) {
  using A = Acc<T>;
  // Factors are float32: for float64 they are 0 or 1, and the scale is applied apart.
  Dropout drawn = dropout;
  if (std::is_same_v<A, double>) drawn.scale = 1;
  const Vec<A> scale(static_cast<A>(dropout.scale / drawn.scale));
  for (int64_t begin = 0; begin < n; begin += kDropoutColumns) {
    const int64_t count = std::min(kDropoutColumns, n - begin);
    if (dropout.threshold > 0) {
      dropout_factors(drawn, begin, count, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), factor);
    }
    each_vector<A>(count, [&](int64_t i, int, auto vector) {
      Vec<A> value = vector.load(x + begin + i);
      if (dropout.threshold > 0) value = value * (vector.load(factor + i) * scale);
      if (addend != nullptr) value = value + vector.load(addend + begin + i);
      vector.store(value, out + begin + i);
    });
  }
}

template <class A>
struct Moments {
  A mean, variance;
};

// Mean and variance in two passes. The second also adds up the deviations, which would be zero for an exact mean: they
// correct it.
template <class T>
inline Moments<Acc<T>> row_moments(const T* x, int64_t n) {
  using A = Acc<T>;
  FourSums<A> sum = FourSums<A>::zero(), deviations = sum, squares = sum;
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) { sum.slot[slot] = sum.slot[slot] + vector.load(x + i); });
  const A mean = sum.total() / static_cast<A>(n);
  const Vec<A> centre(mean);
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) {
    const Vec<A> d = vector.only(vector.load(x + i) - centre);
    deviations.slot[slot] = deviations.slot[slot] + d;
    squares.slot[slot] = fma(d, d, squares.slot[slot]);
  });
  const A error = deviations.total() / static_cast<A>(n);
  return {mean + error, squares.total() / static_cast<A>(n) - error * error};
}

template <class T>
inline Acc<T> row_mean_square(const T* x, int64_t n) {
  using A = Acc<T>;
  FourSums<A> squares = FourSums<A>::zero();
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) {
    const Vec<A> value = vector.load(x + i);
    squares.slot[slot] = fma(value, value, squares.slot[slot]);
  });
  return squares.total() / static_cast<A>(n);
}

// y = (x - mean) rstd w + b, and the next row on its way into the cache meanwhile.
template <bool kBias, class T>
inline void normalize_row(const T* x, T* y, int64_t n, Acc<T> mean, Acc<T> rstd, const Acc<T>* weight,
                          const Acc<T>* bias, const T* next) {
  using A = Acc<T>;
  const Vec<A> centre(mean), scale(rstd);
  each_vector<A>(n, [&](int64_t i, int, auto vector) {
    __builtin_prefetch(next + i);
    const Vec<A> xhat = (vector.load(x + i) - centre) * scale;
    if constexpr (kBias) {
      vector.store(fma(xhat, vector.load(weight + i), vector.load(bias + i)), y + i);
    } else {
      vector.store(xhat * vector.load(weight + i), y + i);
    }
  });
}

template <class T>
inline void norm_forward_rows(const NormForwardParams& p, Range range) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  ScratchCursor scratch(thread_scratch(2 * (n * sizeof(A) + 64) + kDropoutScratch * sizeof(float)));
  const A* weight = widened<A>(p.weight, p.weight_dtype, n, A(1), scratch.take<A>(n));
  const A* bias = p.bias ? widened<A>(p.bias, p.weight_dtype, n, A(0), scratch.take<A>(n)) : nullptr;
  float* factor = scratch.take<float>(kDropoutScratch);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* next = row + 1 < range.end ? x + p.x_stride : x;
    if (p.h != nullptr) {
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
      T* h = static_cast<T*>(p.h) + row * n;
      drop_and_add(x, residual, h, n, p.dropout, row, factor);
      x = h;
    }
    const Moments<A> moments = p.rms ? Moments<A>{A(0), row_mean_square(x, n)} : row_moments(x, n);
    const A mean = moments.mean, rstd = A(1) / std::sqrt(moments.variance + static_cast<A>(p.eps));
    if (!p.rms) static_cast<A*>(p.mean)[row] = mean;
    static_cast<A*>(p.rstd)[row] = rstd;
    T* y = static_cast<T*>(p.y) + row * n;
    if (bias != nullptr) {
      normalize_row<true>(x, y, n, mean, rstd, weight, bias, next);
    } else {
      normalize_row<false>(x, y, n, mean, rstd, weight, bias, next);
    }
  }
}

// One row of the backward pass: its pointers, and what its statistics make of it.
template <class T>
struct BackwardRow {
  using A = Acc<T>;
  const T *dy, *dh, *h;
  T* dh_total;
  A mean, rstd, rstd_c1, rstd_c2;
};

template <class T>
inline BackwardRow<T> backward_row(const NormBackwardParams& p, int64_t row, const Acc<T>* weight) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  BackwardRow<T> r;
  r.dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
  r.dh = p.dh ? static_cast<const T*>(p.dh) + row * p.dh_stride : nullptr;
  r.h = static_cast<const T*>(p.h) + row * p.h_stride;
  r.dh_total = static_cast<T*>(p.dh_total) + row * n;
  r.mean = p.rms ? A(0) : static_cast<const A*>(p.mean)[row];
  r.rstd = static_cast<const A*>(p.rstd)[row];
  FourSums<A> sum_g = FourSums<A>::zero(), sum_gd = sum_g;
  const Vec<A> centre(r.mean);
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) {
    const Vec<A> g = vector.load(r.dy + i) * vector.load(weight + i);
    sum_g.slot[slot] = sum_g.slot[slot] + g;
    sum_gd.slot[slot] = fma(g, vector.load(r.h + i) - centre, sum_gd.slot[slot]);
  });
  const A over_n = A(1) / static_cast<A>(n);
  r.rstd_c1 = p.rms ? A(0) : r.rstd * (sum_g.total() * over_n);
  r.rstd_c2 = r.rstd * (sum_gd.total() * r.rstd * over_n);
  return r;
}

// Which sums over rows the backward pass keeps.
enum class NormSums { kNone, kWeight, kWeightAndBias };

// dh_total of kRows rows, and their share of the sums: a sum is loaded and stored once for all of them.
template <int kRows, NormSums kSums, class T>
inline void backward_rows(const BackwardRow<T>* r, int64_t n, const Acc<T>* weight, Acc<T>* dweight, Acc<T>* dbias) {
  using A = Acc<T>;
  each_vector<A>(n, [&](int64_t i, int, auto vector) {
    const Vec<A> w = vector.load(weight + i);
    Vec<A> weight_sum, bias_sum;
    if constexpr (kSums != NormSums::kNone) weight_sum = vector.load(dweight + i);
    if constexpr (kSums == NormSums::kWeightAndBias) bias_sum = vector.load(dbias + i);
    for (int k = 0; k < kRows; ++k) {
      const Vec<A> dy = vector.load(r[k].dy + i), rstd(r[k].rstd);
      const Vec<A> xhat = (vector.load(r[k].h + i) - Vec<A>(r[k].mean)) * rstd;
      if constexpr (kSums != NormSums::kNone) weight_sum = fma(dy, xhat, weight_sum);
      if constexpr (kSums == NormSums::kWeightAndBias) bias_sum = bias_sum + dy;
      Vec<A> dh = fnma(xhat, Vec<A>(r[k].rstd_c2), rstd * (dy * w) - Vec<A>(r[k].rstd_c1));
      if (r[k].dh != nullptr) dh = dh + vector.load(r[k].dh + i);
      vector.store(dh, r[k].dh_total + i);
    }
    if constexpr (kSums != NormSums::kNone) vector.store(weight_sum, dweight + i);
    if constexpr (kSums == NormSums::kWeightAndBias) vector.store(bias_sum, dbias + i);
  });
}

template <NormSums kSums, class T>
inline void norm_backward_chunk(const NormBackwardParams& p, Range rows, const Acc<T>* weight, Acc<T>* dweight,
                                Acc<T>* dbias, float* factor) {
  constexpr int kRows = 4;
  const int64_t n = p.columns;
  // Four rows of dy, h and dh_total have to stay in the second cache between the two passes.
  const bool blocked = n * static_cast<int64_t>(sizeof(T)) <= 32768;
  for (int64_t row = rows.begin; row < rows.end;) {
    BackwardRow<T> block[kRows];
    const int count = blocked && row + kRows <= rows.end ? kRows : 1;
    for (int k = 0; k < count; ++k) block[k] = backward_row<T>(p, row + k, weight);
    if (count == kRows) {
      backward_rows<kRows, kSums>(block, n, weight, dweight, dbias);
    } else {
      backward_rows<1, kSums>(block, n, weight, dweight, dbias);
    }
    for (int k = 0; k < count && p.dropout.threshold > 0; ++k) {
      T* dx = static_cast<T*>(p.dx) + (row + k) * n;
      drop_and_add<T>(block[k].dh_total, nullptr, dx, n, p.dropout, row + k, factor);
    }
    row += count;
  }
}

template <class T>
inline void norm_backward_chunks(const NormBackwardParams& p, Range range) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  ScratchCursor scratch(thread_scratch(n * sizeof(A) + 64 + kDropoutScratch * sizeof(float)));
  const A* weight = widened<A>(p.weight, p.weight_dtype, n, A(1), scratch.take<A>(n));
  float* factor = scratch.take<float>(kDropoutScratch);
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const Range rows{chunk * p.chunk_rows, std::min((chunk + 1) * p.chunk_rows, p.rows)};
    if (p.partial_dweight == nullptr) {
      norm_backward_chunk<NormSums::kNone, T>(p, rows, weight, nullptr, nullptr, factor);
      continue;
    }
    A* dweight = static_cast<A*>(p.partial_dweight) + chunk * n;
    std::fill(dweight, dweight + n, A(0));
    if (p.partial_dbias == nullptr) {
      norm_backward_chunk<NormSums::kWeight, T>(p, rows, weight, dweight, nullptr, factor);
      continue;
    }
    A* dbias = static_cast<A*>(p.partial_dbias) + chunk * n;
    std::fill(dbias, dbias + n, A(0));
    norm_backward_chunk<NormSums::kWeightAndBias, T>(p, rows, weight, dweight, dbias, factor);
  }
}

// out[i] = Σ_chunks partial[chunk][i] for the columns of `range`, rounded once.
template <class A, class W>
inline void reduce_partials(const A* partial, int64_t chunks, int64_t n, Range range, W* out) {
  if constexpr (std::is_same_v<A, double>) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      A sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * n + i];
      out[i] = from_acc<W>(sum);
    }
  } else {
    each_vector<A>(range.end - range.begin, [&](int64_t i, int, auto vector) {
      Vec<A> sum = Vec<A>::zero();
      const A* column = partial + range.begin + i;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + vector.load(column + chunk * n);
      vector.store(sum, out + range.begin + i);
    });
  }
}

inline void norm_forward(const NormForwardParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { norm_forward_rows<std::remove_pointer_t<decltype(type)>>(p, range); });
}

inline void norm_backward(const NormBackwardParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { norm_backward_chunks<std::remove_pointer_t<decltype(type)>>(p, range); });
}

inline void norm_backward_reduce(const NormBackwardParams& p, Range range) {
  const int64_t chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
  const auto reduce = [&](const void* partial, auto* out) {
    using W = std::remove_pointer_t<decltype(out)>;
    if (out == nullptr) return;
    if (p.dtype == DType::kFloat64) {
      if constexpr (std::is_same_v<W, double> || std::is_same_v<W, float>) {
        reduce_partials(static_cast<const double*>(partial), chunks, p.columns, range, out);
      }
    } else if constexpr (!std::is_same_v<W, double>) {
      reduce_partials(static_cast<const float*>(partial), chunks, p.columns, range, out);
    }
  };
  dispatch(p.weight_dtype, [&](auto* type) {
    reduce(p.partial_dweight, static_cast<decltype(type)>(p.dweight));
    reduce(p.partial_dbias, static_cast<decltype(type)>(p.dbias));
  });
}
