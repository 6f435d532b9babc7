// Attention forward (Dao et al., "FlashAttention", 2022; online softmax: Milakov & Gimelshein, 2018; the lazy rescale:
// Zadouri et al., "FlashAttention-4", 2026). Contract: AttentionParams in params.h. Work item: (b, head, query block).
//
// For each block of keys that a query block can see:
//   S^T = K Q^T              K in place, Q^T packed once per query block
//   m, l, P^T = exp(S^T - m)  lane-wise, P^T written straight into the packed layout of the next product
//   O^T += V^T P^T           V in place or prepared once per kv head
// and at the end out = (O^T / l)^T, lse = m + log l. A row's running maximum moves only when a score exceeds it by 2^8
// (decided lane by lane), so that O^T is rarely rescaled; probabilities up to 2^8 are harmless in any storage type.

// Query blocks that are taken through the keys together: one, unless keys and values of a head outgrow this share of
// the L2 cache and would have to come from afar for every query block.
constexpr int64_t kQueryBlocksTogether = 8;
constexpr int64_t kResidentBytes = 256 << 10;

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
        together_(blocks_together(p)),
        k_rows_(p, scratch, p.head_dim),
        v_rows_(p, scratch, p.head_dim_v),
        keys_(scratch, p.keys, p.head_dim),
        value_rows_(scratch, OperandColumns<S>::kShared ? p.keys : 0, p.head_dim_v),
        values_(scratch, p.keys, p.head_dim_v, &value_rows_),
        s_(scratch.take<A>(kAttentionKeys * kAttentionQueries)),
        drop_(scratch.take<float>(p.dropout.threshold != 0 ? kAttentionKeys * kAttentionQueries : 0)),
        probabilities_(scratch.take<T>(G::packed_size(kAttentionKeys, kAttentionQueries))) {
    for (int64_t i = 0; i < together_; ++i) {
      state_[i].q = scratch.take<T>(G::packed_size(p.head_dim, kAttentionQueries));
      state_[i].o = scratch.take<A>(p.head_dim_v * kAttentionQueries);
      state_[i].m = scratch.take<A>(kAttentionQueries);
      state_[i].l = scratch.take<A>(kAttentionQueries);
    }
  }

  void run(Range range) {
    const int64_t blocks = query_blocks();
    int64_t cached = -1;
    for (int64_t item = range.begin; item < range.end;) {
      const auto [b, h, first] = block_item(p_, p_.heads, blocks, item);
      const int64_t kv = h / (p_.heads / p_.heads_kv);
      if (cached != b * p_.heads_kv + kv) {
        cached = b * p_.heads_kv + kv;
        enter_sequence(p_, b);
        k_rows_.select(p_, p_.k, p_.k_stride, b, kv);
        v_rows_.select(p_, p_.v, p_.v_stride, b, kv);
        keys_.reset(k_rows_.rows(), k_rows_.ld(), p_.keys);
        value_rows_.reset(v_rows_.rows(), v_rows_.ld(), OperandColumns<S>::kShared ? p_.keys : 0);
        values_.reset(v_rows_.rows(), v_rows_.ld(), p_.keys);
      }
      const int64_t count = std::min({together_, query_blocks() - first, range.end - item});
      item += count;
      pass(b, h, first, count, item < range.end ? item : -1);
    }
  }

 private:
  struct QueryBlock {
    ScoreBlock block;
    Range visible;
    T* q;
    A *o, *m, *l;
    bool empty;  // no key block has contributed yet
  };

  int64_t query_blocks() const { return (p_.rows + kAttentionQueries - 1) / kAttentionQueries; }

  static int64_t blocks_together(const AttentionParams& p) {
    const int64_t channels = p.head_dim + p.head_dim_v, operand = sizeof(T) * G::kParts;
    const int64_t state = kAttentionQueries * (p.head_dim * operand + p.head_dim_v * static_cast<int64_t>(sizeof(A)));
    if (p.keys * channels * operand <= 2 * kResidentBytes) return 1;
    return std::max<int64_t>(1, std::min(kQueryBlocksTogether, kResidentBytes / std::max<int64_t>(1, state)));
  }

  S* out_row(const ScoreBlock& block) const {
    return row_at<S>(p_.out, p_.out_stride, block.batch, block.head, p_.first_row + block.row);
  }

  // The query blocks [first, first + count) of a head, together. `next` is the work item that follows, or -1.
  void pass(int64_t b, int64_t h, int64_t first, int64_t count, int64_t next) {
    Range keys{p_.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
      prepare(b, h, first + i, &state_[i]);
      keys.begin = std::min(keys.begin, state_[i].visible.begin);
      keys.end = std::max(keys.end, state_[i].visible.end);
    }
    for (int64_t from = keys.begin; from < keys.end;) {
      const int64_t to = std::min((from / kAttentionKeys + 1) * kAttentionKeys, keys.end);
      fetch_ahead(b, h, count, Range{to, keys.end}, next);
      for (int64_t i = 0; i < count; ++i) {
        ScoreBlock block = state_[i].block;
        block.key = std::max(from, state_[i].visible.begin);
        block.keys = std::min(to, state_[i].visible.end) - block.key;
        if (block.keys > 0 && key_block(state_[i], block)) state_[i].empty = false;
      }
      from = to;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (state_[i].empty) std::fill_n(state_[i].o, p_.head_dim_v * state_[i].block.lanes, A(0));
      write(state_[i]);
    }
  }

  void prepare(int64_t b, int64_t h, int64_t index, QueryBlock* x) {
    const int64_t row = index * kAttentionQueries;
    x->block = ScoreBlock{b, h, row, std::min(kAttentionQueries, p_.rows - row), 0, 0, 0};
    x->block.lanes = round_up(x->block.rows, G::kNr);
    x->visible = visible_keys(p_, row, x->block.rows);
    x->empty = true;
    const S* q = row_at<S>(p_.q, p_.q_stride, b, h, p_.first_row + row);
    G::pack_transposed(q, p_.q_stride[2], p_.head_dim, x->block.rows, x->q);
    // A sink is a score that has been seen and carries no value.
    const A sink = p_.sinks != nullptr ? static_cast<const A*>(p_.sinks)[h] * kLogUnit<A> : 0;
    std::fill_n(x->m, x->block.lanes, p_.sinks != nullptr ? sink : -std::numeric_limits<A>::infinity());
    std::fill_n(x->l, x->block.lanes, p_.sinks != nullptr ? A(1) : A(0));
  }

  // What follows the block of keys before rest.begin: the next keys and values, or where the results go and what the
  // next work item starts with.
  void fetch_ahead(int64_t b, int64_t h, int64_t count, Range rest, int64_t next) {
    ahead_.clear();
    const int64_t size = sizeof(S), group = p_.heads / p_.heads_kv;
    const auto add = [&](const S* rows, int64_t ld, int64_t channels, int64_t n) {
      ahead_.add(rows, channels * size, ld * size, n);
    };
    if (rest.begin < rest.end) {
      for (int64_t i = 0; i < count; ++i) {
        ScoreBlock block = state_[i].block;
        block.key = rest.begin;
        block.keys = std::min({kAttentionKeys, rest.end - rest.begin, state_[i].visible.end - rest.begin});
        fetch_mask(p_, block, &ahead_);
      }
      const int64_t keys = std::min(kAttentionKeys, rest.end - rest.begin);
      add(k_rows_.rows() + rest.begin * k_rows_.ld(), k_rows_.ld(), p_.head_dim, keys);
      add(v_rows_.rows() + rest.begin * v_rows_.ld(), v_rows_.ld(), p_.head_dim_v, keys);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const ScoreBlock& block = state_[i].block;
      add(out_row(block), p_.out_stride[2], p_.head_dim_v, block.rows);
    }
    if (next < 0 || p_.block_table != nullptr) return;
    const auto [next_b, next_h, index] = block_item(p_, p_.heads, query_blocks(), next);
    const Sequence own = sequence_of(p_, next_b);
    const int64_t row = index * kAttentionQueries, kv = next_h / group;
    const int64_t rows = std::min(kAttentionQueries, own.rows - row);
    add(row_at<S>(p_.q, p_.q_stride, next_b, next_h, own.q_begin + row), p_.q_stride[2], p_.head_dim, rows);
    fetch_mask(p_, ScoreBlock{next_b, next_h, row, rows, 0, 0, std::min(kAttentionKeys, own.keys)}, &ahead_);
    if (next_b == b && kv == h / group) return;
    const int64_t keys = std::min(kAttentionKeys, own.keys);
    add(row_at<S>(p_.k, p_.k_stride, next_b, kv, own.k_begin), p_.k_stride[2], p_.head_dim, keys);
    add(row_at<S>(p_.v, p_.v_stride, next_b, kv, own.k_begin), p_.v_stride[2], p_.head_dim_v, keys);
  }

  // Returns whether the block contributed.
  bool key_block(const QueryBlock& x, const ScoreBlock& block) {
    const Cover cover = mask_cover(p_, block);
    if (cover == Cover::kHidden) return false;
    G::multiply(keys_.row(block.key), keys_.ld(), x.q, block.keys, block.lanes, p_.head_dim, s_, block.lanes, false);
    const A unit = score_block(p_, block, cover, s_, static_cast<A*>(nullptr));
    if (p_.dropout.threshold != 0) {
      dropout_tile(p_, block, drop_);
      softmax<true>(x, block, unit);
    } else {
      softmax<false>(x, block, unit);
    }
    values_.multiply(block, probabilities_, x.o, !x.empty, [&](int64_t j, int64_t c) {
      return G::packed_value(probabilities_ + G::packed_index(j, c, block.keys), block.keys);
    });
    return true;
  }

  // P^T = exp(unit * S^T - m) and its sums; moves m, l and O^T where a lane's maximum has risen by more than 2^8.
  template <bool kDropout>
  void softmax(const QueryBlock& x, const ScoreBlock& block, A unit) {
    constexpr int kVectors = G::kNr / V::kLanes;
    const int64_t lanes = block.lanes;
    for (int64_t c = 0; c < lanes; c += G::kNr) {
      V m[kVectors], sum[kVectors], total[kVectors];
      highest<kVectors>(block, s_ + c, m);
      for (int v = 0; v < kVectors; ++v) {
        m[v] = raise_maximum(x, m[v] * V(unit), c + v * V::kLanes, lanes);
        sum[v] = total[v] = V::zero();
      }
      T* panel = probabilities_ + G::packed_index(0, c, block.keys);
      for (int64_t j = 0; j < block.keys; j += G::kStep) {
        for (int step = 0; step < G::kStep; ++step) ahead_.step();
        // Sums of 16 keys: one long chain would round the whole row by more than its probabilities are.
        if (j % 16 == 0) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) total[v] = total[v] + sum[v], sum[v] = V::zero();
        }
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
        A* l = x.l + c + v * V::kLanes;
        (V::load(l) + (total[v] + sum[v])).store(l);
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
  V raise_maximum(const QueryBlock& x, V seen, int64_t c, int64_t lanes) {
    const V hidden(-std::numeric_limits<A>::infinity()), before = V::load(x.m + c);
    const auto rises = lt(before + V(A(8)), seen);
    if (reduce_max(select(rises, V(A(1)), V::zero())) > A(0)) {
      const V after = select(rises, seen, before);
      const V factor = select(rises, exp_unit<false>(before - after), V(A(1)));
      after.store(x.m + c);
      (V::load(x.l + c) * factor).store(x.l + c);
      for (int64_t d = 0; !x.empty && d < p_.head_dim_v; ++d) {
        A* o = x.o + d * lanes + c;
        (V::load(o) * factor).store(o);
      }
    }
    const V m = V::load(x.m + c);
    return select(le(m, hidden), V::zero(), m);
  }

  void write(const QueryBlock& x) {
    const ScoreBlock& block = x.block;
    const int64_t lanes = block.lanes;
    for (int64_t c = 0; c < lanes; c += V::kLanes) {
      const V l = V::load(x.l + c);
      const V inverse = select(le(l, V::zero()), V::zero(), V(static_cast<A>(p_.dropout_scale)) / l);
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        A* o = x.o + d * lanes + c;
        (V::load(o) * inverse).store(o);
      }
    }
    transpose_block(x.o, lanes, p_.head_dim_v, block.rows, out_row(block), p_.out_stride[2]);
    const int64_t row = row_index(p_, block.batch, block.head) + block.row;
    for (int64_t c = 0; c < block.rows; ++c) store_lse(p_, row + c, x.m[c], x.l[c]);
  }

  AttentionParams p_;  // with the extents of the sequence at hand
  const int64_t together_;
  SequenceRows<S> k_rows_, v_rows_;
  OperandRows<S> keys_, value_rows_;
  OperandColumns<S> values_;
  A* s_;
  float* drop_;
  T* probabilities_;
  QueryBlock state_[kQueryBlocksTogether];
  RowPrefetch ahead_;
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
