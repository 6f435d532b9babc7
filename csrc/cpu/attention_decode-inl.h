// Attention of a few queries to many keys: the step of a KV cache. Contract: AttentionParams in params.h, `partial`
// set.
//
// Bound by reading K and V, which happens once for all heads of a group; nothing is packed, queries are not lanes:
// several rows of them pass every key and value together. Keys are cut into parts of kDecodeKeys, so that few heads
// still occupy all threads; the parts of a row, each with its own maximum m, sum l and output o, are merged in order
// ("Flash-Decoding", Dao et al., 2023):
//   out = sum_p e^(m_p - m) o_p / sum_p e^(m_p - m) l_p
// Work item: (b, kv head, part), or, when p.merge, a row (b, head, query). Records are m, l, o[head_dim_v].

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

// What to fetch while row j of n rows is used: row j + distance, or what follows the last row.
template <class S>
struct DecodeAhead {
  const S* rows;
  int64_t ld, n;
  const S* next;
  int64_t ld_next, distance;  // 0: nothing

  const S* of(int64_t j) const {
    const int64_t to = j + distance;
    return to < n ? rows + to * ld : next + (to - n) * ld_next;
  }
};

// to[r * ld_to + j] = q_r . k_j for R rows of queries and the kLanes / R keys from k on (n of them exist); q is zero
// padded to whole vectors. Every product is summed the same way whatever R is.
template <int R, class S>
inline void dot_keys(const S* k, int64_t ld, int64_t n, int64_t channels, const S* ahead, int64_t ld_ahead,
                     const Acc<S>* q, int64_t ld_q, Acc<S>* to, int64_t ld_to) {
  using V = Vec<Acc<S>>;
  constexpr int kLanes = V::kLanes, kKeys = kLanes / R;
  V sum[kLanes];
  const S* row[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = V::zero();
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) row[j] = k + std::min<int64_t>(j, n - 1) * ld;
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
  // The keys beyond n are the last one again: there is room for them.
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) std::memcpy(to + r * ld_to, dots + r * kKeys, kKeys * sizeof(Acc<S>));
}

template <class S>
class AttentionDecode {
 public:
  using A = Acc<S>;
  using V = Vec<A>;
  static constexpr int64_t kRowScores = kDecodeKeys + V::kLanes;  // room for whole vectors from any key on

  AttentionDecode(const AttentionParams& p, ScratchCursor& scratch)
      : p_(p),
        group_(p.heads_kv > 0 ? p.heads / p.heads_kv : 0),
        rows_(p.rows),
        parts_((p.keys + kDecodeKeys - 1) / kDecodeKeys),
        ld_q_(round_up(p.head_dim, V::kLanes)),
        q_(scratch.take<A>(group_ * p.rows * ld_q_)),
        s_(scratch.take<A>(group_ * p.rows * kRowScores)),
        mask_(scratch.take<A>(kDecodeKeys + V::kLanes)),
        ld_o_(round_up(p.head_dim_v, 8 * V::kLanes)),
        o_(scratch.take<A>(std::max<int64_t>(1, group_ * p.rows) * ld_o_)) {}

  void run(Range range) {
    for (int64_t item = range.begin; item < range.end; ++item) {
      if (p_.merge) {
        const auto [b, h, i] = block_item(p_, p_.heads, rows_, item);
        enter_sequence(p_, b);
        merge_row(b, h, i);
      } else {
        const auto [b, kv, index] = block_item(p_, p_.heads_kv, parts_, item);
        enter_sequence(p_, b);
        part(b, kv, index);
      }
    }
  }

 private:
  A* record(int64_t b, int64_t h, int64_t i) const {
    return static_cast<A*>(p_.partial) + ((b * p_.heads + h) * rows_ + i) * parts_ * (p_.head_dim_v + 2);
  }

  static void prefetch(const S* rows, int64_t ld, int64_t count, int64_t channels) {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < channels; d += kLine) __builtin_prefetch(rows + r * ld + d);
    }
  }

  // Calls f(first, row, n) for runs of keys [key + first, key + first + n) that lie one stride apart from `row` on.
  template <class F>
  void runs(const void* data, const int64_t (&stride)[3], int64_t channels, int64_t b, int64_t kv, int64_t key,
            int64_t count, const F& f) const {
    const S* from = static_cast<const S*>(data) + kv * stride[1];
    if (p_.block_table == nullptr) {
      f(0, from + b * stride[0] + (p_.first_key + key) * stride[2], count);
      return;
    }
    const int32_t* table = p_.block_table + b * p_.max_pages;
    for (int64_t j = 0; j < count;) {
      const int64_t page = (key + j) / p_.page_size, row = (key + j) % p_.page_size;
      const int64_t n = std::min(count - j, p_.page_size - row);
      // Pages lie anywhere: no hardware prefetcher finds the next one.
      if (j + n < count) prefetch(from + table[page + 1] * stride[0], stride[2], std::min(count - j - n, n), channels);
      f(j, from + table[page] * stride[0] + row * stride[2], n);
      j += n;
    }
  }

  void part(int64_t b, int64_t kv, int64_t index) {
    const int64_t key = index * kDecodeKeys, count = std::min(kDecodeKeys, p_.keys - key), rows = group_ * p_.rows;
    const Range visible = visible_keys(p_, 0, p_.rows);
    if (key >= visible.end || key + count <= visible.begin) {
      for (int64_t r = 0; r < rows; ++r) {
        A* sums = record(b, kv * group_ + r / p_.rows, r % p_.rows) + index * (p_.head_dim_v + 2);
        sums[0] = -std::numeric_limits<A>::infinity(), sums[1] = A(0);
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group_ + r / p_.rows, i = r % p_.rows;
      const S* q = row_at<S>(p_.q, p_.q_stride, b, h, p_.first_row + i);
      for (int64_t d = 0; d < ld_q_; d += V::kLanes) {
        V::load_n(q + d, std::min<int64_t>(V::kLanes, p_.head_dim - d)).store(q_ + r * ld_q_ + d);
      }
    }
    runs(p_.k, p_.k_stride, p_.head_dim, b, kv, key, count, [&](int64_t first, const S* k, int64_t n) {
      const DecodeAhead<S> ahead = after_keys(b, kv, key, k, n);
      for_rows(rows, [&](auto together, int64_t r) {
        constexpr int kRows = decltype(together)::value, kKeys = V::kLanes / kRows;
        for (int64_t j = 0; j < n; j += kKeys) {
          const bool inside = j + ahead.distance < n;
          dot_keys<kRows>(k + j * p_.k_stride[2], p_.k_stride[2], std::min<int64_t>(kKeys, n - j), p_.head_dim,
                          ahead.distance > 0 ? ahead.of(j) : nullptr, inside ? ahead.ld : ahead.ld_next, q_ + r * ld_q_,
                          ld_q_, s_ + r * kRowScores + first + j, kRowScores);
        }
      });
    });
    bool sparse = false;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group_ + r / p_.rows, i = r % p_.rows;
      A* sums = record(b, h, i) + index * (p_.head_dim_v + 2);
      finish_row(b, h, i, key, count, s_ + r * kRowScores);
      sparse |= !softmax_row(count, s_ + r * kRowScores, sums);
    }
    std::fill_n(o_, rows * ld_o_, A(0));
    runs(p_.v, p_.v_stride, p_.head_dim_v, b, kv, key, count, [&](int64_t first, const S* v, int64_t n) {
      const DecodeAhead<S> ahead = after_values(b, kv, key, v, n);
      for_rows(rows, [&](auto together, int64_t r) {
        weigh_values<decltype(together)::value>(v, n, s_ + r * kRowScores + first, sparse, ahead, o_ + r * ld_o_);
      });
    });
    for (int64_t r = 0; r < rows; ++r) {
      A* sums = record(b, kv * group_ + r / p_.rows, r % p_.rows) + index * (p_.head_dim_v + 2);
      std::copy_n(o_ + r * ld_o_, p_.head_dim_v, sums + 2);
    }
  }

  // Rows ahead for rows of so many channels; pages are fetched by `runs`.
  int64_t distance(int64_t channels) const {
    const int64_t size = sizeof(S), cache = p_.batch * p_.heads_kv * p_.keys * (p_.head_dim + p_.head_dim_v) * size;
    return p_.block_table != nullptr || cache <= kDecodeNear ? 0 : kDecodeAhead / (channels * size) + 1;
  }
  DecodeAhead<S> after_keys(int64_t b, int64_t kv, int64_t key, const S* k, int64_t n) const {
    const S* v = row_at<S>(p_.v, p_.v_stride, b, kv, p_.first_key + key);
    return {k, p_.k_stride[2], n, v, p_.v_stride[2], distance(p_.head_dim)};
  }
  DecodeAhead<S> after_values(int64_t b, int64_t kv, int64_t key, const S* v, int64_t n) const {
    const S* k = row_at<S>(p_.k, p_.k_stride, b, kv, p_.first_key + key + n);
    return {v, p_.v_stride[2], n, k, p_.k_stride[2], distance(p_.head_dim_v)};
  }

  // f(number of rows as a type, first row) for all rows, several at a time.
  template <class F>
  static void for_rows(int64_t rows, const F& f) {
    constexpr int kTogether = kDecodeRowsTogether<A>;
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether) f(std::integral_constant<int, kTogether>(), r);
    for (; r < rows; ++r) f(std::integral_constant<int, 1>(), r);
  }

  // s = q.k in, score out; lanes beyond `count` become -inf.
  void finish_row(int64_t b, int64_t h, int64_t i, int64_t key, int64_t count, A* s) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    const ScoreBlock row{b, h, i, 1, 1, key, count};
    const V hidden(-kInf), scale(static_cast<A>(p_.scale)), cap(static_cast<A>(p_.softcap));
    const V scale_over_cap(static_cast<A>(p_.softcap > 0 ? p_.scale / p_.softcap : 0));
    const V left(p_.window_left >= 0 ? static_cast<A>(-p_.window_left) : -kInf);
    const V right(p_.window_right >= 0 ? static_cast<A>(p_.window_right) : kInf);
    const V slope(p_.slopes != nullptr ? slope_of<A>(p_, row) : A(0));
    if (p_.mask != nullptr) load_mask_row(p_, row, mask_);
    for (int64_t j = 0; j < count; j += V::kLanes) {
      V x = V::load(s + j);
      x = p_.softcap > 0 ? cap_tanh(x * scale_over_cap) * cap : x * scale;
      const V distance = V::iota(static_cast<A>(key + j - i - p_.diagonal));
      if (p_.slopes != nullptr) x = fnma(slope, abs(distance), x);
      if (p_.mask != nullptr) {
        const V mask = V::load(mask_ + j);
        x = select(le(mask, hidden), hidden, x + mask);
      }
      x = select(le(left, distance), select(le(distance, right), x, hidden), hidden);
      if (count - j < V::kLanes) x = select(first_n<A>(count - j), x, hidden);
      x.store(s + j);
    }
  }

  // Scores to unnormalised probabilities; record[0..1] = m, l. Returns whether all of them are positive.
  bool softmax_row(int64_t count, A* s, A* record) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    V highest(-kInf), sum = V::zero(), lowest(kInf);
    for (int64_t j = 0; j < count; j += V::kLanes) highest = max(highest, V::load(s + j));
    const A m = reduce_max(highest) * kLogUnit<A>;
    const V shift(m == -kInf ? A(0) : -m), unit(kLogUnit<A>);
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const V p = exp_unit<false>(fma(V::load(s + j), unit, shift));
      sum = sum + p;
      lowest = min(lowest, count - j < V::kLanes ? select(first_n<A>(count - j), p, lowest) : p);
      p.store(s + j);
    }
    record[0] = m, record[1] = reduce_add(sum);
    return reduce_max(V::zero() - lowest) < A(0);
  }

  // o_r += sum_j s_rj v_j for R rows. `sparse`: some probabilities are 0 (or NaN), and keys without one must not be
  // touched.
  template <int R>
  void weigh_values(const S* v, int64_t count, const A* s, bool sparse, const DecodeAhead<S>& ahead, A* o) {
    constexpr int kVectors = R == 1 ? 8 : 4;
    for (int64_t d = 0; d < p_.head_dim_v; d += kVectors * V::kLanes) {
      const int64_t left = p_.head_dim_v - d;
      if (sparse) {
        weigh_channels<R, kVectors, false>(v + d, count, s, left, ahead, d, o + d);
      } else {
        weigh_dense_channels<R, kVectors>(v + d, count, s, left, ahead, d, o + d);
      }
    }
  }

  // As many vectors as `left` channels fill, at most kVectors.
  template <int R, int kVectors>
  void weigh_dense_channels(const S* v, int64_t count, const A* s, int64_t left, const DecodeAhead<S>& ahead, int64_t d,
                            A* o) {
    if constexpr (kVectors > 1) {
      if (left <= (kVectors - 1) * V::kLanes) {
        return weigh_dense_channels<R, kVectors - 1>(v, count, s, left, ahead, d, o);
      }
    }
    weigh_channels<R, kVectors, true>(v, count, s, left, ahead, d, o);
  }

  // kDense: the channels fill all vectors but the last, and no probability is 0.
  template <int R, int kVectors, bool kDense>
  void weigh_channels(const S* v, int64_t count, const A* s, int64_t left, const DecodeAhead<S>& ahead, int64_t d,
                      A* o) {
    const int64_t last = left - (kVectors - 1) * V::kLanes;
    V sum[R][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[r][i] = V::load(o + r * ld_o_ + i * V::kLanes);
    }
    for (int64_t j = 0; j < count; ++j) {
      const S* row = v + j * p_.v_stride[2];
      const S* fetched = ahead.distance > 0 ? ahead.of(j) + d : nullptr;
      V weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = V(s[r * kRowScores + j]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (kDense) {
          const bool whole = i + 1 < kVectors || last >= V::kLanes;
          const V value = whole ? V::load(row + i * V::kLanes) : V::load_n(row + i * V::kLanes, last);
          if (fetched != nullptr && i * V::kLanes * sizeof(S) % 64 == 0) __builtin_prefetch(fetched + i * V::kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r][i] = fma(weight[r], value, sum[r][i]);
        } else if (i * V::kLanes < left) {
          const V value = V::load_n(row + i * V::kLanes, std::min<int64_t>(V::kLanes, left - i * V::kLanes));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const V product = fma(weight[r], value, sum[r][i]);
            // Not zero: above, below or NaN.
            sum[r][i] = select(le(abs(weight[r]), V::zero()), sum[r][i], product);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        if (kDense || i * V::kLanes < left) sum[r][i].store(o + r * ld_o_ + i * V::kLanes);
      }
    }
  }

  void merge_row(int64_t b, int64_t h, int64_t i) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    const int64_t size = p_.head_dim_v + 2, parts = (p_.keys + kDecodeKeys - 1) / kDecodeKeys;
    const A* sums = record(b, h, i);
    const A sink = p_.sinks != nullptr ? static_cast<const A*>(p_.sinks)[h] * kLogUnit<A> : -kInf;
    A m = sink;
    for (int64_t part = 0; part < parts; ++part) m = std::max(m, sums[part * size]);
    const A shift = m == -kInf ? A(0) : m;
    A l = exp_of(sink - shift);
    std::fill_n(o_, p_.head_dim_v, A(0));
    for (int64_t part = 0; part < parts; ++part, sums += size) {
      if (sums[1] == A(0)) continue;
      const A factor = exp_of(sums[0] - shift);
      l += factor * sums[1];
      for (int64_t d = 0; d < p_.head_dim_v; d += V::kLanes) {
        const int64_t n = std::min<int64_t>(V::kLanes, p_.head_dim_v - d);
        fma(V(factor), V::load_n(sums + 2 + d, n), V::load(o_ + d)).store(o_ + d);
      }
    }
    const V inverse(l == A(0) ? A(0) : A(1) / l);
    S* out = row_at<S>(p_.out, p_.out_stride, b, h, p_.first_row + i);
    for (int64_t d = 0; d < p_.head_dim_v; d += V::kLanes) {
      (V::load(o_ + d) * inverse).store_n(out + d, std::min<int64_t>(V::kLanes, p_.head_dim_v - d));
    }
    static_cast<A*>(p_.lse)[row_index(p_, b, h) + i] = natural_lse(m, l);
  }

  static A exp_of(A x) { return reduce_max(exp_unit<false>(V(x))); }

  AttentionParams p_;                          // with the extents of the sequence at hand
  const int64_t group_, rows_, parts_, ld_q_;  // rows_, parts_: of the longest sequence
  A *q_, *s_, *mask_;
  const int64_t ld_o_;
  A* o_;
};

inline void attention_forward(const AttentionParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (p.partial != nullptr) {
      run_with_scratch<AttentionDecode<S>>(p, range);
    } else {
      run_with_scratch<AttentionForward<S>>(p, range);
    }
  });
}
