// Attention backward (Dao et al., "FlashAttention-2", 2023). Contract: AttentionBackwardParams in params.h.
//
// For each pair of a query block and a key block, probabilities again from the saved logsumexp, everything transposed:
//   S^T = K Q^T       P^T = exp(S^T - lse)                       lse and delta are lanes
//   dP^T = V dO^T     dS^T = P^T * (dP^T - delta)                delta = rowsum(dout * out) - dlse
//   dV += P^T dO      dK += dS^T Q                               P^T and dS^T as they lie are the left operands
//   dQ^T += K^T dS^T                                             dS^T again in packed form as the right operand
// Sums run over query blocks (and the heads of a group) and over key blocks in ascending order, whatever the stage, so
// that results depend neither on the number of threads nor on which stages computed them.

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
        keys_(scratch, p.keys, p.head_dim),
        values_(scratch, p.keys, p.head_dim_v),
        keys_transposed_(scratch, for_queries_ ? p.keys : 0, p.head_dim),
        q_transposed_(scratch.take<T>(G::packed_size(p.head_dim, kAttentionQueries))),
        dout_transposed_(scratch.take<T>(G::packed_size(p.head_dim_v, kAttentionQueries))),
        q_(scratch.take<T>(for_keys_ ? G::packed_size(kAttentionQueries, p.head_dim) : 0)),
        dout_(scratch.take<T>(for_keys_ ? G::packed_size(kAttentionQueries, p.head_dim_v) : 0)),
        staged_(scratch.take<S>(2 * kAttentionQueries * std::max(p.head_dim, p.head_dim_v))),
        s_(scratch.take<A>(kTile)),
        dp_(scratch.take<A>(kTile)),
        mask_(scratch.take<A>(p.mask != nullptr ? kTile : 0)),
        cap_slope_(scratch.take<A>(p.softcap > 0 ? kTile : 0)),
        drop_(scratch.take<float>(p.dropout.threshold != 0 ? kTile : 0)),
        p_rows_(scratch.take<T>(kTile * G::kParts)),
        ds_rows_(scratch.take<T>(kTile * G::kParts)),
        ds_packed_(scratch.take<T>(G::packed_size(kAttentionKeys, kAttentionQueries))),
        dq_(scratch.take<A>(p.head_dim * kAttentionQueries)),
        dk_(scratch.take<A>(accumulated_keys() * p.head_dim)),
        dv_(scratch.take<A>(accumulated_keys() * p.head_dim_v)),
        mask_sum_(scratch.take<A>(p.stage == AttentionStage::kMask ? kTile : 0)),
        lse_(scratch.take<A>(kAttentionQueries)),
        delta_(scratch.take<A>(kAttentionQueries)),
        slope_sum_(scratch.take<A>(kAttentionQueries)) {}

  void run(Range range) {
    for (int64_t item = range.begin; item < range.end; ++item) {
      switch (p_.stage) {
        case AttentionStage::kAll:
          all_of_head(item);
          break;
        case AttentionStage::kQueries: {
          const auto [b, h, block] = block_item(p_, p_.heads, query_blocks(), item);
          query_block(b, h, block);
          break;
        }
        case AttentionStage::kKeys: {
          const auto [b, kv, block] = block_item(p_, p_.heads_kv, key_blocks(), item);
          key_block(b, kv, block);
          break;
        }
        case AttentionStage::kMask:
          mask_tile(item);
          break;
        case AttentionStage::kFinish:
          finish_head(item);
          break;
      }
    }
  }

 private:
  int64_t query_blocks() const { return (p_.rows + kAttentionQueries - 1) / kAttentionQueries; }
  int64_t key_blocks() const { return (p_.keys + kAttentionKeys - 1) / kAttentionKeys; }
  int64_t group() const { return p_.heads / p_.heads_kv; }
  int64_t accumulated_keys() const {
    return !for_keys_ ? 0 : p_.stage == AttentionStage::kAll ? p_.keys : std::min(p_.keys, kAttentionKeys);
  }

  void select_keys(int64_t b, int64_t kv) {
    if (cached_ == b * p_.heads_kv + kv) return;
    cached_ = b * p_.heads_kv + kv;
    enter_sequence(p_, b);
    const S* k = static_cast<const S*>(p_.k) + b * p_.k_stride[0] + kv * p_.k_stride[1] + p_.first_key * p_.k_stride[2];
    const S* v = static_cast<const S*>(p_.v) + b * p_.v_stride[0] + kv * p_.v_stride[1] + p_.first_key * p_.v_stride[2];
    keys_.reset(k, p_.k_stride[2], p_.keys);
    if (for_queries_) keys_transposed_.reset(k, p_.k_stride[2], p_.keys);
    values_.reset(v, p_.v_stride[2], p_.keys);
  }

  void all_of_head(int64_t item) {
    const int64_t b = item / p_.heads_kv, kv = item % p_.heads_kv;
    select_keys(b, kv);
    first_key_ = 0;
    clear_keys(p_.keys);
    for (int64_t h = kv * group(); h < (kv + 1) * group(); ++h) {
      for (int64_t i = 0; i < query_blocks(); ++i) query_block(b, h, i);
    }
    write_keys(b, kv, p_.keys);
  }

  void query_block(int64_t b, int64_t h, int64_t index) {
    ScoreBlock block = prepare_queries(b, h, index);
    std::fill_n(dq_, p_.head_dim * block.lanes, A(0));
    const Range visible = visible_keys(p_, block.row, block.rows);
    for (int64_t j = visible.begin; j < visible.end; j += block.keys) {
      block.key = j;
      block.keys = std::min((j / kAttentionKeys + 1) * kAttentionKeys, visible.end) - j;
      pair(block);
    }
    const V scale(static_cast<A>(p_.scale));
    for (int64_t i = 0; i < p_.head_dim * block.lanes; i += V::kLanes) (V::load(dq_ + i) * scale).store(dq_ + i);
    const int64_t row = row_index(p_, b, h) + block.row;
    transpose_block(dq_, block.lanes, p_.head_dim, block.rows, static_cast<S*>(p_.dq) + row * p_.head_dim, p_.head_dim);
    if (p_.delta != nullptr) std::copy_n(delta_, block.rows, static_cast<A*>(p_.delta) + row);
    if (p_.slope_rows != nullptr) std::copy_n(slope_sum_, block.rows, static_cast<A*>(p_.slope_rows) + row);
  }

  void key_block(int64_t b, int64_t kv, int64_t index) {
    select_keys(b, kv);
    first_key_ = index * kAttentionKeys;
    const int64_t end = std::min(p_.keys, first_key_ + kAttentionKeys);
    clear_keys(end - first_key_);
    for (int64_t h = kv * group(); h < (kv + 1) * group(); ++h) {
      for (int64_t i = 0; i < query_blocks(); ++i) {
        const int64_t row = i * kAttentionQueries;
        const Range visible = visible_keys(p_, row, std::min(kAttentionQueries, p_.rows - row));
        const int64_t from = std::max(first_key_, visible.begin), to = std::min(end, visible.end);
        if (from >= to) continue;
        ScoreBlock block = prepare_queries(b, h, i);
        block.key = from, block.keys = to - from;
        pair(block);
      }
    }
    write_keys(b, kv, end - first_key_);
  }

  void clear_keys(int64_t count) {
    std::fill_n(dk_, count * p_.head_dim, A(0));
    std::fill_n(dv_, count * p_.head_dim_v, A(0));
  }

  void write_keys(int64_t b, int64_t kv, int64_t count) {
    const int64_t row = b * p_.key_stride[0] + kv * p_.key_stride[1] + p_.first_key + first_key_;
    write_rows(dk_, count * p_.head_dim, p_.scale, static_cast<S*>(p_.dk) + row * p_.head_dim);
    write_rows(dv_, count * p_.head_dim_v, p_.dropout_scale, static_cast<S*>(p_.dv) + row * p_.head_dim_v);
  }

  static void write_rows(const A* from, int64_t count, double factor, S* to) {
    const V scale(static_cast<A>(factor));
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const int64_t n = std::min<int64_t>(V::kLanes, count - i);
      (V::load_n(from + i, n) * scale).store_n(to + i, n);
    }
  }

  // Packs q and dout of one query block, computes its lse and delta lanes. Rows that saw nothing enter as zeros with
  // lse = +inf, which makes their probabilities zero.
  ScoreBlock prepare_queries(int64_t b, int64_t h, int64_t index) {
    select_keys(b, h / group());
    const int64_t row = index * kAttentionQueries;
    ScoreBlock block{b, h, row, std::min(kAttentionQueries, p_.rows - row), 0, 0, 0};
    block.lanes = round_up(block.rows, G::kNr);
    const int64_t at = p_.first_row + row;
    const S* q = static_cast<const S*>(p_.q) + b * p_.q_stride[0] + h * p_.q_stride[1] + at * p_.q_stride[2];
    const S* dout =
        static_cast<const S*>(p_.dout) + b * p_.dout_stride[0] + h * p_.dout_stride[1] + at * p_.dout_stride[2];
    const S* out = static_cast<const S*>(p_.out) + b * p_.out_stride[0] + h * p_.out_stride[1] + at * p_.out_stride[2];
    int64_t ld_q = p_.q_stride[2], ld_dout = p_.dout_stride[2];
    if (statistics(block, dout, out)) {
      S* staged = staged_ + kAttentionQueries * p_.head_dim;
      stage_rows(q, ld_q, block.rows, p_.head_dim, staged_);
      stage_rows(dout, ld_dout, block.rows, p_.head_dim_v, staged);
      q = staged_, ld_q = p_.head_dim, dout = staged, ld_dout = p_.head_dim_v;
    }
    G::pack_transposed(q, ld_q, p_.head_dim, block.rows, q_transposed_);
    G::pack_transposed(dout, ld_dout, p_.head_dim_v, block.rows, dout_transposed_);
    if (for_keys_) {
      G::pack(q, ld_q, block.rows, p_.head_dim, q_);
      G::pack(dout, ld_dout, block.rows, p_.head_dim_v, dout_);
    }
    return block;
  }

  // Returns whether some row saw nothing.
  bool statistics(const ScoreBlock& block, const S* dout, const S* out) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    const int64_t row = row_index(p_, block.batch, block.head) + block.row;
    const A *lse = static_cast<const A*>(p_.lse) + row, *dlse = static_cast<const A*>(p_.dlse) + row;
    bool hidden = false;
    std::fill_n(lse_, block.lanes, kInf);
    std::fill_n(delta_, block.lanes, A(0));
    std::fill_n(slope_sum_, block.lanes, A(0));
    for (int64_t c = 0; c < block.rows; ++c) {
      if (lse[c] == -kInf) {
        hidden = true;
        continue;
      }
      V sum = V::zero();
      for (int64_t d = 0; d < p_.head_dim_v; d += V::kLanes) {
        const int64_t n = std::min<int64_t>(V::kLanes, p_.head_dim_v - d);
        sum = fma(V::load_n(dout + c * p_.dout_stride[2] + d, n), V::load_n(out + c * p_.out_stride[2] + d, n), sum);
      }
      lse_[c] = lse[c] * kLogUnit<A>;
      delta_[c] = reduce_add(sum) - (p_.dlse != nullptr ? dlse[c] : A(0));
    }
    return hidden;
  }

  void stage_rows(const S* from, int64_t ld, int64_t rows, int64_t channels, S* to) {
    for (int64_t c = 0; c < rows; ++c) {
      if (lse_[c] == std::numeric_limits<A>::infinity()) {
        std::fill_n(to + c * channels, channels, S{});
      } else {
        std::copy_n(from + c * ld, channels, to + c * channels);
      }
    }
  }

  // Leaves dS^T before the softcap's factor in dp_ if the stage is kMask. Returns whether the block contributed.
  bool pair(const ScoreBlock& block) {
    if (p_.mask != nullptr && !load_mask_tile(p_, block, mask_)) return false;
    G::multiply(keys_.row(block.key), keys_.ld(), q_transposed_, block.keys, block.lanes, p_.head_dim, s_, block.lanes,
                false);
    G::multiply(values_.row(block.key), values_.ld(), dout_transposed_, block.keys, block.lanes, p_.head_dim_v, dp_,
                block.lanes, false);
    if (p_.dropout.threshold != 0) dropout_tile(p_, block, drop_);
    if (needs_finish(p_, block)) {
      finish_scores(p_, block, p_.mask != nullptr ? mask_ : nullptr, s_, p_.softcap > 0 ? cap_slope_ : nullptr);
      score_gradients<true>(block, kLogUnit<A>);
    } else if (p_.dropout.threshold != 0 || p_.stage == AttentionStage::kMask) {
      score_gradients<true>(block, static_cast<A>(p_.scale) * kLogUnit<A>);
    } else {
      score_gradients<false>(block, static_cast<A>(p_.scale) * kLogUnit<A>);
    }
    if (for_keys_) {
      G::multiply(p_rows_, block.lanes * G::kParts, dout_, block.keys, p_.head_dim_v, block.rows,
                  dv_ + (block.key - first_key_) * p_.head_dim_v, p_.head_dim_v, true);
      G::multiply(ds_rows_, block.lanes * G::kParts, q_, block.keys, p_.head_dim, block.rows,
                  dk_ + (block.key - first_key_) * p_.head_dim, p_.head_dim, true);
    }
    if (for_queries_) {
      const T* keys = keys_transposed_.columns(block.key);
      G::multiply(keys, keys_transposed_.ld(), ds_packed_, p_.head_dim, block.lanes, block.keys, dq_, block.lanes,
                  true);
      if (keys_transposed_.has_special(block.key)) {
        keys_transposed_.add_special(block, dq_, [&](int64_t j, int64_t c) {
          return G::packed_value(ds_packed_ + G::packed_index(j, c, block.keys), block.keys);
        });
      }
    }
    return true;
  }

  // P^T and dS^T from s_ and dp_ in the forms that the products take. kFeatures: anything but a plain softmax.
  template <bool kFeatures>
  void score_gradients(const ScoreBlock& block, A unit) {
    constexpr int kVectors = G::kNr / V::kLanes;
    const int64_t lanes = block.lanes, ld = lanes * G::kParts;
    for (int64_t c = 0; c < lanes; c += G::kNr) {
      V lse[kVectors], delta[kVectors], slope_sum[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        lse[v] = V::zero() - V::load(lse_ + c + v * V::kLanes);
        delta[v] = V::load(delta_ + c + v * V::kLanes);
        slope_sum[v] = V::load(slope_sum_ + c + v * V::kLanes);
      }
      T* panel = ds_packed_ + G::packed_index(0, c, block.keys);
      for (int64_t j = 0; j < block.keys; j += G::kStep) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V ds[G::kStep];
#pragma GCC unroll 2
          for (int step = 0; step < G::kStep; ++step) {
            ds[step] = V::zero();
            if (G::kStep > 1 && j + step >= block.keys) continue;
            const int64_t column = c + v * V::kLanes, at = (j + step) * lanes + column;
            V p = exp_unit<kCoarse>(fma(V::load(s_ + at), V(unit), lse[v]));
            if constexpr (kFeatures) {
              ds[step] = feature_gradient(block, j + step, column, delta[v], &p, &slope_sum[v]);
            } else {
              ds[step] = p * (V::load(dp_ + at) - delta[v]);
            }
            const int64_t to = (j + step) * ld + column;
            G::store_row(p, p_rows_ + to, ld);
            G::store_row(ds[step], ds_rows_ + to, ld);
          }
          G::store_packed(ds, panel + j * G::kNr + v * V::kLanes * G::kStep, block.keys);
        }
      }
      for (int v = 0; v < kVectors; ++v) slope_sum[v].store(slope_sum_ + c + v * V::kLanes);
    }
    G::zero_packed_tail(ds_packed_, block.keys, lanes);
  }

  // dS of one vector of lanes under dropout, masks, ALiBi and softcap; *p becomes the dropped-out probability without
  // its factor 1 / (1 - p), which dV takes at the end.
  V feature_gradient(const ScoreBlock& block, int64_t j, int64_t column, V delta, V* p, V* slope_sum) {
    const int64_t at = j * block.lanes + column;
    V dp = V::load(dp_ + at), kept = *p;
    if (p_.dropout.threshold != 0) {
      const V keep = V::load(drop_ + at);
      dp = dp * (keep * V(static_cast<A>(p_.dropout_scale)));
      kept = kept * keep;
    }
    // A masked key's value may be NaN: what has no probability has no gradient.
    V ds = select(le(*p, V::zero()), V::zero(), *p * (dp - delta));
    *p = kept;
    if (p_.stage == AttentionStage::kMask) ds.store(dp_ + at);
    if (p_.slope_rows != nullptr) {
      *slope_sum = fnma(ds, abs(V::iota(static_cast<A>(block.row + column + p_.diagonal - block.key - j))), *slope_sum);
    }
    return p_.softcap > 0 ? ds * V::load(cap_slope_ + at) : ds;
  }

  // One tile of dmask: the sum of dS over everything along which the mask is broadcast, first element by element over
  // blocks, then within the tile.
  void mask_tile(int64_t item) {
    const int64_t* extent = p_.mask_extent;
    const int64_t tiles_q = (extent[2] + kAttentionQueries - 1) / kAttentionQueries;
    const int64_t tiles_k = (extent[3] + kAttentionKeys - 1) / kAttentionKeys;
    const int64_t tk = item % tiles_k, tq = item / tiles_k % tiles_q, head = item / tiles_k / tiles_q;
    const int64_t mh = head % extent[1], mb = head / extent[1];
    const Range batches = extent[0] == 1 ? Range{0, p_.batch} : Range{mb, mb + 1};
    const Range heads = extent[1] == 1 ? Range{0, p_.heads} : Range{mh, mh + 1};
    std::fill_n(mask_sum_, kTile, A(0));
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      enter_sequence(p_, b);
      const Range rows = extent[2] == 1 ? Range{0, query_blocks()} : Range{tq, std::min(tq + 1, query_blocks())};
      const Range keys = extent[3] == 1 ? Range{0, key_blocks()} : Range{tk, tk + 1};
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          ScoreBlock block = prepare_queries(b, h, i);
          const Range visible = visible_keys(p_, block.row, block.rows);
          for (int64_t k = keys.begin; k < keys.end; ++k) {
            const int64_t from = std::max(k * kAttentionKeys, visible.begin);
            block.key = from;
            block.keys = std::min((k + 1) * kAttentionKeys, visible.end) - from;
            if (block.keys > 0 && pair(block)) add_mask_tile(block);
          }
        }
      }
    }
    if (p_.mask_dtype == DType::kBool) return;
    dispatch(p_.mask_dtype, [&](auto* type) {
      using M = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<Acc<M>, A> || std::is_same_v<M, float>) {
        write_mask_tile(static_cast<M*>(p_.dmask) + head * extent[2] * extent[3], tq, tk);
      }
    });
  }

  void add_mask_tile(const ScoreBlock& block) {
    for (int64_t j = 0; j < block.keys; ++j) {
      A* sum = mask_sum_ + (block.key % kAttentionKeys + j) * kAttentionQueries;
      for (int64_t c = 0; c < block.lanes; c += V::kLanes) {
        (V::load(sum + c) + V::load(dp_ + j * block.lanes + c)).store(sum + c);
      }
    }
  }

  template <class M>
  void write_mask_tile(M* to, int64_t tq, int64_t tk) {
    const int64_t extent_q = p_.mask_extent[2], extent_k = p_.mask_extent[3];
    if (extent_q == 1) {
      for (int64_t j = 0; j < kAttentionKeys; ++j) {
        for (int64_t c = 1; c < kAttentionQueries; ++c)
          mask_sum_[j * kAttentionQueries] += mask_sum_[j * kAttentionQueries + c];
      }
    }
    if (extent_k == 1) {
      for (int64_t j = 1; j < kAttentionKeys; ++j) {
        for (int64_t c = 0; c < kAttentionQueries; ++c) mask_sum_[c] += mask_sum_[j * kAttentionQueries + c];
      }
    }
    const int64_t row = tq * kAttentionQueries, key = tk * kAttentionKeys;
    transpose_block(mask_sum_, kAttentionQueries, std::min(kAttentionKeys, extent_k - key),
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
  const bool for_queries_, for_keys_;
  OperandRows<S> keys_, values_;
  TransposedRows<S> keys_transposed_;
  T *q_transposed_, *dout_transposed_, *q_, *dout_;
  S* staged_;
  A *s_, *dp_, *mask_, *cap_slope_;
  float* drop_;
  T *p_rows_, *ds_rows_, *ds_packed_;
  A *dq_, *dk_, *dv_, *mask_sum_, *lse_, *delta_, *slope_sum_;
  int64_t cached_ = -1, first_key_ = 0;
};

inline void attention_backward(const AttentionBackwardParams& p, Range range) {
  dispatch(p.dtype,
           [&](auto* type) { run_with_scratch<AttentionBackward<std::remove_pointer_t<decltype(type)>>>(p, range); });
}
