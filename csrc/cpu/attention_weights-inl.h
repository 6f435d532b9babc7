// Attention's probabilities themselves, or their mean over heads, from the lse of a forward pass. Contract:
// AttentionWeightsParams in params.h.
//
// Block by block as in backward, everything transposed: P^T = exp(K Q^T - lse), dropped out, added up over heads in
// ascending order, turned over once. Key blocks of an item share the packed queries.

constexpr int64_t kWeightKeys = 4 * kAttentionKeys;

template <class S>
class AttentionWeights {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  using V = Vec<A>;
  static constexpr bool kCoarse = sizeof(S) == 2;
  static constexpr int64_t kTile = kAttentionKeys * kAttentionQueries;

  AttentionWeights(const AttentionWeightsParams& p, ScratchCursor& scratch)
      : p_(p),
        keys_(scratch, p.keys, p.head_dim),
        q_transposed_(scratch.take<T>(G::packed_size(p.head_dim, kAttentionQueries))),
        s_(scratch.take<A>(kTile)),
        drop_(scratch.take<float>(p.dropout.threshold != 0 ? kTile : 0)),
        shift_(scratch.take<A>(kAttentionQueries)),
        factor_(scratch.take<A>(kAttentionQueries)),
        sum_(scratch.take<A>(kWeightKeys * kAttentionQueries)) {}

  void run(Range range) {
    const int64_t heads = p_.average ? 1 : p_.heads;
    const int64_t across = (p_.keys + kWeightKeys - 1) / kWeightKeys;
    const int64_t down = (p_.rows + kAttentionQueries - 1) / kAttentionQueries;
    for (int64_t item = range.begin; item < range.end; ++item) {
      const int64_t c = item % across, i = item / across % down, head = item / across / down;
      write(head / heads, head % heads, i * kAttentionQueries, c * kWeightKeys);
    }
  }

 private:
  // The rows from `row` and keys from `key` on of one head of the result.
  void write(int64_t b, int64_t head, int64_t row, int64_t key) {
    const Range heads = p_.average ? Range{0, p_.heads} : Range{head, head + 1};
    const int64_t rows = std::min(kAttentionQueries, p_.rows - row);
    const int64_t end = std::min(p_.keys, key + kWeightKeys);
    std::fill_n(sum_, (end - key) * kAttentionQueries, A(0));
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const int64_t kv = h / (p_.heads / p_.heads_kv);
      keys_.reset(row_at<S>(p_.k, p_.k_stride, b, kv, 0), p_.k_stride[2], p_.keys);
      ScoreBlock block{b, h, row, rows, round_up(rows, G::kNr), 0, 0};
      const S* q = row_at<S>(p_.q, p_.q_stride, b, h, row);
      G::pack_transposed(q, p_.q_stride[2], p_.head_dim, rows, q_transposed_);
      statistics(block);
      const Range visible = visible_keys(p_, row, rows);
      for (int64_t at = key; at < end; at += kAttentionKeys) {
        block.key = std::max(at, visible.begin);
        block.keys = std::min({at + kAttentionKeys, end, visible.end}) - block.key;
        if (block.keys > 0) add(block, sum_ + (block.key - key) * kAttentionQueries);
      }
    }
    const int64_t result = b * (p_.average ? 1 : p_.heads) + head;
    transpose_block(sum_, kAttentionQueries, end - key, rows,
                    static_cast<S*>(p_.weights) + (result * p_.rows + row) * p_.keys + key, p_.keys);
  }

  // A row that saw nothing has factor 0.
  void statistics(const ScoreBlock& block) {
    const A* lse = static_cast<const A*>(p_.lse) + row_index(p_, block.batch, block.head) + block.row;
    const A scale = static_cast<A>(p_.dropout_scale / (p_.average ? p_.heads : 1));
    for (int64_t c = 0; c < block.lanes; ++c) {
      const bool seen = c < block.rows && lse[c] != -std::numeric_limits<A>::infinity();
      const A shift = seen ? lse[c] * kLogUnit<A> : A(0), rest = seen ? std::fma(lse[c], kLogUnit<A>, -shift) : A(0);
      shift_[c] = shift;
      factor_[c] = seen ? (A(1) - rest / kLogUnit<A>)*scale : A(0);
    }
  }

  // Adds the probabilities of a block to `sum`, which is of the block's keys, kAttentionQueries apart.
  void add(const ScoreBlock& block, A* sum) {
    const Cover cover = mask_cover(p_, block);
    if (cover == Cover::kHidden) return;
    const int64_t lanes = block.lanes;
    G::multiply(keys_.row(block.key), keys_.ld(), q_transposed_, block.keys, lanes, p_.head_dim, s_, lanes, false);
    const V unit(score_block(p_, block, cover, s_, static_cast<A*>(nullptr)));
    if (p_.dropout.threshold != 0) dropout_tile(p_, block, drop_);
    for (int64_t c = 0; c < lanes; c += V::kLanes) {
      const V shift = V::zero() - V::load(shift_ + c), factor = V::load(factor_ + c);
      for (int64_t j = 0; j < block.keys; ++j) {
        V p = exp_unit<kCoarse>(fma(V::load(s_ + j * lanes + c), unit, shift));
        p = select(lt(V::zero(), factor), p * factor, V::zero());
        if (p_.dropout.threshold != 0) p = p * V::load(drop_ + j * lanes + c);
        A* to = sum + j * kAttentionQueries + c;
        (V::load(to) + p).store(to);
      }
    }
  }

  const AttentionWeightsParams p_;
  OperandRows<S> keys_;
  T* q_transposed_;
  A* s_;
  float* drop_;
  A *shift_, *factor_, *sum_;
};

inline void attention_weights(const AttentionWeightsParams& p, Range range) {
  dispatch(p.dtype,
           [&](auto* type) { run_with_scratch<AttentionWeights<std::remove_pointer_t<decltype(type)>>>(p, range); });
}
