// Attention backward of a few queries to many keys. Contract: AttentionBackwardParams in params.h, `partial` set.
//
// With queries as lanes (attention_backward-inl.h) all but a few lanes of a product would be empty. As in
// attention_decode-inl.h channels are lanes here, several rows of queries pass every key and value together, and keys
// are cut into parts of kDecodeKeys. For row r and key j:
//   p = e^(s_rj - lse_r)    ds = p (dout_r.v_j - delta_r)    dv_j = Σ_r p dout_r    dk_j = Σ_r ds q_r
// dq_r = Σ_j ds k_j is summed within parts, then over them in ascending order.
// Work item: (b, kv head, part), or, when p.merge, a row (b, head, query). Records are Σ_j ds ∂s/∂slope and
// dq[head_dim].

// sums_j = factor Σ_r weight_rj x_r for all keys and channels; weights and rows from `rows` up to R are zeros.
template <int R, class S>
inline void spread_rows(const Acc<S>* weight, const Acc<S>* x, int64_t ld, int64_t channels, double factor,
                        int64_t keys, S* sums) {
  using A = Acc<S>;
  using V = Vec<A>;
  constexpr int kVectors = R > 4 ? 2 : 4;
  const V scale(static_cast<A>(factor));
  for (int64_t d = 0; d < channels; d += kVectors * V::kLanes) {
    V row[R][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) row[r][i] = V::load(x + r * ld + d + i * V::kLanes);
    }
    const int64_t left = channels - d;
    for (int64_t j = 0; j < keys; ++j) {
      V factor_of[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) factor_of[r] = V(weight[r * kRowScores<A> + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        if (i * V::kLanes >= left) break;
        V sum = row[0][i] * factor_of[0];
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) sum = fma(row[r][i], factor_of[r], sum);
        store_part(sum * scale, sums + j * channels + d + i * V::kLanes,
                   std::min<int64_t>(V::kLanes, left - i * V::kLanes));
      }
    }
  }
}

template <class S>
class AttentionDecodeBackward {
 public:
  using A = Acc<S>;
  using V = Vec<A>;
  static constexpr int64_t kVectors = 4;  // spread_rows reads so many at a time

  AttentionDecodeBackward(const AttentionBackwardParams& p, ScratchCursor& scratch)
      : p_(p),
        group_(p.heads / p.heads_kv),
        most_rows_(p.rows),
        together_(rows_together(group_ * p.rows)),
        parts_((p.keys + kDecodeKeys - 1) / kDecodeKeys),
        ld_q_(round_up(p.head_dim, kVectors * V::kLanes)),
        ld_dout_(round_up(p.head_dim_v, kVectors * V::kLanes)),
        ld_dq_(round_up(p.head_dim, 8 * V::kLanes)),
        q_(scratch.take<A>(together_ * ld_q_)),
        dout_(scratch.take<A>(together_ * ld_dout_)),
        s_(scratch.take<A>(together_ * kRowScores<A>)),
        dp_(scratch.take<A>(together_ * kRowScores<A>)),
        dq_(scratch.take<A>(together_ * ld_dq_)),
        mask_(scratch.take<A>(kRowScores<A>)),
        cap_slope_(scratch.take<A>(kRowScores<A>)) {}

  void run(Range range) {
    for (int64_t item = range.begin; item < range.end; ++item) {
      if (p_.merge) {
        const auto [b, h, i] = block_item(p_, p_.heads, most_rows_, item);
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
  static int64_t rows_together(int64_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

  // Row r of a kv head, which serves `group_` heads.
  struct Row {
    int64_t head, index;
  };
  Row row_of(int64_t kv, int64_t r) const { return {kv * group_ + r / p_.rows, r % p_.rows}; }

  A* record(int64_t b, Row row, int64_t part) const {
    return static_cast<A*>(p_.partial) +
           (((b * p_.heads + row.head) * most_rows_ + row.index) * parts_ + part) * (p_.head_dim + 1);
  }

  void part(int64_t b, int64_t kv, int64_t index) {
    const int64_t key = index * kDecodeKeys, count = std::min(kDecodeKeys, p_.keys - key);
    const int64_t rows = group_ * p_.rows, at = p_.first_key + key;
    const int64_t to = b * p_.key_stride[0] + kv * p_.key_stride[1] + at;
    S* dk = static_cast<S*>(p_.dk) + to * p_.head_dim;
    S* dv = static_cast<S*>(p_.dv) + to * p_.head_dim_v;
    const Range visible = visible_keys(p_, 0, p_.rows);
    if (key >= visible.end || key + count <= visible.begin) {
      for (int64_t r = 0; r < rows; ++r) std::fill_n(record(b, row_of(kv, r), index), p_.head_dim + 1, A(0));
      std::fill_n(dk, count * p_.head_dim, S{});
      std::fill_n(dv, count * p_.head_dim_v, S{});
      return;
    }
    RowStatistics<A> statistics[8];
    for (int64_t r = 0; r < rows; ++r) statistics[r] = load_queries(b, row_of(kv, r), r);
    clear_rows(rows);
    const KeyRows<S> keys = rows_of_keys(p_, b, kv, key, row_at<S>(p_.k, p_.k_stride, b, kv, at), count);
    const KeyRows<S> values = rows_of_values(p_, b, kv, key, row_at<S>(p_.v, p_.v_stride, b, kv, at), count);
    dot_all(keys, q_, ld_q_, rows, s_);
    dot_all(values, dout_, ld_dout_, rows, dp_);
    bool sparse = false;
    for (int64_t r = 0; r < rows; ++r) {
      const Row row = row_of(kv, r);
      A *s = s_ + r * kRowScores<A>, *dp = dp_ + r * kRowScores<A>;
      const ScoreBlock block{b, row.head, row.index, 1, 1, key, count};
      score_row<A>(p_, block, s, mask_, p_.softcap > 0 ? cap_slope_ : nullptr);
      sparse |= gradient_row(block, statistics[r], s, dp, record(b, row, index));
    }
    std::fill_n(dq_, rows * ld_dq_, A(0));
    KeyRows<S> near = keys;
    near.distance = 0;
    weigh_all(near, dp_, rows, sparse, dq_, ld_dq_);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(dq_ + r * ld_dq_, p_.head_dim, record(b, row_of(kv, r), index) + 1);
    }
    spread(s_, dout_, ld_dout_, p_.head_dim_v, 1.0, count, dv);
    spread(dp_, q_, ld_q_, p_.head_dim, p_.scale, count, dk);
  }

  // Rows that complete those which pass together.
  void clear_rows(int64_t from) {
    const int64_t count = together_ - from;
    std::fill_n(q_ + from * ld_q_, count * ld_q_, A(0));
    std::fill_n(dout_ + from * ld_dout_, count * ld_dout_, A(0));
    std::fill_n(s_ + from * kRowScores<A>, count * kRowScores<A>, A(0));
    std::fill_n(dp_ + from * kRowScores<A>, count * kRowScores<A>, A(0));
  }

  // A row that saw nothing enters as zeros: its probabilities are, but its gradient may be anything.
  RowStatistics<A> load_queries(int64_t b, Row row, int64_t r) {
    const RowStatistics<A> statistics = row_statistics<S>(p_, b, row.head, row.index);
    const bool hidden = statistics.shift == std::numeric_limits<A>::infinity();
    const int64_t at = p_.first_row + row.index;
    const S* q = row_at<S>(p_.q, p_.q_stride, b, row.head, at);
    const S* dout = row_at<S>(p_.dout, p_.dout_stride, b, row.head, at);
    load_row(q, hidden ? 0 : p_.head_dim, ld_q_, q_ + r * ld_q_);
    load_row(dout, hidden ? 0 : p_.head_dim_v, ld_dout_, dout_ + r * ld_dout_);
    return statistics;
  }

  // Scores to probabilities, dout.v to ds. Returns whether some probability is 0 or NaN: those keys are not touched.
  bool gradient_row(const ScoreBlock& row, const RowStatistics<A>& of, A* s, A* dp, A* record) {
    const V shift(-of.shift), factor(of.factor), delta(of.delta), unit(kLogUnit<A>);
    V slope_sum = V::zero(), lowest(std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < row.keys; j += V::kLanes) {
      const V p = exp_unit<false>(fma(V::load(s + j), unit, shift)) * factor;
      V ds = select(le(p, V::zero()), V::zero(), p * (V::load(dp + j) - delta));
      if (row.keys - j < V::kLanes) {
        const auto exists = first_n<A>(row.keys - j);
        ds = select(exists, ds, V::zero());
        lowest = min(lowest, select(exists, p, lowest));
      } else {
        lowest = min(lowest, p);
      }
      if (p_.slope_rows != nullptr) {
        slope_sum = fnma(ds, abs(V::iota(static_cast<A>(row.key + j - row.row - p_.diagonal))), slope_sum);
      }
      p.store(s + j);
      (p_.softcap > 0 ? ds * V::load(cap_slope_ + j) : ds).store(dp + j);
    }
    record[0] = reduce_add(slope_sum);
    return !(reduce_max(V::zero() - lowest) < A(0));
  }

  void spread(const A* weight, const A* x, int64_t ld, int64_t channels, double factor, int64_t keys, S* to) const {
    switch (together_) {
      case 1:
        return spread_rows<1>(weight, x, ld, channels, factor, keys, to);
      case 2:
        return spread_rows<2>(weight, x, ld, channels, factor, keys, to);
      case 4:
        return spread_rows<4>(weight, x, ld, channels, factor, keys, to);
      default:
        return spread_rows<8>(weight, x, ld, channels, factor, keys, to);
    }
  }

  void merge_row(int64_t b, int64_t h, int64_t i) {
    const int64_t row = row_index(p_, b, h) + i;
    const V scale(static_cast<A>(p_.scale));
    A slope_sum = A(0);
    std::fill_n(dq_, p_.head_dim, A(0));
    for (int64_t part = 0; part * kDecodeKeys < p_.keys; ++part) {
      const A* sums = record(b, Row{h, i}, part);
      slope_sum += sums[0];
      for (int64_t d = 0; d < p_.head_dim; d += V::kLanes) {
        const int64_t n = std::min<int64_t>(V::kLanes, p_.head_dim - d);
        (V::load_n(sums + 1 + d, n) + V::load_n(dq_ + d, n)).store_n(dq_ + d, n);
      }
    }
    S* dq = static_cast<S*>(p_.dq) + row * p_.head_dim;
    for (int64_t d = 0; d < p_.head_dim; d += V::kLanes) {
      const int64_t n = std::min<int64_t>(V::kLanes, p_.head_dim - d);
      (V::load_n(dq_ + d, n) * scale).store_n(dq + d, n);
    }
    if (p_.delta != nullptr) static_cast<A*>(p_.delta)[row] = row_statistics<S>(p_, b, h, i).delta;
    if (p_.slope_rows != nullptr) static_cast<A*>(p_.slope_rows)[row] = slope_sum;
  }

  AttentionBackwardParams p_;  // with the extents of the sequence at hand
  // most_rows_, parts_: of the longest sequence; together_: all rows of queries of a kv head, and rows of zeros.
  const int64_t group_, most_rows_, together_, parts_, ld_q_, ld_dout_, ld_dq_;
  A *q_, *dout_, *s_, *dp_, *dq_, *mask_, *cap_slope_;
};

inline void attention_backward(const AttentionBackwardParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (p.partial != nullptr) {
      run_with_scratch<AttentionDecodeBackward<S>>(p, range);
    } else {
      run_with_scratch<AttentionBackward<S>>(p, range);
    }
  });
}
