// Attention forward (Dao et al., "FlashAttention", 2022; online softmax: Milakov & Gimelshein, 2018; the lazy rescale:
// Zadouri et al., "FlashAttention-4", 2026). Contract: AttentionParams in params.h. Work item: (b, head, query block).
//
// For each block of keys that a query block can see:
//   S^T = K Q^T              K in place, Q^T packed once per query block
//   m, l, P^T = exp(S^T - m)  lane-wise, P^T written straight into the packed layout of the next product
//   O^T += V^T P^T           V^T prepared once per kv head
// and at the end out = (O^T / l)^T, lse = m + log l. A row's running maximum moves only when a score exceeds it by 2^8
// (decided lane by lane), so that O^T is rarely rescaled; probabilities up to 2^8 are harmless in any storage type.

template <class S>
class AttentionForward {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  using V = Vec<A>;
  static constexpr bool kCoarse = sizeof(S) == 2;

  AttentionForward(const AttentionParams& p, ScratchCursor& scratch)
      : p_(p),
        k_rows_(p, scratch, p.head_dim),
        v_rows_(p, scratch, p.head_dim_v),
        keys_(scratch, p.keys, p.head_dim),
        values_(scratch, p.keys, p.head_dim_v),
        q_(scratch.take<T>(G::packed_size(p.head_dim, kAttentionQueries))),
        s_(scratch.take<A>(kAttentionKeys * kAttentionQueries)),
        mask_(scratch.take<A>(p.mask != nullptr ? kAttentionKeys * kAttentionQueries : 0)),
        drop_(scratch.take<float>(p.dropout.threshold != 0 ? kAttentionKeys * kAttentionQueries : 0)),
        probabilities_(scratch.take<T>(G::packed_size(kAttentionKeys, kAttentionQueries))),
        o_(scratch.take<A>(p.head_dim_v * kAttentionQueries)),
        m_(scratch.take<A>(kAttentionQueries)),
        l_(scratch.take<A>(kAttentionQueries)) {}

  void run(Range range) {
    const int64_t blocks = (p_.rows + kAttentionQueries - 1) / kAttentionQueries;
    int64_t cached = -1;
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [b, h, block] = block_item(p_, p_.heads, blocks, item);
      const int64_t kv = h / (p_.heads / p_.heads_kv);
      if (cached != b * p_.heads_kv + kv) {
        cached = b * p_.heads_kv + kv;
        enter_sequence(p_, b);
        k_rows_.select(p_, p_.k, p_.k_stride, b, kv);
        v_rows_.select(p_, p_.v, p_.v_stride, b, kv);
        keys_.reset(k_rows_.rows(), k_rows_.ld(), p_.keys);
        values_.reset(v_rows_.rows(), v_rows_.ld(), p_.keys);
      }
      query_block(b, h, block * kAttentionQueries);
    }
  }

 private:
  void query_block(int64_t b, int64_t h, int64_t row) {
    ScoreBlock block{b, h, row, std::min(kAttentionQueries, p_.rows - row), 0, 0, 0};
    block.lanes = round_up(block.rows, G::kNr);
    const S* q =
        static_cast<const S*>(p_.q) + b * p_.q_stride[0] + h * p_.q_stride[1] + (p_.first_row + row) * p_.q_stride[2];
    G::pack_transposed(q, p_.q_stride[2], p_.head_dim, block.rows, q_);
    // A sink is a score that has been seen and carries no value.
    const A sink = p_.sinks != nullptr ? static_cast<const A*>(p_.sinks)[h] * kLogUnit<A> : 0;
    std::fill_n(m_, block.lanes, p_.sinks != nullptr ? sink : -std::numeric_limits<A>::infinity());
    std::fill_n(l_, block.lanes, p_.sinks != nullptr ? A(1) : A(0));

    const Range visible = visible_keys(p_, row, block.rows);
    bool first = true;
    for (int64_t j = visible.begin; j < visible.end; j += block.keys) {
      block.key = j;
      block.keys = std::min((j / kAttentionKeys + 1) * kAttentionKeys, visible.end) - j;
      if (key_block(block, first)) first = false;
    }
    if (first) std::fill_n(o_, p_.head_dim_v * block.lanes, A(0));
    write(block);
  }

  // Returns whether the block contributed.
  bool key_block(const ScoreBlock& block, bool first) {
    if (p_.mask != nullptr && !load_mask_tile(p_, block, mask_)) return false;
    G::multiply(keys_.row(block.key), keys_.ld(), q_, block.keys, block.lanes, p_.head_dim, s_, block.lanes, false);
    A unit = static_cast<A>(p_.scale) * kLogUnit<A>;
    if (needs_finish(p_, block)) {
      finish_scores(p_, block, p_.mask != nullptr ? mask_ : nullptr, s_, static_cast<A*>(nullptr));
      unit = kLogUnit<A>;
    }
    if (p_.dropout.threshold != 0) {
      dropout_tile(p_, block, drop_);
      softmax<true>(block, unit, first);
    } else {
      softmax<false>(block, unit, first);
    }
    const T* values = values_.columns(block.key);
    G::multiply(values, values_.ld(), probabilities_, p_.head_dim_v, block.lanes, block.keys, o_, block.lanes, !first);
    if (values_.has_special(block.key)) {
      values_.add_special(block, o_, [&](int64_t j, int64_t c) {
        return G::packed_value(probabilities_ + G::packed_index(j, c, block.keys), block.keys);
      });
    }
    return true;
  }

  // P^T = exp(unit * S^T - m) and its sums; moves m, l and O^T where a lane's maximum has risen by more than 2^8.
  template <bool kDropout>
  void softmax(const ScoreBlock& block, A unit, bool first) {
    constexpr int kVectors = G::kNr / V::kLanes;
    const int64_t lanes = block.lanes;
    for (int64_t c = 0; c < lanes; c += G::kNr) {
      V m[kVectors], sum[kVectors];
      highest<kVectors>(block, s_ + c, m);
      for (int v = 0; v < kVectors; ++v) {
        m[v] = raise_maximum(m[v] * V(unit), c + v * V::kLanes, lanes, first);
        sum[v] = V::zero();
      }
      T* panel = probabilities_ + G::packed_index(0, c, block.keys);
      for (int64_t j = 0; j < block.keys; j += G::kStep) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V row[G::kStep];
#pragma GCC unroll 2
          for (int step = 0; step < G::kStep; ++step) {
            row[step] = V::zero();
            if (G::kStep > 1 && j + step >= block.keys) continue;
            const int64_t at = (j + step) * lanes + c + v * V::kLanes;
            row[step] = exp_unit<kCoarse>(fma(V::load(s_ + at), V(unit), V::zero() - m[v]));
            sum[v] = sum[v] + row[step];
            if constexpr (kDropout) row[step] = row[step] * V::load(drop_ + at);
          }
          G::store_packed(row, panel + j * G::kNr + v * V::kLanes * G::kStep, block.keys);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        A* l = l_ + c + v * V::kLanes;
        (V::load(l) + sum[v]).store(l);
      }
    }
    G::zero_packed_tail(probabilities_, block.keys, lanes);
  }

  template <int kVectors>
  static void highest(const ScoreBlock& block, const A* s, V (&m)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) m[v] = V(-std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < block.keys; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) m[v] = max(m[v], V::load(s + j * block.lanes + v * V::kLanes));
    }
  }

  // The maximum to subtract in lanes [c, c + kLanes): never -inf, so that a masked score gives exp(-inf) = 0.
  V raise_maximum(V seen, int64_t c, int64_t lanes, bool first) {
    const V hidden(-std::numeric_limits<A>::infinity()), before = V::load(m_ + c);
    const auto rises = lt(before + V(A(8)), seen);
    if (reduce_max(select(rises, V(A(1)), V::zero())) > A(0)) {
      const V after = select(rises, seen, before);
      const V factor = select(rises, exp_unit<false>(before - after), V(A(1)));
      after.store(m_ + c);
      (V::load(l_ + c) * factor).store(l_ + c);
      for (int64_t d = 0; !first && d < p_.head_dim_v; ++d) {
        A* o = o_ + d * lanes + c;
        (V::load(o) * factor).store(o);
      }
    }
    const V m = V::load(m_ + c);
    return select(le(m, hidden), V::zero(), m);
  }

  void write(const ScoreBlock& block) {
    const int64_t lanes = block.lanes;
    for (int64_t c = 0; c < lanes; c += V::kLanes) {
      const V l = V::load(l_ + c);
      const V inverse = select(le(l, V::zero()), V::zero(), V(static_cast<A>(p_.dropout_scale)) / l);
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        A* o = o_ + d * lanes + c;
        (V::load(o) * inverse).store(o);
      }
    }
    S* out = static_cast<S*>(p_.out) + block.batch * p_.out_stride[0] + block.head * p_.out_stride[1] +
             (p_.first_row + block.row) * p_.out_stride[2];
    transpose_block(o_, lanes, p_.head_dim_v, block.rows, out, p_.out_stride[2]);
    A* lse = static_cast<A*>(p_.lse) + row_index(p_, block.batch, block.head) + block.row;
    for (int64_t c = 0; c < block.rows; ++c) lse[c] = m_[c] / kLogUnit<A> + std::log(l_[c]);
  }

  AttentionParams p_;  // with the extents of the sequence at hand
  SequenceRows<S> k_rows_, v_rows_;
  OperandRows<S> keys_;
  TransposedRows<S> values_;
  T* q_;
  A *s_, *mask_;
  float* drop_;
  T* probabilities_;
  A *o_, *m_, *l_;
};

// Runs Kernel(params, scratch).run(range) with as much scratch as its constructor takes.
template <class Kernel, class Params>
inline void run_with_scratch(const Params& p, Range range) {
  ScratchCursor measure(nullptr);
  {
    Kernel sized(p, measure);
  }
  const size_t bytes = reinterpret_cast<uintptr_t>(measure.take<char>(0));
  ScratchCursor scratch(thread_scratch(bytes + 64));
  Kernel(p, scratch).run(range);
}
