// Few rows of queries against rows of keys and values, which pass once and are not packed: dot products, scores and
// weighted sums, for the step of a KV cache (attention_decode-inl.h) and its gradient
// (attention_decode_backward-inl.h).

// Keys of a part: what one thread takes at a time.
constexpr int64_t kDecodeKeys = 256;

// Rows of queries that pass a key or value together: 16 accumulators in each product.
template <class A>
constexpr int kDecodeRowsTogether = Vec<A>::kLanes >= 4 ? 4 : 1;
// Keys and values are fetched this far ahead of their use, over the end of the keys into the values and over theirs
// into the next part: hardware prefetchers start again at every page of 4 KiB. 8 kv heads of 8192 keys, 4 query heads
// each, one core: bfloat16 12.8 to 21.8 GB/s, float32 15.7 to 32.8; 2 KiB gave 15.2 and 19.7.
constexpr int64_t kDecodeAhead = 16 << 10;
// Not for caches that stay in L2.
constexpr int64_t kDecodeNear = 1 << 20;

// Scores of a row of queries, with room for whole vectors from any key on.
template <class A>
constexpr int64_t kRowScores = kDecodeKeys + Vec<A>::kLanes;

// n rows of keys or values one stride apart, and what is fetched while row j is used: row j + distance, or what follows
// the last.
template <class S>
struct KeyRows {
  const S* rows;
  int64_t ld, n, channels;
  const S* next;
  int64_t ld_next, distance;  // 0: nothing is fetched

  const S* ahead_of(int64_t j) const {
    const int64_t to = j + distance;
    return to < n ? rows + to * ld : next + (to - n) * ld_next;
  }
};

// How many rows ahead for rows of so many channels; pages are fetched otherwise.
template <class S>
inline int64_t rows_ahead(const AttentionParams& p, int64_t channels) {
  const int64_t size = sizeof(S), cache = p.batch * p.heads_kv * p.keys * (p.head_dim + p.head_dim_v) * size;
  return p.block_table != nullptr || cache <= kDecodeNear ? 0 : kDecodeAhead / (channels * size) + 1;
}
// `k`: the keys of a part, or its first ones, whose values are used next; `v`: the values, before the next part's keys.
template <class S>
inline KeyRows<S> rows_of_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t key, const S* k, int64_t n) {
  const S* v = row_at<S>(p.v, p.v_stride, b, kv, p.first_key + key);
  return {k, p.k_stride[2], n, p.head_dim, v, p.v_stride[2], rows_ahead<S>(p, p.head_dim)};
}
template <class S>
inline KeyRows<S> rows_of_values(const AttentionParams& p, int64_t b, int64_t kv, int64_t key, const S* v, int64_t n) {
  const S* k = row_at<S>(p.k, p.k_stride, b, kv, p.first_key + key + n);
  return {v, p.v_stride[2], n, p.head_dim_v, k, p.k_stride[2], rows_ahead<S>(p, p.head_dim_v)};
}

// f(number of rows as a type, first row) for all rows, several at a time.
template <class A, class F>
inline void for_rows(int64_t rows, const F& f) {
  constexpr int kTogether = kDecodeRowsTogether<A>;
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) f(std::integral_constant<int, kTogether>(), r);
  for (; r < rows; ++r) f(std::integral_constant<int, 1>(), r);
}

// A row of queries in the accumulation dtype, zeros up to ld.
template <class S>
inline void load_row(const S* from, int64_t channels, int64_t ld, Acc<S>* to) {
  using V = Vec<Acc<S>>;
  for (int64_t d = 0; d < ld; d += V::kLanes) {
    V::load_n(from + d, std::max<int64_t>(0, std::min<int64_t>(V::kLanes, channels - d))).store(to + d);
  }
}

// to[r][j] = q_r . k_j for R rows of queries and the kLanes / R keys from `first` on; q is zero padded to whole
// vectors. Every product is summed the same way whatever R is.
template <int R, class S>
inline void dot_keys(const KeyRows<S>& keys, int64_t first, const Acc<S>* q, int64_t ld_q, Acc<S>* to) {
  using V = Vec<Acc<S>>;
  constexpr int kLanes = V::kLanes, kKeys = kLanes / R;
  const int64_t last = keys.n - first - 1, channels = keys.channels;
  const S* ahead = keys.distance > 0 ? keys.ahead_of(first) : nullptr;
  const int64_t ld_ahead = first + keys.distance < keys.n ? keys.ld : keys.ld_next;
  V sum[kLanes];
  const S* row[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = V::zero();
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) row[j] = keys.rows + (first + std::min<int64_t>(j, last)) * keys.ld;
  for (int64_t d = 0; d < channels; d += kLanes) {
    const bool whole = d + kLanes <= channels;
    V query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) query[r] = V::load(q + r * ld_q + d);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const V key = whole ? V::load(row[j] + d) : V::load_n(row[j] + d, channels - d);
      if (ahead != nullptr && d * static_cast<int64_t>(sizeof(S)) % 64 == 0) {
        __builtin_prefetch(ahead + j * ld_ahead + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * kKeys + j] = fma(key, query[r], sum[r * kKeys + j]);
    }
  }
  // A copy: what is passed by reference would live in memory all along.
  V turned[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) turned[i] = sum[i];
  alignas(64) Acc<S> dots[kLanes];
  sum_lanes(turned).store(dots);
  // The keys beyond the last are that one again: there is room for them.
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) std::memcpy(to + r * kRowScores<Acc<S>>, dots + r * kKeys, kKeys * sizeof(Acc<S>));
}

// The same for all keys and rows of queries.
template <class S>
inline void dot_all(const KeyRows<S>& keys, const Acc<S>* q, int64_t ld_q, int64_t rows, Acc<S>* to) {
  using A = Acc<S>;
  for_rows<A>(rows, [&](auto together, int64_t r) {
    constexpr int kRows = decltype(together)::value, kKeys = Vec<A>::kLanes / kRows;
    for (int64_t j = 0; j < keys.n; j += kKeys) {
      dot_keys<kRows>(keys, j, q + r * ld_q, ld_q, to + r * kRowScores<A> + j);
    }
  });
}

// s = q.k in, score out, for a block of one row; lanes beyond its keys become -inf. `mask_row` is scratch for a row of
// them. cap_slope, if given, receives 1 - tanh^2, the softcap's derivative.
template <class A>
inline void score_row(const AttentionParams& p, const ScoreBlock& row, A* s, A* mask_row, A* cap_slope) {
  using V = Vec<A>;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const V hidden(-kInf), scale(static_cast<A>(p.scale)), cap(static_cast<A>(p.softcap));
  const V scale_over_cap(static_cast<A>(p.softcap > 0 ? p.scale / p.softcap : 0));
  const V left(p.window_left >= 0 ? static_cast<A>(-p.window_left) : -kInf);
  const V right(p.window_right >= 0 ? static_cast<A>(p.window_right) : kInf);
  const V slope(p.slopes != nullptr ? slope_of<A>(p, row) : A(0));
  if (p.mask != nullptr) load_mask_row(p, row, mask_row);
  for (int64_t j = 0; j < row.keys; j += V::kLanes) {
    V x = V::load(s + j);
    if (p.softcap > 0) {
      const V t = cap_tanh(x * scale_over_cap);
      if (cap_slope != nullptr) fnma(t, t, V(A(1))).store(cap_slope + j);
      x = t * cap;
    } else {
      x = x * scale;
    }
    const V distance = V::iota(static_cast<A>(row.key + j - row.row - p.diagonal));
    if (p.slopes != nullptr) x = fnma(slope, abs(distance), x);
    if (p.mask != nullptr) {
      const V mask = V::load(mask_row + j);
      x = select(le(mask, hidden), hidden, x + mask);
    }
    x = select(le(left, distance), select(le(distance, right), x, hidden), hidden);
    if (row.keys - j < V::kLanes) x = select(first_n<A>(row.keys - j), x, hidden);
    x.store(s + j);
  }
}

// sum_r += Σ_j weight_rj x_j for R rows and the channels from d on. kDense: they fill all vectors but the last, and no
// weight is 0.
template <int R, int kVectors, bool kDense, class S>
inline void weigh_channels(const KeyRows<S>& x, int64_t d, const Acc<S>* weight, Acc<S>* sums, int64_t ld_sums) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t left = x.channels - d;
  const int64_t last = left - (kVectors - 1) * V::kLanes;
  V sum[R][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[r][i] = V::load(sums + r * ld_sums + d + i * V::kLanes);
  }
  for (int64_t j = 0; j < x.n; ++j) {
    const S* row = x.rows + j * x.ld + d;
    const S* fetched = x.distance > 0 ? x.ahead_of(j) + d : nullptr;
    V factor[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factor[r] = V(weight[r * kRowScores<A> + j]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kDense) {
        const bool whole = i + 1 < kVectors || last >= V::kLanes;
        const V value = whole ? V::load(row + i * V::kLanes) : V::load_n(row + i * V::kLanes, last);
        if (fetched != nullptr && i * V::kLanes * sizeof(S) % 64 == 0) __builtin_prefetch(fetched + i * V::kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][i] = fma(factor[r], value, sum[r][i]);
      } else if (i * V::kLanes < left) {
        const V value = V::load_n(row + i * V::kLanes, std::min<int64_t>(V::kLanes, left - i * V::kLanes));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V product = fma(factor[r], value, sum[r][i]);
          // Not zero: above, below or NaN.
          sum[r][i] = select(le(abs(factor[r]), V::zero()), sum[r][i], product);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      if (kDense || i * V::kLanes < left) sum[r][i].store(sums + r * ld_sums + d + i * V::kLanes);
    }
  }
}

// As many vectors as the channels from d on fill, at most kVectors.
template <int R, int kVectors, class S>
inline void weigh_dense_channels(const KeyRows<S>& x, int64_t d, const Acc<S>* weight, Acc<S>* sums, int64_t ld_sums) {
  if constexpr (kVectors > 1) {
    if (x.channels - d <= (kVectors - 1) * Vec<Acc<S>>::kLanes) {
      return weigh_dense_channels<R, kVectors - 1>(x, d, weight, sums, ld_sums);
    }
  }
  weigh_channels<R, kVectors, true>(x, d, weight, sums, ld_sums);
}

// The same for all channels and rows. `sparse`: some weights are 0 (or NaN), and what has none must not be touched.
template <class S>
inline void weigh_all(const KeyRows<S>& x, const Acc<S>* weight, int64_t rows, bool sparse, Acc<S>* sums,
                      int64_t ld_sums) {
  using A = Acc<S>;
  for_rows<A>(rows, [&](auto together, int64_t r) {
    constexpr int kRows = decltype(together)::value, kVectors = kRows == 1 ? 8 : 4;
    const A* weight_r = weight + r * kRowScores<A>;
    A* sums_r = sums + r * ld_sums;
    for (int64_t d = 0; d < x.channels; d += kVectors * Vec<A>::kLanes) {
      if (sparse) {
        weigh_channels<kRows, kVectors, false>(x, d, weight_r, sums_r, ld_sums);
      } else {
        weigh_dense_channels<kRows, kVectors>(x, d, weight_r, sums_r, ld_sums);
      }
    }
  });
}
