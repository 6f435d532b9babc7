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

// The rows of a (count, channels) matrix as the A operand of a product: in place, or converted where the ISA multiplies
// in another type.
template <class S>
class OperandRows {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  static constexpr bool kInPlace = std::is_same_v<S, T>;

  OperandRows(ScratchCursor& scratch, int64_t count, int64_t channels)
      : count_(count),
        ld_converted_(round_up(channels, G::kDepth) * G::kParts),
        channels_(channels),
        ready_(scratch.take<bool>(kInPlace ? 0 : count / kAttentionKeys + 1)),
        converted_(scratch.take<T>(kInPlace ? 0 : count * ld_converted_)) {}

  void reset(const S* rows, int64_t ld, int64_t count) {
    rows_ = rows, ld_ = ld, count_ = count;
    if constexpr (!kInPlace) std::fill(ready_, ready_ + count_ / kAttentionKeys + 1, false);
  }
  int64_t ld() const { return kInPlace ? ld_ : ld_converted_; }
  const T* row(int64_t r) {
    if constexpr (kInPlace) {
      return rows_ + r * ld_;
    } else {
      const int64_t block = r / kAttentionKeys;
      if (!ready_[block]) convert(block);
      return converted_ + r * ld_converted_;
    }
  }

 private:
  void convert(int64_t block) {
    const int64_t end = std::min(count_, (block + 1) * kAttentionKeys);
    for (int64_t r = block * kAttentionKeys; r < end; ++r) {
      G::convert_row(rows_ + r * ld_, channels_, converted_ + r * ld_converted_, ld_converted_);
    }
    ready_[block] = true;
  }

  int64_t count_, ld_converted_, channels_, ld_ = 0;
  const S* rows_ = nullptr;
  bool* ready_;
  T* converted_;
};

// The keys or values of one (sequence, kv head) as a matrix: in place, or gathered where they lie in pages.
template <class S>
class SequenceRows {
 public:
  SequenceRows(const AttentionParams& p, ScratchCursor& scratch, int64_t channels)
      : channels_(channels), gathered_(scratch.take<S>(p.block_table != nullptr ? p.keys * channels : 0)) {}

  void select(const AttentionParams& p, const void* data, const int64_t (&stride)[3], int64_t b, int64_t kv) {
    const S* from = static_cast<const S*>(data) + kv * stride[1];
    if (p.block_table == nullptr) {
      rows_ = from + b * stride[0] + p.first_key * stride[2], ld_ = stride[2];
      return;
    }
    rows_ = gathered_, ld_ = channels_;
    for (int64_t j = 0; j < p.keys; ++j) {
      const int64_t page = p.block_table[b * p.max_pages + j / p.page_size];
      std::copy_n(from + page * stride[0] + j % p.page_size * stride[2], channels_, gathered_ + j * channels_);
    }
  }
  const S* rows() const { return rows_; }
  int64_t ld() const { return ld_; }

 private:
  int64_t channels_, ld_ = 0;
  const S* rows_ = nullptr;
  S* gathered_;
};

// The transpose of the same matrix, in blocks (channels, kAttentionKeys). A row with an inf or NaN is set to zero and
// reported by special(): its products with zero probabilities must not become NaN, so they are added one by one.
template <class S>
class TransposedRows {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;

  TransposedRows(ScratchCursor& scratch, int64_t count, int64_t channels)
      : count_(count),
        channels_(channels),
        blocks_((count + kAttentionKeys - 1) / kAttentionKeys),
        state_(scratch.take<uint8_t>(blocks_)),
        data_(scratch.take<T>(blocks_ * channels * ld())) {}

  void reset(const S* rows, int64_t ld, int64_t count) {
    rows_ = rows, ld_ = ld, count_ = count;
    std::fill(state_, state_ + blocks_, kEmpty);
  }
  int64_t ld() const { return kAttentionKeys * G::kParts; }
  // A operand (channels, keys) starting at key r, which with its successors lies in one block.
  const T* columns(int64_t r) {
    const int64_t block = r / kAttentionKeys;
    if (state_[block] == kEmpty) fill(block);
    return data_ + block * channels_ * ld() + r % kAttentionKeys;
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
    T* data = data_ + block * channels_ * ld();
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
