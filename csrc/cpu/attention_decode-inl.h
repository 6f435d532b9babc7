// Attention of a few queries to many keys: the step of a KV cache. Contract: AttentionParams in params.h, `partial`
// set.
//
// Bound by reading K and V, which happens once for all heads of a group; nothing is packed, queries are not lanes. Keys
// are cut into parts of kDecodeKeys, so that few heads still occupy all threads; the parts of a row, each with its own
// maximum m, sum l and output o, are merged in order ("Flash-Decoding", Dao et al., 2023):
//   out = sum_p e^(m_p - m) o_p / sum_p e^(m_p - m) l_p
// Work item: (b, kv head, part), or, when p.merge, a row (b, head, query). Records are m, l, o[head_dim_v].

constexpr int64_t kDecodeKeys = 256;

// to[j] = q . k_j for the kLanes keys from k (n of them exist); q is zero padded to whole vectors.
template <class S>
inline void dot_keys(const S* k, int64_t ld, int64_t n, int64_t channels, const float* q, float* to) {
  constexpr int kLanes = VecF::kLanes;
  VecF sum[kLanes];
  const S* row[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) sum[j] = VecF::zero(), row[j] = k + std::min<int64_t>(j, n - 1) * ld;
  int64_t d = 0;
  for (; d + kLanes <= channels; d += kLanes) {
    const VecF x = VecF::load(q + d);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sum[j] = fma(VecF::load(row[j] + d), x, sum[j]);
  }
  if (d < channels) {
    const VecF x = VecF::load(q + d);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sum[j] = fma(VecF::load_n(row[j] + d, channels - d), x, sum[j]);
  }
  transpose(sum);
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += 2 * step) sum[j] = sum[j] + sum[j + step];
  }
  sum[0].store(to);
}
inline void dot_keys(const double* k, int64_t ld, int64_t n, int64_t channels, const double* q, double* to) {
  for (int64_t j = 0; j < n; ++j) {
    VecD sum = VecD::zero();
    for (int64_t d = 0; d < channels; d += VecD::kLanes) {
      sum = fma(VecD::load_n(k + j * ld + d, std::min<int64_t>(VecD::kLanes, channels - d)), VecD::load(q + d), sum);
    }
    to[j] = reduce_add(sum);
  }
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
        o_(scratch.take<A>(round_up(p.head_dim_v, V::kLanes))) {}

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
      const S* q =
          static_cast<const S*>(p_.q) + b * p_.q_stride[0] + h * p_.q_stride[1] + (p_.first_row + i) * p_.q_stride[2];
      for (int64_t d = 0; d < ld_q_; d += V::kLanes) {
        V::load_n(q + d, std::min<int64_t>(V::kLanes, p_.head_dim - d)).store(q_ + r * ld_q_ + d);
      }
    }
    runs(p_.k, p_.k_stride, p_.head_dim, b, kv, key, count, [&](int64_t first, const S* k, int64_t n) {
      for (int64_t j = 0; j < n; j += V::kLanes) {
        for (int64_t r = 0; r < rows; ++r) {
          dot_keys(k + j * p_.k_stride[2], p_.k_stride[2], std::min<int64_t>(V::kLanes, n - j), p_.head_dim,
                   q_ + r * ld_q_, s_ + r * kRowScores + first + j);
        }
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group_ + r / p_.rows, i = r % p_.rows;
      A* sums = record(b, h, i) + index * (p_.head_dim_v + 2);
      A* s = s_ + r * kRowScores;
      finish_row(b, h, i, key, count, s);
      softmax_row(count, s, sums);
      std::fill_n(sums + 2, p_.head_dim_v, A(0));
    }
    runs(p_.v, p_.v_stride, p_.head_dim_v, b, kv, key, count, [&](int64_t first, const S* v, int64_t n) {
      for (int64_t r = 0; r < rows; ++r) {
        A* o = record(b, kv * group_ + r / p_.rows, r % p_.rows) + index * (p_.head_dim_v + 2) + 2;
        for (int64_t d = 0; d < p_.head_dim_v; d += 8 * V::kLanes) {
          weigh_values(v, n, s_ + r * kRowScores + first, d, o);
        }
      }
    });
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

  // Scores to unnormalised probabilities; record[0..1] = m, l.
  void softmax_row(int64_t count, A* s, A* record) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    V highest(-kInf), sum = V::zero();
    for (int64_t j = 0; j < count; j += V::kLanes) highest = max(highest, V::load(s + j));
    const A m = reduce_max(highest) * kLogUnit<A>;
    const V shift(m == -kInf ? A(0) : -m), unit(kLogUnit<A>);
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const V p = exp_unit<false>(fma(V::load(s + j), unit, shift));
      sum = sum + p;
      p.store(s + j);
    }
    record[0] = m, record[1] = reduce_add(sum);
  }

  // o[channel .. channel + 8 vectors) += sum_j s_j v_j over the keys with a probability.
  void weigh_values(const S* v, int64_t count, const A* s, int64_t channel, A* o) {
    const int64_t left = p_.head_dim_v - channel;
    V sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t n = std::min<int64_t>(V::kLanes, left - i * V::kLanes);
      sum[i] = n > 0 ? V::load_n(o + channel + i * V::kLanes, n) : V::zero();
    }
    for (int64_t j = 0; j < count; ++j) {
      if (s[j] == A(0)) continue;
      const S* row = v + j * p_.v_stride[2] + channel;
      const V weight(s[j]);
      if (left >= 8 * V::kLanes) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] = fma(weight, V::load(row + i * V::kLanes), sum[i]);
      } else if (left == 4 * V::kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] = fma(weight, V::load(row + i * V::kLanes), sum[i]);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const int64_t n = std::min<int64_t>(V::kLanes, left - i * V::kLanes);
          if (n > 0) sum[i] = fma(weight, V::load_n(row + i * V::kLanes, n), sum[i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t n = std::min<int64_t>(V::kLanes, left - i * V::kLanes);
      if (n > 0) sum[i].store_n(o + channel + i * V::kLanes, n);
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
    S* out =
        static_cast<S*>(p_.out) + b * p_.out_stride[0] + h * p_.out_stride[1] + (p_.first_row + i) * p_.out_stride[2];
    for (int64_t d = 0; d < p_.head_dim_v; d += V::kLanes) {
      (V::load(o_ + d) * inverse).store_n(out + d, std::min<int64_t>(V::kLanes, p_.head_dim_v - d));
    }
    static_cast<A*>(p_.lse)[row_index(p_, b, h) + i] = m / kLogUnit<A> + std::log(l);
  }

  static A exp_of(A x) { return reduce_max(exp_unit<false>(V(x))); }

  AttentionParams p_;                          // with the extents of the sequence at hand
  const int64_t group_, rows_, parts_, ld_q_;  // rows_, parts_: of the longest sequence
  A *q_, *s_, *mask_, *o_;
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
