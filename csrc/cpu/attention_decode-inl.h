// Attention of a few queries to many keys: the step of a KV cache. Contract: AttentionParams in params.h, `partial`
// set.
//
// Bound by reading K and V, which happens once for all heads of a group; nothing is packed, queries are not lanes:
// several rows of them pass every key and value together. Keys are cut into parts of kDecodeKeys, so that few heads
// still occupy all threads; the parts of a row, each with its own maximum m, sum l and output o, are merged in order
// ("Flash-Decoding", Dao et al., 2023):
//   out = sum_p e^(m_p - m) o_p / sum_p e^(m_p - m) l_p
// Work item: (b, kv head, part), or, when p.merge, a row (b, head, query). Records are m, l, o[head_dim_v].

template <class S>
class AttentionDecode {
 public:
  using A = Acc<S>;
  using V = Vec<A>;

  AttentionDecode(const AttentionParams& p, ScratchCursor& scratch)
      : p_(p),
        group_(p.heads_kv > 0 ? p.heads / p.heads_kv : 0),
        rows_(p.rows),
        parts_((p.keys + kDecodeKeys - 1) / kDecodeKeys),
        ld_q_(round_up(p.head_dim, V::kLanes)),
        q_(scratch.take<A>(group_ * p.rows * ld_q_)),
        s_(scratch.take<A>(group_ * p.rows * kRowScores<A>)),
        mask_(scratch.take<A>(kRowScores<A>)),
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
      load_row(row_at<S>(p_.q, p_.q_stride, b, h, p_.first_row + i), p_.head_dim, ld_q_, q_ + r * ld_q_);
    }
    runs(p_.k, p_.k_stride, p_.head_dim, b, kv, key, count, [&](int64_t first, const S* k, int64_t n) {
      dot_all(rows_of_keys(p_, b, kv, key, k, n), q_, ld_q_, rows, s_ + first);
    });
    bool sparse = false;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group_ + r / p_.rows, i = r % p_.rows;
      A* sums = record(b, h, i) + index * (p_.head_dim_v + 2);
      A* s = s_ + r * kRowScores<A>;
      score_row<A>(p_, ScoreBlock{b, h, i, 1, 1, key, count}, s, mask_, nullptr);
      sparse |= !softmax_row(count, s, sums);
    }
    std::fill_n(o_, rows * ld_o_, A(0));
    runs(p_.v, p_.v_stride, p_.head_dim_v, b, kv, key, count, [&](int64_t first, const S* v, int64_t n) {
      weigh_all(rows_of_values(p_, b, kv, key, v, n), s_ + first, rows, sparse, o_, ld_o_);
    });
    for (int64_t r = 0; r < rows; ++r) {
      A* sums = record(b, kv * group_ + r / p_.rows, r % p_.rows) + index * (p_.head_dim_v + 2);
      std::copy_n(o_ + r * ld_o_, p_.head_dim_v, sums + 2);
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
    store_lse(p_, row_index(p_, b, h) + i, m, l);
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
