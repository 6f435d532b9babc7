// Keys and values of one (batch, kv head) in the forms that the products need, prepared block by block on first use and
// shared by every query block and every head of the group.

constexpr int64_t kAttentionQueries =
    64;  // query lanes of a block: its S^T tile of kAttentionKeys rows fits the L1 cache
constexpr int64_t kAttentionKeys = 128;

// 0 for finite lanes, NaN otherwise.
template <class A>
inline Vec<A> finite_probe(Vec<A> x, Vec<A> sum) {
  return fma(x, Vec<A>::zero(), sum);
}

template <class S>
inline bool rows_are_finite(const S* rows, int64_t ld, int64_t count, int64_t channels) {
  using A = Acc<S>;
  using V = Vec<A>;
  V sum = V::zero();
  for (int64_t r = 0; r < count; ++r) {
    int64_t d = 0;
    for (; d + V::kLanes <= channels; d += V::kLanes) sum = finite_probe(V::load(rows + r * ld + d), sum);
    if (d < channels) sum = finite_probe(V::load_n(rows + r * ld + d, channels - d), sum);
  }
  return reduce_add(sum) == A(0);
}

// The rows of a (count, channels) matrix as the A operand of a product: in place, or widened where the ISA multiplies
// in a wider type.
template <class S>
class OperandRows {
 public:
  using T = GemmOperand<S>;
  static constexpr bool kInPlace = std::is_same_v<S, T>;

  OperandRows(ScratchCursor& scratch, int64_t count, int64_t channels)
      : count_(count),
        channels_(channels),
        ready_(scratch.take<bool>(kInPlace ? 0 : count / kAttentionKeys + 1)),
        widened_(scratch.take<T>(kInPlace ? 0 : count * channels)) {}

  void reset(const S* rows, int64_t ld) {
    rows_ = rows, ld_ = ld;
    if constexpr (!kInPlace) std::fill(ready_, ready_ + count_ / kAttentionKeys + 1, false);
  }
  int64_t ld() const { return kInPlace ? ld_ : channels_; }
  const T* row(int64_t r) {
    if constexpr (kInPlace) {
      return rows_ + r * ld_;
    } else {
      const int64_t block = r / kAttentionKeys;
      if (!ready_[block]) widen(block);
      return widened_ + r * channels_;
    }
  }

 private:
  void widen(int64_t block) {
    using V = Vec<T>;
    const int64_t end = std::min(count_, (block + 1) * kAttentionKeys);
    for (int64_t r = block * kAttentionKeys; r < end; ++r) {
      T* to = widened_ + r * channels_;
      int64_t d = 0;
      for (; d + V::kLanes <= channels_; d += V::kLanes) V::load(rows_ + r * ld_ + d).store(to + d);
      if (d < channels_) V::load_n(rows_ + r * ld_ + d, channels_ - d).store_n(to + d, channels_ - d);
    }
    ready_[block] = true;
  }

  int64_t count_, channels_, ld_ = 0;
  const S* rows_ = nullptr;
  bool* ready_;
  T* widened_;
};

// The transpose of the same matrix, in blocks (channels, kAttentionKeys). A row with an inf or NaN is set to zero and
// reported by special(): its products with zero probabilities must not become NaN, so they are added one by one.
template <class S>
class TransposedRows {
 public:
  using T = GemmOperand<S>;
  using A = Acc<S>;

  TransposedRows(ScratchCursor& scratch, int64_t count, int64_t channels)
      : count_(count),
        channels_(channels),
        blocks_((count + kAttentionKeys - 1) / kAttentionKeys),
        state_(scratch.take<uint8_t>(blocks_)),
        data_(scratch.take<T>(blocks_ * kAttentionKeys * channels)) {}

  void reset(const S* rows, int64_t ld) {
    rows_ = rows, ld_ = ld;
    std::fill(state_, state_ + blocks_, kEmpty);
  }
  // A operand (channels, keys) starting at key r, which with its successors lies in one block; row stride
  // kAttentionKeys.
  const T* columns(int64_t r) {
    const int64_t block = r / kAttentionKeys;
    if (state_[block] == kEmpty) fill(block);
    return data_ + block * kAttentionKeys * channels_ + r % kAttentionKeys;
  }
  bool has_special(int64_t r) const { return state_[r / kAttentionKeys] == kSpecial; }

  // o[channel * ld + lane] += weight(key, lane) * row[key][channel] for the rows that were set to zero, where the
  // weight is not zero. weight takes the key's index in the block.
  template <class Weight>
  void add_special(const ScoreBlock& block, A* o, const Weight& weight) const {
    for (int64_t j = 0; j < block.keys; ++j) {
      const S* row = rows_ + (block.key + j) * ld_;
      if (rows_are_finite(row, ld_, 1, channels_)) continue;
      for (int64_t c = 0; c < block.rows; ++c) {
        const A w = weight(j, c);
        if (w == A(0)) continue;
        for (int64_t d = 0; d < channels_; ++d) o[d * block.lanes + c] += w * to_acc(row[d]);
      }
    }
  }

 private:
  static constexpr uint8_t kEmpty = 0, kReady = 1, kSpecial = 2;

  void fill(int64_t block) {
    const int64_t begin = block * kAttentionKeys, count = std::min(kAttentionKeys, count_ - begin);
    const S* rows = rows_ + begin * ld_;
    T* data = data_ + begin * channels_;
    transpose_block(rows, ld_, count, channels_, data, kAttentionKeys);
    state_[block] = kReady;
    if (rows_are_finite(rows, ld_, count, channels_)) return;
    state_[block] = kSpecial;
    for (int64_t r = 0; r < count; ++r) {
      if (rows_are_finite(rows + r * ld_, ld_, 1, channels_)) continue;
      for (int64_t d = 0; d < channels_; ++d) data[d * kAttentionKeys + r] = T{};
    }
  }

  int64_t count_, channels_, blocks_, ld_ = 0;
  const S* rows_ = nullptr;
  uint8_t* state_;
  T* data_;
};

// Where S^T[key][lane] lies in the packed B operand of a product over `keys` keys.
template <class T>
inline int64_t packed_index(int64_t key, int64_t lane, int64_t keys) {
  using G = Gemm<T>;
  return lane / G::kNr * G::kNr * round_up(keys, G::kDepth) + key / G::kStep * G::kNr * G::kStep +
         lane % G::kNr * G::kStep + key % G::kStep;
}

// Writes kStep consecutive keys of one vector of lanes into a packed panel.
template <class A>
inline void store_packed(const Vec<A> (&row)[1], A* to) {
  row[0].store(to);
}
#if defined(FASTATTN_TARGET_AVX512_BF16)
inline void store_packed(const VecF (&row)[2], BFloat16* to) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(row[1].v, row[0].v);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}
#endif

// Padding of a packed panel beyond `keys`, which the product reads (kDepth > kStep: AMX).
template <class T>
inline void zero_packed_tail(T* packed, int64_t keys, int64_t lanes) {
  using G = Gemm<T>;
  const int64_t depth = round_up(keys, G::kDepth), done = round_up(keys, G::kStep);
  if (depth == done) return;
  for (int64_t c = 0; c < lanes; c += G::kNr)
    std::fill_n(packed + c * depth + done * G::kNr, (depth - done) * G::kNr, T{});
}
