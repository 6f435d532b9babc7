// Attention backward (Dao et al., "FlashAttention-2", 2023). Contract: AttentionBackwardParams in params.h.
//
// For each pair of a query block and a key block, probabilities again from what forward saved, everything transposed:
//   S^T = K Q^T       P^T = exp(S^T - lse)                       lse, or m and 1 / l, and delta are lanes
//   dP^T = V dO^T     dS^T = P^T * (dP^T - delta)                delta = rowsum(dout * out) - dlse
//   dV += P^T dO      dK += dS^T Q                               P^T and dS^T as they lie are the left operands
//   dQ^T += K^T dS^T                                             dS^T again in packed form as the right operand
// Sums run over query blocks (and the heads of a group) and over key blocks in ascending order, whatever the stage, so
// that results depend neither on the number of threads nor on which stages computed them.

// Query blocks of a chunk: up to so many, and so many bytes of them with their gradients. One block of keys, values and
// their gradients has its place in a 1 MiB L2 cache beside them.
constexpr int64_t kQueryBlocksResident = 8;
constexpr int64_t kResidentQueries = 192 << 10;
// Key blocks of a chunk in stage kKeys, and tiles in stage kMask, for which queries are prepared once.
constexpr int64_t kKeyBlocksTogether = 4;

// Of 16-bit inputs the products lose far more than lse does, of double nobody misses it.
template <class S>
constexpr bool kKeepsStatistics = std::is_same_v<S, float>;

// Of a row of queries: p = factor * exp_unit(score - shift), and delta. A row that saw nothing has shift = +inf.
template <class A>
struct RowStatistics {
  A shift, factor, delta;
};
template <class S>
inline RowStatistics<Acc<S>> row_statistics(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t i) {
  using A = Acc<S>;
  using V = Vec<A>;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const int64_t row = row_index(p, b, h) + i;
  const A lse = static_cast<const A*>(p.lse)[row];
  if (lse == -kInf) return {kInf, A(1), A(0)};
  const S* dout = row_at<S>(p.dout, p.dout_stride, b, h, p.first_row + i);
  const S* out = row_at<S>(static_cast<const void*>(p.out), p.out_stride, b, h, p.first_row + i);
  V sum = V::zero();
  for (int64_t d = 0; d < p.head_dim_v; d += V::kLanes) {
    const int64_t n = std::min<int64_t>(V::kLanes, p.head_dim_v - d);
    sum = fma(V::load_n(dout + d, n), V::load_n(out + d, n), sum);
  }
  const A delta = reduce_add(sum) - (p.dlse != nullptr ? static_cast<const A*>(p.dlse)[row] : A(0));
  if (p.statistics != nullptr) {
    const A* statistics = static_cast<const A*>(p.statistics) + row;
    return {statistics[0], A(1) / statistics[p.statistics_stride], delta};
  }
  const A shift = lse * kLogUnit<A>, rest = std::fma(lse, kLogUnit<A>, -shift);
  return {shift, A(1) - rest / kLogUnit<A>, delta};
}

template <class S>
class AttentionBackward {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  using V = Vec<A>;
  static constexpr bool kCoarse = sizeof(S) == 2;
  static constexpr int64_t kTile = kAttentionKeys * kAttentionQueries;

  AttentionBackward(const AttentionBackwardParams& p, ScratchCursor& scratch)
      : p_(p),
        for_queries_(p.stage == AttentionStage::kAll || p.stage == AttentionStage::kQueries),
        for_keys_(p.stage == AttentionStage::kAll || p.stage == AttentionStage::kKeys),
        one_pass_(p.stage == AttentionStage::kAll && group() == 1 && query_blocks() <= queries_together()),
        keys_(scratch, p.keys, p.head_dim),
        values_(scratch, p.keys, p.head_dim_v),
        key_columns_(scratch, for_queries_ ? p.keys : 0, p.head_dim, &keys_),
        staged_(scratch.take<S>(2 * kAttentionQueries * std::max(p.head_dim, p.head_dim_v))),
        s_(scratch.take<A>(kTile)),
        dp_(scratch.take<A>(kTile)),
        cap_slope_(scratch.take<A>(p.softcap > 0 ? kTile : 0)),
        drop_(scratch.take<float>(p.dropout.threshold != 0 ? kTile : 0)),
        p_rows_(scratch.take<T>(kTile * G::kParts)),
        ds_rows_(scratch.take<T>(kTile * G::kParts)),
        ds_packed_(scratch.take<T>(G::packed_size(kAttentionKeys, kAttentionQueries))),
        dk_(scratch.take<A>(accumulated_keys() * p.head_dim)),
        dv_(scratch.take<A>(accumulated_keys() * p.head_dim_v)),
        mask_sum_(scratch.take<A>(p.stage == AttentionStage::kMask ? kKeyBlocksTogether * kTile : 0)) {
    for (int64_t i = 0; i < queries_together(); ++i) {
      QueryBlock& x = state_[i];
      x.q_transposed = scratch.take<T>(G::packed_size(p.head_dim, kAttentionQueries));
      x.dout_transposed = scratch.take<T>(G::packed_size(p.head_dim_v, kAttentionQueries));
      x.q = scratch.take<T>(for_keys_ ? G::packed_size(kAttentionQueries, p.head_dim) : 0);
      x.dout = scratch.take<T>(for_keys_ ? G::packed_size(kAttentionQueries, p.head_dim_v) : 0);
      x.dq = scratch.take<A>(for_queries_ ? p.head_dim * kAttentionQueries : 0);
      x.shift = scratch.take<A>(kAttentionQueries);
      x.factor = scratch.take<A>(kAttentionQueries);
      x.delta = scratch.take<A>(kAttentionQueries);
      x.slope_sum = scratch.take<A>(kAttentionQueries);
    }
  }

  void run(Range range) {
    for (int64_t item = range.begin; item < range.end;) {
      switch (p_.stage) {
        case AttentionStage::kAll:
          all_of_head(head_at(item), item + 1 < range.end ? head_at(item + 1) : -1);
          item += 1;
          break;
        case AttentionStage::kQueries: {
          const auto [b, h, first] = block_item(p_, p_.heads, query_blocks(), item);
          select_keys(b, h / group());
          const int64_t count = std::min({queries_together(), query_blocks() - first, range.end - item});
          query_chunk(b, h, first, count, -1);
          item += count;
          break;
        }
        case AttentionStage::kKeys: {
          const auto [b, kv, first] = block_item(p_, p_.heads_kv, key_blocks(), item);
          select_keys(b, kv);
          const int64_t count = std::min({kKeyBlocksTogether, key_blocks() - first, range.end - item});
          key_chunk(b, kv, first, count);
          item += count;
          break;
        }
        case AttentionStage::kMask: {
          const int64_t across = mask_tiles(3, kAttentionKeys);
          const int64_t count = std::min({kKeyBlocksTogether, across - item % across, range.end - item});
          mask_row_of_tiles(item, count);
          item += count;
          break;
        }
        case AttentionStage::kFinish:
          finish_head(item++);
          break;
      }
    }
  }

 private:
  struct QueryBlock {
    ScoreBlock block;
    Range visible;
    T *q_transposed, *dout_transposed, *q, *dout;
    A *dq, *shift, *factor, *delta, *slope_sum;
  };

  int64_t query_blocks() const { return (p_.rows + kAttentionQueries - 1) / kAttentionQueries; }
  int64_t key_blocks() const { return (p_.keys + kAttentionKeys - 1) / kAttentionKeys; }
  // Where row 0 of the sequence at hand lies in dk and dv.
  int64_t key_index(int64_t b, int64_t kv) const { return b * p_.key_stride[0] + kv * p_.key_stride[1] + p_.first_key; }
  int64_t group() const { return p_.heads / p_.heads_kv; }
  int64_t accumulated_keys() const {
    if (!for_keys_) return 0;
    if (one_pass_) return std::min(p_.keys, kAttentionKeys);
    return p_.stage == AttentionStage::kAll ? p_.keys : std::min(p_.keys, kKeyBlocksTogether * kAttentionKeys);
  }

  // Query blocks that stay in L2 while the keys pass, so that keys, values and their gradients come from afar once for
  // all of them.
  int64_t queries_together() const {
    if (!for_queries_) return 1;
    const int64_t operand = sizeof(T) * G::kParts * (for_keys_ ? 2 : 1), sum = sizeof(A);
    const int64_t bytes = kAttentionQueries * ((p_.head_dim + p_.head_dim_v) * operand + p_.head_dim * sum);
    return std::max<int64_t>(1,
                             std::min<int64_t>(kQueryBlocksResident, kResidentQueries / std::max<int64_t>(1, bytes)));
  }

  void select_keys(int64_t b, int64_t kv) {
    if (cached_ == b * p_.heads_kv + kv) return;
    cached_ = b * p_.heads_kv + kv;
    enter_sequence(p_, b);
    const S* k = row_at<S>(p_.k, p_.k_stride, b, kv, p_.first_key);
    const S* v = row_at<S>(p_.v, p_.v_stride, b, kv, p_.first_key);
    keys_.reset(k, p_.k_stride[2], p_.keys);
    if (for_queries_) key_columns_.reset(k, p_.k_stride[2], p_.keys);
    values_.reset(v, p_.v_stride[2], p_.keys);
  }

  // (b, kv head) of a work item of stage kAll, as b * heads_kv + kv head.
  int64_t head_at(int64_t item) const {
    const auto [b, kv, none] = block_item(p_, p_.heads_kv, 1, item);
    return b * p_.heads_kv + kv;
  }

  // next: the head after this one, or -1.
  void all_of_head(int64_t head, int64_t next) {
    const int64_t b = head / p_.heads_kv, kv = head % p_.heads_kv, last = (kv + 1) * group() - 1;
    select_keys(b, kv);
    if (one_pass_) return query_chunk(b, kv, 0, query_blocks(), next);
    first_key_ = 0;
    clear_keys(p_.keys);
    for (int64_t h = kv * group(); h <= last; ++h) {
      for (int64_t i = 0; i < query_blocks(); i += queries_together()) {
        const int64_t count = std::min(queries_together(), query_blocks() - i);
        query_chunk(b, h, i, count, h == last && i + count == query_blocks() ? next : -1);
      }
    }
    write_keys(b, kv, p_.keys);
  }

  // The query blocks [first, first + count) of a head with all keys, block of keys by block of keys. What the
  // kv head next_head starts with is fetched, if it is one.
  void query_chunk(int64_t b, int64_t h, int64_t first, int64_t count, int64_t next_head) {
    Range keys{p_.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
      prepare_queries(b, h, first + i, &state_[i]);
      std::fill_n(state_[i].dq, p_.head_dim * state_[i].block.lanes, A(0));
      keys.begin = std::min(keys.begin, state_[i].visible.begin);
      keys.end = std::max(keys.end, state_[i].visible.end);
    }
    ahead_.clear();
    if (next_head >= 0) fetch_head(next_head);
    keys.begin = keys.begin / kAttentionKeys * kAttentionKeys;
    if (one_pass_) write_unseen_keys(b, h, keys);
    for (int64_t from = keys.begin; from < keys.end; from += kAttentionKeys) {
      const int64_t width = std::min(kAttentionKeys, p_.keys - from);
      if (one_pass_) first_key_ = from, clear_keys(width);
      for (int64_t i = 0; i < count; ++i) {
        ScoreBlock next = state_[i].block;
        next.key = from + kAttentionKeys;
        next.keys = std::min(next.key + kAttentionKeys, state_[i].visible.end) - next.key;
        if (p_.mask != nullptr && next.keys > 0) ahead_.clear();
        fetch_mask(p_, next, &ahead_);
        pair_within(state_[i], Range{from, from + kAttentionKeys});
      }
      if (one_pass_) write_keys(b, h, width);
    }
    for (int64_t i = 0; i < count; ++i) write_queries(state_[i]);
  }

  void write_queries(const QueryBlock& x) {
    const ScoreBlock& block = x.block;
    const V scale(static_cast<A>(p_.scale));
    for (int64_t i = 0; i < p_.head_dim * block.lanes; i += V::kLanes) (V::load(x.dq + i) * scale).store(x.dq + i);
    const int64_t row = row_index(p_, block.batch, block.head) + block.row;
    transpose_block(x.dq, block.lanes, p_.head_dim, block.rows, static_cast<S*>(p_.dq) + row * p_.head_dim,
                    p_.head_dim);
    if (p_.delta != nullptr) std::copy_n(x.delta, block.rows, static_cast<A*>(p_.delta) + row);
    if (p_.slope_rows != nullptr) std::copy_n(x.slope_sum, block.rows, static_cast<A*>(p_.slope_rows) + row);
  }

  // The key blocks [first, first + count) of a kv head with all queries that see them.
  void key_chunk(int64_t b, int64_t kv, int64_t first, int64_t count) {
    first_key_ = first * kAttentionKeys;
    const int64_t end = std::min(p_.keys, (first + count) * kAttentionKeys);
    clear_keys(end - first_key_);
    for (int64_t h = kv * group(); h < (kv + 1) * group(); ++h) {
      for (int64_t i = 0; i < query_blocks(); ++i) {
        const int64_t row = i * kAttentionQueries;
        const Range visible = visible_keys(p_, row, std::min(kAttentionQueries, p_.rows - row));
        if (std::max(first_key_, visible.begin) >= std::min(end, visible.end)) continue;
        prepare_queries(b, h, i, &state_[0]);
        for (int64_t j = first_key_; j < end; j += kAttentionKeys) {
          pair_within(state_[0], Range{j, j + kAttentionKeys});
        }
      }
    }
    write_keys(b, kv, end - first_key_);
  }

  // The pair of a query block with those of the keys that it sees, if any.
  bool pair_within(const QueryBlock& x, Range keys) {
    ScoreBlock block = x.block;
    block.key = std::max(keys.begin, x.visible.begin);
    block.keys = std::min(keys.end, x.visible.end) - block.key;
    return block.keys > 0 && pair(x, block);
  }

  // What the first query blocks of the kv head `head` read, and where the results of this one go.
  void fetch_head(int64_t head) {
    const int64_t size = sizeof(S), b = head / p_.heads_kv, kv = head % p_.heads_kv, h = kv * group();
    const Sequence own = sequence_of(p_, b);
    const Range rows{own.q_begin, own.q_begin + std::min(queries_together() * kAttentionQueries, own.rows)};
    const Range keys{own.k_begin, own.k_begin + std::min(kAttentionKeys, own.keys)};
    const auto add = [&](const void* x, const int64_t (&stride)[3], int64_t index, int64_t channels, Range range) {
      ahead_.add(row_at<S>(x, stride, b, index, range.begin), channels * size, stride[2] * size,
                 range.end - range.begin);
    };
    add(p_.q, p_.q_stride, h, p_.head_dim, rows);
    add(p_.dout, p_.dout_stride, h, p_.head_dim_v, rows);
    add(p_.out, p_.out_stride, h, p_.head_dim_v, rows);
    add(p_.k, p_.k_stride, kv, p_.head_dim, keys);
    add(p_.v, p_.v_stride, kv, p_.head_dim_v, keys);
    const int64_t results = key_index(cached_ / p_.heads_kv, cached_ % p_.heads_kv);
    const int64_t count = std::min(kAttentionKeys, p_.keys);
    ahead_.add(static_cast<const S*>(p_.dk) + results * p_.head_dim, p_.head_dim * size, p_.head_dim * size, count);
    ahead_.add(static_cast<const S*>(p_.dv) + results * p_.head_dim_v, p_.head_dim_v * size, p_.head_dim_v * size,
               count);
  }

  void clear_keys(int64_t count) {
    std::fill_n(dk_, count * p_.head_dim, A(0));
    std::fill_n(dv_, count * p_.head_dim_v, A(0));
  }

  void write_keys(int64_t b, int64_t kv, int64_t count) {
    const int64_t row = key_index(b, kv) + first_key_;
    write_rows(dk_, count * p_.head_dim, p_.scale, static_cast<S*>(p_.dk) + row * p_.head_dim);
    write_rows(dv_, count * p_.head_dim_v, p_.dropout_scale, static_cast<S*>(p_.dv) + row * p_.head_dim_v);
  }

  // Zeros for the key blocks outside `seen`, whole blocks.
  void write_unseen_keys(int64_t b, int64_t kv, Range seen) {
    const int64_t end = std::min(p_.keys, round_up(std::max(seen.begin, seen.end), kAttentionKeys));
    for (const Range range : {Range{0, std::min(seen.begin, end)}, Range{end, p_.keys}}) {
      const int64_t row = key_index(b, kv) + range.begin, count = std::max<int64_t>(0, range.end - range.begin);
      std::fill_n(static_cast<S*>(p_.dk) + row * p_.head_dim, count * p_.head_dim, S{});
      std::fill_n(static_cast<S*>(p_.dv) + row * p_.head_dim_v, count * p_.head_dim_v, S{});
    }
  }

  static void write_rows(const A* from, int64_t count, double factor, S* to) {
    const V scale(static_cast<A>(factor));
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const int64_t n = std::min<int64_t>(V::kLanes, count - i);
      (V::load_n(from + i, n) * scale).store_n(to + i, n);
    }
  }

  // Packs q and dout of one query block, computes its lanes of statistics. Rows that saw nothing enter as zeros with
  // shift = +inf, which makes their probabilities zero.
  void prepare_queries(int64_t b, int64_t h, int64_t index, QueryBlock* x) {
    select_keys(b, h / group());
    const int64_t row = index * kAttentionQueries;
    x->block = ScoreBlock{b, h, row, std::min(kAttentionQueries, p_.rows - row), 0, 0, 0};
    const ScoreBlock& block = x->block;
    x->block.lanes = round_up(block.rows, G::kNr);
    x->visible = visible_keys(p_, row, block.rows);
    const int64_t at = p_.first_row + row;
    const S* q = row_at<S>(p_.q, p_.q_stride, b, h, at);
    const S* dout = row_at<S>(p_.dout, p_.dout_stride, b, h, at);
    int64_t ld_q = p_.q_stride[2], ld_dout = p_.dout_stride[2];
    if (statistics(*x)) {
      S* staged = staged_ + kAttentionQueries * p_.head_dim;
      stage_rows(*x, q, ld_q, p_.head_dim, staged_);
      stage_rows(*x, dout, ld_dout, p_.head_dim_v, staged);
      q = staged_, ld_q = p_.head_dim, dout = staged, ld_dout = p_.head_dim_v;
    }
    G::pack_transposed(q, ld_q, p_.head_dim, block.rows, x->q_transposed);
    G::pack_transposed(dout, ld_dout, p_.head_dim_v, block.rows, x->dout_transposed);
    if (for_keys_) {
      G::pack(q, ld_q, block.rows, p_.head_dim, x->q);
      G::pack(dout, ld_dout, block.rows, p_.head_dim_v, x->dout);
    }
  }

  // Returns whether some row saw nothing.
  bool statistics(const QueryBlock& x) {
    const ScoreBlock& block = x.block;
    constexpr A kInf = std::numeric_limits<A>::infinity();
    bool hidden = false;
    std::fill_n(x.slope_sum, block.lanes, A(0));
    for (int64_t c = 0; c < block.lanes; ++c) {
      const bool exists = c < block.rows;
      const RowStatistics<A> row =
          exists ? row_statistics<S>(p_, block.batch, block.head, block.row + c) : RowStatistics<A>{kInf, A(1), A(0)};
      x.shift[c] = row.shift, x.factor[c] = row.factor, x.delta[c] = row.delta;
      hidden |= exists && row.shift == kInf;
    }
    return hidden;
  }

  void stage_rows(const QueryBlock& x, const S* from, int64_t ld, int64_t channels, S* to) {
    for (int64_t c = 0; c < x.block.rows; ++c) {
      if (x.shift[c] == std::numeric_limits<A>::infinity()) {
        std::fill_n(to + c * channels, channels, S{});
      } else {
        std::copy_n(from + c * ld, channels, to + c * channels);
      }
    }
  }

  // Leaves dS^T before the softcap's factor in dp_ if the stage is kMask. Returns whether the block contributed.
  bool pair(const QueryBlock& x, const ScoreBlock& block) {
    const Cover cover = mask_cover(p_, block);
    if (cover == Cover::kHidden) return false;
    G::multiply(keys_.row(block.key), keys_.ld(), x.q_transposed, block.keys, block.lanes, p_.head_dim, s_, block.lanes,
                false);
    G::multiply(values_.row(block.key), values_.ld(), x.dout_transposed, block.keys, block.lanes, p_.head_dim_v, dp_,
                block.lanes, false);
    const A unit = score_block(p_, block, cover, s_, p_.softcap > 0 ? cap_slope_ : nullptr);
    if (p_.dropout.threshold != 0) dropout_tile(p_, block, drop_);
    if (p_.dropout.threshold != 0 || p_.stage == AttentionStage::kMask || p_.softcap > 0 || p_.slope_rows != nullptr) {
      score_gradients<Scores::kModified>(x, block, unit);
    } else if (cover == Cover::kPartial || window_cuts(p_, block)) {
      score_gradients<Scores::kHidden>(x, block, unit);
    } else {
      score_gradients<Scores::kPlain>(x, block, unit);
    }
    if (for_keys_) {
      G::multiply(p_rows_, block.lanes * G::kParts, x.dout, block.keys, p_.head_dim_v, block.rows,
                  dv_ + (block.key - first_key_) * p_.head_dim_v, p_.head_dim_v, true);
      G::multiply(ds_rows_, block.lanes * G::kParts, x.q, block.keys, p_.head_dim, block.rows,
                  dk_ + (block.key - first_key_) * p_.head_dim, p_.head_dim, true);
    }
    if (for_queries_) {
      key_columns_.multiply(block, ds_packed_, x.dq, true, [&](int64_t j, int64_t c) {
        return G::packed_value(ds_packed_ + G::packed_index(j, c, block.keys), block.keys);
      });
    }
    return true;
  }

  // Scores of a block: a plain softmax, some hidden, or what has more in its gradient.
  enum class Scores { kPlain, kHidden, kModified };

  // P^T and dS^T from s_ and dp_ in the forms that the products take.
  template <Scores kScores>
  void score_gradients(const QueryBlock& x, const ScoreBlock& block, A unit) {
    constexpr int kVectors = G::kNr / V::kLanes;
    const int64_t lanes = block.lanes, ld = lanes * G::kParts;
    const bool operands = for_keys_ || for_queries_;
    for (int64_t c = 0; c < lanes; c += G::kNr) {
      V shift[kVectors], factor[kVectors], delta[kVectors], slope_sum[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        shift[v] = V::zero() - V::load(x.shift + c + v * V::kLanes);
        factor[v] = V::load(x.factor + c + v * V::kLanes);
        delta[v] = V::load(x.delta + c + v * V::kLanes);
        slope_sum[v] = V::load(x.slope_sum + c + v * V::kLanes);
      }
      T* panel = ds_packed_ + G::packed_index(0, c, block.keys);
      for (int64_t j = 0; j < block.keys; j += G::kStep) {
        for (int step = 0; step < 2 * G::kStep; ++step) ahead_.step();
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V ds[G::kStep];
#pragma GCC unroll 2
          for (int step = 0; step < G::kStep; ++step) {
            ds[step] = V::zero();
            if (G::kStep > 1 && j + step >= block.keys) continue;
            const int64_t column = c + v * V::kLanes, at = (j + step) * lanes + column;
            V p = exp_unit<kCoarse>(fma(V::load(s_ + at), V(unit), shift[v]));
            if constexpr (kKeepsStatistics<S>) p = p * factor[v];
            if constexpr (kScores == Scores::kModified) {
              ds[step] = modified_gradient(block, j + step, column, delta[v], &p, &slope_sum[v]);
            } else {
              ds[step] = p * (V::load(dp_ + at) - delta[v]);
              // A masked key's value may be NaN: what has no probability has no gradient.
              if constexpr (kScores == Scores::kHidden) ds[step] = select(le(p, V::zero()), V::zero(), ds[step]);
            }
            if (kScores == Scores::kModified && !operands) continue;
            const int64_t to = (j + step) * ld + column;
            G::store_row(p, p_rows_ + to, ld);
            G::store_row(ds[step], ds_rows_ + to, ld);
          }
          if (kScores == Scores::kModified && !operands) continue;
          G::store_packed(ds, panel + j * G::kNr + v * V::kLanes * G::kStep, block.keys);
        }
      }
      for (int v = 0; v < kVectors; ++v) slope_sum[v].store(x.slope_sum + c + v * V::kLanes);
    }
    if (operands) G::zero_packed_tail(ds_packed_, block.keys, lanes);
  }

  // dS of one vector of lanes under dropout, masks, ALiBi and softcap; *p becomes the dropped-out probability without
  // its factor 1 / (1 - p), which dV takes at the end.
  V modified_gradient(const ScoreBlock& block, int64_t j, int64_t column, V delta, V* p, V* slope_sum) {
    const int64_t at = j * block.lanes + column;
    V dp = V::load(dp_ + at), kept = *p;
    if (p_.dropout.threshold != 0) {
      const V keep = V::load(drop_ + at);
      dp = dp * (keep * V(static_cast<A>(p_.dropout_scale)));
      kept = kept * keep;
    }
    V ds = select(le(*p, V::zero()), V::zero(), *p * (dp - delta));
    *p = kept;
    if (p_.stage == AttentionStage::kMask) ds.store(dp_ + at);
    if (p_.slope_rows != nullptr) {
      *slope_sum = fnma(ds, abs(V::iota(static_cast<A>(block.row + column + p_.diagonal - block.key - j))), *slope_sum);
    }
    return p_.softcap > 0 ? ds * V::load(cap_slope_ + at) : ds;
  }

  int64_t mask_tiles(int dim, int64_t size) const { return (p_.mask_extent[dim] + size - 1) / size; }

  // `count` tiles of dmask side by side: the sum of dS over everything along which the mask is broadcast, first element
  // by element over blocks, then within the tile.
  void mask_row_of_tiles(int64_t item, int64_t count) {
    const int64_t* extent = p_.mask_extent;
    const int64_t tiles_q = mask_tiles(2, kAttentionQueries), tiles_k = mask_tiles(3, kAttentionKeys);
    const int64_t tk = item % tiles_k, tq = item / tiles_k % tiles_q, head = item / tiles_k / tiles_q;
    const int64_t mh = head % extent[1], mb = head / extent[1];
    const Range batches = extent[0] == 1 ? Range{0, p_.batch} : Range{mb, mb + 1};
    const Range heads = extent[1] == 1 ? Range{0, p_.heads} : Range{mh, mh + 1};
    std::fill_n(mask_sum_, count * kTile, A(0));
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      enter_sequence(p_, b);
      const Range rows = extent[2] == 1 ? Range{0, query_blocks()} : Range{tq, std::min(tq + 1, query_blocks())};
      const Range keys = extent[3] == 1 ? Range{0, key_blocks()} : Range{tk, tk + count};
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          prepare_queries(b, h, i, &state_[0]);
          for (int64_t k = keys.begin; k < keys.end; ++k) {
            const Range range{k * kAttentionKeys, (k + 1) * kAttentionKeys};
            A* sum = mask_sum_ + (extent[3] == 1 ? 0 : k - tk) * kTile;
            if (pair_within(state_[0], range)) add_mask_tile(state_[0], range, sum);
          }
        }
      }
    }
    if (p_.mask_dtype == DType::kBool) return;
    dispatch(p_.mask_dtype, [&](auto* type) {
      using M = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<Acc<M>, A> || std::is_same_v<M, float>) {
        M* to = static_cast<M*>(p_.dmask) + head * extent[2] * extent[3];
        for (int64_t t = 0; t < count; ++t) write_mask_tile(mask_sum_ + t * kTile, to, tq, tk + t);
      }
    });
  }

  void add_mask_tile(const QueryBlock& x, Range keys, A* tile) {
    const int64_t from = std::max(keys.begin, x.visible.begin), to = std::min(keys.end, x.visible.end);
    const int64_t lanes = x.block.lanes;
    for (int64_t j = 0; j < to - from; ++j) {
      A* sum = tile + (from - keys.begin + j) * kAttentionQueries;
      for (int64_t c = 0; c < lanes; c += V::kLanes) {
        (V::load(sum + c) + V::load(dp_ + j * lanes + c)).store(sum + c);
      }
    }
  }

  template <class M>
  void write_mask_tile(A* tile, M* to, int64_t tq, int64_t tk) {
    const int64_t extent_q = p_.mask_extent[2], extent_k = p_.mask_extent[3];
    if (extent_q == 1) {
      for (int64_t j = 0; j < kAttentionKeys; ++j) {
        for (int64_t c = 1; c < kAttentionQueries; ++c) tile[j * kAttentionQueries] += tile[j * kAttentionQueries + c];
      }
    }
    if (extent_k == 1) {
      for (int64_t j = 1; j < kAttentionKeys; ++j) {
        for (int64_t c = 0; c < kAttentionQueries; ++c) tile[c] += tile[j * kAttentionQueries + c];
      }
    }
    const int64_t row = tq * kAttentionQueries, key = tk * kAttentionKeys;
    transpose_block(tile, kAttentionQueries, std::min(kAttentionKeys, extent_k - key),
                    std::min(kAttentionQueries, extent_q - row), to + row * extent_k + key, extent_k);
  }

  // Sums over rows and batches in double: they are long and short of work.
  void finish_head(int64_t h) {
    double sink_sum = 0, slope_sum = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      enter_sequence(p_, b);
      const int64_t row = row_index(p_, b, h);
      const A* lse = static_cast<const A*>(p_.lse) + row;
      for (int64_t i = 0; p_.dsinks != nullptr && i < p_.rows; ++i) {
        if (lse[i] == -std::numeric_limits<A>::infinity()) continue;
        const A probability = std::exp(static_cast<const A*>(p_.sinks)[h] - lse[i]);
        sink_sum -= static_cast<double>(probability) * static_cast<const A*>(p_.delta)[row + i];
      }
      if (p_.dslopes == nullptr) continue;
      if (p_.slopes_stride_batch != 0) slope_sum = 0;
      for (int64_t i = 0; i < p_.rows; ++i) slope_sum += static_cast<const A*>(p_.slope_rows)[row + i];
      static_cast<A*>(p_.dslopes)[b * p_.slopes_stride_batch + h] = static_cast<A>(slope_sum);
    }
    if (p_.dsinks != nullptr) static_cast<A*>(p_.dsinks)[h] = static_cast<A>(sink_sum);
  }

  AttentionBackwardParams p_;  // with the extents of the sequence at hand
  // one_pass_: all queries that see a key pass it together, so that its gradients are complete, and leave the cache,
  // block by block.
  const bool for_queries_, for_keys_, one_pass_;
  OperandRows<S> keys_, values_;
  OperandColumns<S> key_columns_;
  S* staged_;
  A *s_, *dp_, *cap_slope_;
  float* drop_;
  T *p_rows_, *ds_rows_, *ds_packed_;
  A *dk_, *dv_, *mask_sum_;
  QueryBlock state_[kQueryBlocksResident];
  RowPrefetch ahead_;
  int64_t cached_ = -1, first_key_ = 0;
};
