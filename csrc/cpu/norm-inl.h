// Layer normalization (Ba, Kiros, Hinton, 2016) and RMS normalization (Zhang, Sennrich, 2019), one row at a time.
// Contract: NormForwardParams and NormBackwardParams in params.h.
//
//   h = dropout(x) + residual       mean = Σh / N (0 for rms)       rstd = 1 / sqrt(Σ(h - mean)² / N + eps)
//   xhat = (h - mean) rstd          y = xhat w + b
//
//   g = dy w    c1 = Σg / N (0 for rms)    c2 = Σ(g xhat) / N       dh_total = dh + rstd (g - c1 - xhat c2)
//   dx = dropout mask · dh_total    dweight = Σ_rows dy xhat        dbias = Σ_rows dy
//
// The variance is of deviations from the mean or near it, so a large mean cancels nothing.
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
  template <bool kStream, class T>
  void store_result(Vec<A> x, T* p) const {
    if constexpr (kStream) {
      x.stream(p);
    } else {
      x.store(p);
    }
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
  template <bool kStream, class T>
  void store_result(Vec<A> x, T* p) const {
    x.store_n(p, n);
  }
  // Zero in the lanes beyond the row.
  Vec<A> only(Vec<A> x) const { return select(first_n<A>(n), x, Vec<A>::zero()); }
};

// f(column, slot, vector) over the vectors of n columns; consecutive calls use slots 0 to 3. Always in line, and so are
// the f below: called, they keep every sum in memory, and the compiler's choice came and went with unrelated code.
#define FASTATTN_IN_LINE __attribute__((always_inline))
template <class A, class F>
FASTATTN_IN_LINE inline void each_vector(int64_t n, F f) {
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

// Rows taken together hide the latency of each other's sums and share the loads of parameters: as many as have room for
// their sums in registers. Rows wider than 16 bits are bound by memory, which likes one stream of each operand more
// than four. A row's own bits do not depend on the rows beside it.
constexpr int kShortRows = VecF::kLanes == 16 ? 4 : 2;
template <class T>
constexpr int kNormRows = sizeof(T) == 2 ? kShortRows : 1;

// No default member initializer: a constructor that the compiler writes itself is compiled outside the target region.
template <class A, int kSlots>
struct RowSum {
  Vec<A> slot[kSlots];
  static RowSum zero() {
    RowSum sum;
    for (Vec<A>& x : sum.slot) x = Vec<A>::zero();
    return sum;
  }
  void add(int i, Vec<A> x) { slot[i % kSlots] = slot[i % kSlots] + x; }
  void add_product(int i, Vec<A> x, Vec<A> y) { slot[i % kSlots] = fma(x, y, slot[i % kSlots]); }
  A total() const {
    if constexpr (kSlots == 4) {
      return reduce_add((slot[0] + slot[1]) + (slot[2] + slot[3]));
    } else {
      return reduce_add(slot[0] + slot[1]);
    }
  }
};
template <class T>
using ForwardSum = RowSum<Acc<T>, kNormRows<T> == 1 ? 4 : 2>;
template <class T>
using BackwardSum = RowSum<Acc<T>, 2>;

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
    if constexpr (std::is_same_v<A, float> && !std::is_same_v<T, double>) {
      const T* p = static_cast<const T*>(values);
      each_vector<A>(
          n, [&](int64_t i, int, auto vector) FASTATTN_IN_LINE { vector.store(vector.load(p + i), scratch + i); });
    } else if constexpr (std::is_same_v<T, float>) {
      std::copy_n(static_cast<const T*>(values), n, scratch);
    }
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
    each_vector<A>(count, [&](int64_t i, int, auto vector) FASTATTN_IN_LINE {
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

// Mean and variance of kRows rows from their deviations d from `centre`: mean = centre + Σd / N, variance = Σd² / N -
// (Σd / N)², which loses no more digits than (mean - centre)² is larger than the variance.
template <int kRows, class T>
inline void moments_about(const T* const* x, const Acc<T>* centre, int64_t n, Moments<Acc<T>>* moments) {
  using A = Acc<T>;
  ForwardSum<T> deviations[kRows], squares[kRows];
  Vec<A> about[kRows];
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) deviations[k] = squares[k] = ForwardSum<T>::zero(), about[k] = Vec<A>(centre[k]);
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const Vec<A> d = vector.only(vector.load(x[k] + i) - about[k]);
      deviations[k].add(slot, d);
      squares[k].add_product(slot, d, d);
    }
  });
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) {
    const A shift = deviations[k].total() / static_cast<A>(n);
    // Fused by hand: where the compiler chooses, it fuses for one row and not for four, and bits would depend on it.
    moments[k] = {centre[k] + shift, std::fma(-shift, shift, squares[k].total() / static_cast<A>(n))};
  }
}

// 16-bit rows take one pass about their first element, which is mostly within a few standard deviations of the mean (a
// second pass about the mean otherwise): float32 has digits to spare. Wider rows take the sum first and are centred.
template <int kRows, class T>
inline void row_moments(const T* const* x, int64_t n, Moments<Acc<T>>* moments) {
  using A = Acc<T>;
  A centre[kRows];
  if constexpr (sizeof(T) == 2) {
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) centre[k] = n > 0 ? to_acc(x[k][0]) : A(0);
    moments_about<kRows>(x, centre, n, moments);
    for (int k = 0; k < kRows; ++k) {
      const A shift = moments[k].mean - centre[k];
      if (!(shift * shift > 16 * moments[k].variance)) continue;
      const A mean = moments[k].mean;
      moments_about<1>(x + k, &mean, n, moments + k);
    }
  } else {
    ForwardSum<T> sum[kRows];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) sum[k] = ForwardSum<T>::zero();
    each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) sum[k].add(slot, vector.load(x[k] + i));
    });
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) centre[k] = sum[k].total() / static_cast<A>(n);
    moments_about<kRows>(x, centre, n, moments);
  }
}

template <int kRows, class T>
inline void row_mean_squares(const T* const* x, int64_t n, Moments<Acc<T>>* moments) {
  using A = Acc<T>;
  ForwardSum<T> squares[kRows];
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) squares[k] = ForwardSum<T>::zero();
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const Vec<A> value = vector.load(x[k] + i);
      squares[k].add_product(slot, value, value);
    }
  });
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) moments[k] = {A(0), squares[k].total() / static_cast<A>(n)};
}

// Whether the vector of each_vector's `slot` begins a cache line, in rows that do.
template <class T>
constexpr bool begins_line(int slot) {
  return slot * Vec<Acc<T>>::kLanes * sizeof(T) % 64 == 0;
}

// Whether rows of n elements from p on may be stored by Vec::stream.
template <class T>
inline bool streamable(const void* p, int64_t n) {
  constexpr int64_t kBytes = Vec<Acc<T>>::kLanes * sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0 && n * static_cast<int64_t>(sizeof(T)) % kBytes == 0;
}

// y = (x - mean) rstd w + b. Meanwhile the rows `ahead` elements further on, which come next, are on their way into the
// cache: x to be read, y to be written.
template <bool kBias, bool kStream, int kRows, class T>
inline void normalize_rows(const T* const* x, T* const* y, int64_t n, const Moments<Acc<T>>* moments,
                           const Acc<T>* rstd, const Acc<T>* weight, const Acc<T>* bias, int64_t x_ahead,
                           int64_t y_ahead) {
  using A = Acc<T>;
  // Copies that no store can alias, so that they stay in registers.
  const T* from[kRows];
  T* to[kRows];
  Vec<A> centre[kRows], scale[kRows];
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) {
    from[k] = x[k], to[k] = y[k], centre[k] = Vec<A>(moments[k].mean), scale[k] = Vec<A>(rstd[k]);
  }
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
    const Vec<A> w = vector.load(weight + i);
    Vec<A> b;
    if constexpr (kBias) b = vector.load(bias + i);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      if (begins_line<T>(slot)) {
        __builtin_prefetch(from[k] + i + x_ahead);
        if (!kStream) __builtin_prefetch(to[k] + i + y_ahead, 1);
      }
      const Vec<A> xhat = (vector.load(from[k] + i) - centre[k]) * scale[k];
      if constexpr (kBias) {
        vector.template store_result<kStream>(fma(xhat, w, b), to[k] + i);
      } else {
        vector.template store_result<kStream>(xhat * w, to[k] + i);
      }
    }
  });
}

// What the threads of a call share, and each thread's own.
template <class A>
struct NormOperands {
  const A *weight, *bias;  // bias null: none
  float* factor;           // dropout factors
  bool stream;             // the result goes past the caches
};

// Rows [row, row + kRows), `ahead` rows of which follow.
template <int kRows, class T>
inline void norm_forward_block(const NormForwardParams& p, int64_t row, int ahead,
                               const NormOperands<Acc<T>>& operands) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  const T* x[kRows];
  T* y[kRows];
  for (int k = 0; k < kRows; ++k) {
    x[k] = static_cast<const T*>(p.x) + (row + k) * p.x_stride;
    y[k] = static_cast<T*>(p.y) + (row + k) * n;
    if (p.h == nullptr) continue;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + (row + k) * p.residual_stride : nullptr;
    T* h = static_cast<T*>(p.h) + (row + k) * n;
    drop_and_add(x[k], residual, h, n, p.dropout, row + k, operands.factor);
    x[k] = h;
  }
  Moments<A> moments[kRows];
  if (p.rms) {
    row_mean_squares<kRows>(x, n, moments);
  } else {
    row_moments<kRows>(x, n, moments);
  }
  A rstd[kRows];
  for (int k = 0; k < kRows; ++k) {
    rstd[k] = A(1) / std::sqrt(moments[k].variance + static_cast<A>(p.eps));
    if (p.mean != nullptr) static_cast<A*>(p.mean)[row + k] = moments[k].mean;
    if (p.rstd != nullptr) static_cast<A*>(p.rstd)[row + k] = rstd[k];
  }
  const int64_t x_ahead = ahead * (p.h == nullptr ? p.x_stride : n), y_ahead = ahead * n;
  const auto normalize = [&](auto with_bias, auto streams) {
    normalize_rows<decltype(with_bias)::value, decltype(streams)::value, kRows>(x, y, n, moments, rstd, operands.weight,
                                                                                operands.bias, x_ahead, y_ahead);
  };
  if (operands.bias != nullptr) {
    operands.stream ? normalize(std::true_type{}, std::true_type{}) : normalize(std::true_type{}, std::false_type{});
  } else {
    operands.stream ? normalize(std::false_type{}, std::true_type{}) : normalize(std::false_type{}, std::false_type{});
  }
}

// How far ahead of the kRows rows at `row` the rows are fetched, of which `end` exist. One row's passes are shorter
// than the way to memory: one row ahead costs float32 8192 x 768 a sixth of its speed (Zen 5).
template <int kRows>
inline int rows_ahead(int64_t row, int64_t end) {
  constexpr int kAhead = kRows == 1 ? 2 : kRows;
  return row + kAhead + kRows <= end ? kAhead : 0;
}

// Several rows of every operand have to stay in the second cache between the passes.
template <class T>
inline bool several_rows_fit(int64_t n) {
  return n * static_cast<int64_t>(sizeof(T)) <= 32768;
}

template <class T>
inline void norm_forward_rows(const NormForwardParams& p, Range range) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  ScratchCursor scratch(thread_scratch(2 * (n * sizeof(A) + 64) + kDropoutScratch * sizeof(float)));
  NormOperands<A> operands;
  operands.weight = widened<A>(p.weight, p.weight_dtype, n, A(1), scratch.take<A>(n));
  operands.bias = p.bias ? widened<A>(p.bias, p.weight_dtype, n, A(0), scratch.take<A>(n)) : nullptr;
  operands.factor = scratch.take<float>(kDropoutScratch);
  operands.stream = p.stream && streamable<T>(p.y, n);
  constexpr int kRows = kNormRows<T>;
  int64_t row = range.begin;
  for (; several_rows_fit<T>(n) && row + kRows <= range.end; row += kRows) {
    norm_forward_block<kRows, T>(p, row, rows_ahead<kRows>(row, range.end), operands);
  }
  for (; row < range.end; ++row) norm_forward_block<1, T>(p, row, rows_ahead<1>(row, range.end), operands);
  if (operands.stream) finish_streams();
}

// One row of the backward pass: its pointers, and what its statistics make of it.
template <class T>
struct BackwardRow {
  using A = Acc<T>;
  const T *dy, *dh, *h;
  T* dh_total;
  A mean, rstd, rstd_c1, rstd_c2;
};

template <int kRows, class T>
inline void begin_backward(const NormBackwardParams& p, int64_t row, const Acc<T>* weight, BackwardRow<T>* r) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  BackwardSum<T> sum_g[kRows], sum_gd[kRows];
  Vec<A> centre[kRows];
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) {
    r[k].dy = static_cast<const T*>(p.dy) + (row + k) * p.dy_stride;
    r[k].dh = p.dh ? static_cast<const T*>(p.dh) + (row + k) * p.dh_stride : nullptr;
    r[k].h = static_cast<const T*>(p.h) + (row + k) * p.h_stride;
    r[k].dh_total = static_cast<T*>(p.dh_total) + (row + k) * n;
    r[k].mean = p.rms ? A(0) : static_cast<const A*>(p.mean)[row + k];
    r[k].rstd = static_cast<const A*>(p.rstd)[row + k];
    sum_g[k] = sum_gd[k] = BackwardSum<T>::zero(), centre[k] = Vec<A>(r[k].mean);
  }
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
    const Vec<A> w = vector.load(weight + i);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const Vec<A> g = vector.load(r[k].dy + i) * w;
      sum_g[k].add(slot, g);
      sum_gd[k].add_product(slot, g, vector.load(r[k].h + i) - centre[k]);
    }
  });
  const A over_n = A(1) / static_cast<A>(n);
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) {
    r[k].rstd_c1 = p.rms ? A(0) : r[k].rstd * (sum_g[k].total() * over_n);
    r[k].rstd_c2 = r[k].rstd * (sum_gd[k].total() * r[k].rstd * over_n);
  }
}

// Which sums over rows the backward pass keeps.
enum class NormSums { kNone, kWeight, kWeightAndBias };

// dh_total of kRows rows, and their share of the sums: a sum is loaded and stored once for all of them. The rows
// `ahead` rows further on are on their way into the cache meanwhile.
template <int kRows, NormSums kSums, bool kAdd, bool kStream, class T>
inline void finish_backward(const NormBackwardParams& p, const BackwardRow<T>* r, int ahead, const Acc<T>* weight,
                            Acc<T>* dweight, Acc<T>* dbias) {
  using A = Acc<T>;
  const int64_t n = p.columns, dy_ahead = ahead * p.dy_stride, h_ahead = ahead * p.h_stride, out_ahead = ahead * n;
  // Copies that no store can alias, so that they stay in registers.
  const T *row_dy[kRows], *row_h[kRows], *row_dh[kRows];
  T* out[kRows];
  Vec<A> mean[kRows], rstd[kRows], rstd_c1[kRows], rstd_c2[kRows];
#pragma GCC unroll 4
  for (int k = 0; k < kRows; ++k) {
    row_dy[k] = r[k].dy, row_h[k] = r[k].h, row_dh[k] = r[k].dh, out[k] = r[k].dh_total;
    mean[k] = Vec<A>(r[k].mean), rstd[k] = Vec<A>(r[k].rstd);
    rstd_c1[k] = Vec<A>(r[k].rstd_c1), rstd_c2[k] = Vec<A>(r[k].rstd_c2);
  }
  each_vector<A>(n, [&](int64_t i, int slot, auto vector) FASTATTN_IN_LINE {
    const Vec<A> w = vector.load(weight + i);
    Vec<A> weight_sum, bias_sum;
    if constexpr (kSums != NormSums::kNone) weight_sum = vector.load(dweight + i);
    if constexpr (kSums == NormSums::kWeightAndBias) bias_sum = vector.load(dbias + i);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      if (begins_line<T>(slot)) {
        __builtin_prefetch(row_dy[k] + i + dy_ahead);
        __builtin_prefetch(row_h[k] + i + h_ahead);
        if (!kStream) __builtin_prefetch(out[k] + i + out_ahead, 1);
      }
      const Vec<A> dy = vector.load(row_dy[k] + i);
      const Vec<A> xhat = (vector.load(row_h[k] + i) - mean[k]) * rstd[k];
      if constexpr (kSums != NormSums::kNone) weight_sum = fma(dy, xhat, weight_sum);
      if constexpr (kSums == NormSums::kWeightAndBias) bias_sum = bias_sum + dy;
      Vec<A> dh = fnma(xhat, rstd_c2[k], rstd[k] * (dy * w) - rstd_c1[k]);
      if constexpr (kAdd) dh = dh + vector.load(row_dh[k] + i);
      vector.template store_result<kStream>(dh, out[k] + i);
    }
    if constexpr (kSums != NormSums::kNone) vector.store(weight_sum, dweight + i);
    if constexpr (kSums == NormSums::kWeightAndBias) vector.store(bias_sum, dbias + i);
  });
}

template <int kRows, NormSums kSums, class T>
inline void norm_backward_block(const NormBackwardParams& p, int64_t row, const NormOperands<Acc<T>>& operands,
                                Acc<T>* dweight, Acc<T>* dbias) {
  BackwardRow<T> block[kRows];
  begin_backward<kRows>(p, row, operands.weight, block);
  const int ahead = rows_ahead<kRows>(row, p.rows);
  const auto finish = [&](auto adds, auto streams) {
    finish_backward<kRows, kSums, decltype(adds)::value, decltype(streams)::value>(p, block, ahead, operands.weight,
                                                                                   dweight, dbias);
  };
  if (p.dh != nullptr) {
    operands.stream ? finish(std::true_type{}, std::true_type{}) : finish(std::true_type{}, std::false_type{});
  } else {
    operands.stream ? finish(std::false_type{}, std::true_type{}) : finish(std::false_type{}, std::false_type{});
  }
  for (int k = 0; k < kRows && p.dropout.threshold > 0; ++k) {
    T* dx = static_cast<T*>(p.dx) + (row + k) * p.columns;
    drop_and_add<T>(block[k].dh_total, nullptr, dx, p.columns, p.dropout, row + k, operands.factor);
  }
}

template <NormSums kSums, class T>
inline void norm_backward_chunk(const NormBackwardParams& p, Range rows, const NormOperands<Acc<T>>& operands,
                                Acc<T>* dweight, Acc<T>* dbias) {
  constexpr int kRows = kNormRows<T>;
  int64_t row = rows.begin;
  for (; several_rows_fit<T>(p.columns) && row + kRows <= rows.end; row += kRows) {
    norm_backward_block<kRows, kSums, T>(p, row, operands, dweight, dbias);
  }
  for (; row < rows.end; ++row) norm_backward_block<1, kSums, T>(p, row, operands, dweight, dbias);
}

template <class T>
inline void norm_backward_chunks(const NormBackwardParams& p, Range range) {
  using A = Acc<T>;
  const int64_t n = p.columns;
  ScratchCursor scratch(thread_scratch(n * sizeof(A) + 64 + kDropoutScratch * sizeof(float)));
  NormOperands<A> operands;
  operands.weight = widened<A>(p.weight, p.weight_dtype, n, A(1), scratch.take<A>(n));
  operands.factor = scratch.take<float>(kDropoutScratch);
  operands.stream = p.stream && streamable<T>(p.dh_total, n);
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const Range rows{chunk * p.chunk_rows, std::min((chunk + 1) * p.chunk_rows, p.rows)};
    if (p.partial_dweight == nullptr) {
      norm_backward_chunk<NormSums::kNone, T>(p, rows, operands, nullptr, nullptr);
      continue;
    }
    A* dweight = static_cast<A*>(p.partial_dweight) + chunk * n;
    std::fill(dweight, dweight + n, A(0));
    if (p.partial_dbias == nullptr) {
      norm_backward_chunk<NormSums::kWeight, T>(p, rows, operands, dweight, nullptr);
      continue;
    }
    A* dbias = static_cast<A*>(p.partial_dbias) + chunk * n;
    std::fill(dbias, dbias + n, A(0));
    norm_backward_chunk<NormSums::kWeightAndBias, T>(p, rows, operands, dweight, dbias);
  }
  if (operands.stream) finish_streams();
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
    each_vector<A>(range.end - range.begin, [&](int64_t i, int, auto vector) FASTATTN_IN_LINE {
      const A* column = partial + range.begin + i;
      const Vec<A> sum = sum_in_runs<Vec<A>>(0, chunks, [&](int64_t chunk) { return vector.load(column + chunk * n); });
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
#undef FASTATTN_IN_LINE
