// Keys and values of one (batch, kv head) in the forms that the products need, prepared block by block on first use and
// shared by every query block and every head of the group.

constexpr int64_t kAttentionQueries =
    64;  // query lanes of a block: its S^T tile of kAttentionKeys rows fits the L1 cache
constexpr int64_t kAttentionKeys = 128;

// Rows that will be needed soon, fetched into L2 a row at a time between the exponentials of a block, which leave the
// load ports idle. With short sequences every row is read once and comes from far: (16, 12, 128, 64) forward then runs
// at 0.6 of its speed on data in L2.
class RowPrefetch {
 public:
  void clear() { first_ = last_ = 0; }
  void add(const void* rows, int64_t row_bytes, int64_t ld_bytes, int64_t count) {
    if (count > 0 && last_ < kQueue) queue_[last_++] = {static_cast<const char*>(rows), row_bytes, ld_bytes, count};
  }
  void step() {
    if (first_ == last_) return;
    Rows& rows = queue_[first_];
    for (int64_t at = 0; at < rows.bytes; at += 64) __builtin_prefetch(rows.next + at, 0, 2);
    rows.next += rows.ld;
    if (--rows.left == 0) ++first_;
  }

 private:
  static constexpr int kQueue = 16;
  struct Rows {
    const char* next;
    int64_t bytes, ld, left;
  };
  Rows queue_[kQueue];
  int first_ = 0, last_ = 0;
};

// The mask of a block with its own row for every query: rows far apart, of which the hardware fetches none ahead.
inline void fetch_mask(const AttentionParams& p, const ScoreBlock& block, RowPrefetch* ahead) {
  if (p.mask == nullptr || p.mask_stride[2] == 0 || p.mask_stride[3] != 1 || block.keys <= 0) return;
  dispatch_mask(p, [&](auto* type) {
    const int64_t size = sizeof(*type);
    ahead->add(mask_at<std::remove_pointer_t<decltype(type)>>(p, block), block.keys * size, p.mask_stride[2] * size,
               block.rows);
  });
}

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
        converted_(scratch.take<T>(kInPlace ? 0 : (count + kGemmRowsRead) * ld_converted_)) {}

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

#if defined(FASTATTN_TARGET_AVX512_BF16)
// Rows 2i and 2i + 1 interleaved channel by channel; null is a row of zeros.
inline void interleave_rows(const BFloat16* first, const BFloat16* second, int64_t channels, BFloat16* to) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  const auto mask = [](int64_t n) { return static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n))); };
  for (int64_t d = 0; d < channels; d += 32) {
    const int64_t n = std::min<int64_t>(32, channels - d);
    const __m512i a = _mm512_maskz_loadu_epi16(first != nullptr ? mask(n) : 0, first + d);
    const __m512i b = _mm512_maskz_loadu_epi16(second != nullptr ? mask(n) : 0, second + d);
    _mm512_mask_storeu_epi16(to + 2 * d, mask(std::min<int64_t>(32, 2 * n)), _mm512_permutex2var_epi16(a, low, b));
    if (n > 16) _mm512_mask_storeu_epi16(to + 2 * d + 32, mask(2 * n - 32), _mm512_permutex2var_epi16(a, high, b));
  }
}
#endif

// The same matrix as the left operand of products along its rows, O^T += V^T P^T: by columns where it lies (or lies
// widened) if one element is broadcast at a time, by pairs of rows for bfloat16, transposed for tiles. A row with an
// inf or NaN enters as zeros, since its products with zero probabilities must not become NaN; they are added one by
// one.
template <class S>
class OperandColumns {
 public:
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  static constexpr bool kShared = G::kTakesColumns && G::kStep == 1;
  static constexpr int64_t kTransposedLd = kAttentionKeys * G::kParts;

  OperandColumns(ScratchCursor& scratch, int64_t count, int64_t channels, OperandRows<S>* shared)
      : count_(count),
        channels_(channels),
        blocks_((count + kAttentionKeys - 1) / kAttentionKeys),
        shared_(shared),
        state_(scratch.take<uint8_t>(blocks_)),
        data_(scratch.take<T>(blocks_ * size())) {}

  void reset(const S* rows, int64_t ld, int64_t count) {
    rows_ = rows, ld_ = ld, count_ = count;
    std::fill(state_, state_ + blocks_, kEmpty);
  }

  // o (channels, lanes) (+)= columns of the rows [block.key, block.key + block.keys) times `packed`. weight(key, lane)
  // is the element of `packed` for a key's index in the block.
  template <class Weight>
  void multiply(const ScoreBlock& block, const T* packed, A* o, bool accumulate, const Weight& weight) {
    const int64_t index = block.key / kAttentionKeys, at = block.key % kAttentionKeys;
    if (state_[index] == kEmpty) fill(index);
    const T* data = data_ + index * size();
    if constexpr (!G::kTakesColumns) {
      G::multiply(data + at, kTransposedLd, packed, channels_, block.lanes, block.keys, o, block.lanes, accumulate);
    } else if (kShared && state_[index] == kReady) {
      G::multiply_columns(shared_->row(block.key), shared_->ld(), packed, channels_, block.lanes, block.keys, o,
                          block.lanes, accumulate);
    } else {
      G::multiply_columns(data + at * channels_, channels_ * G::kStep, packed, channels_, block.lanes, block.keys, o,
                          block.lanes, accumulate);
    }
    if (state_[index] == kSpecial) add_special(block, o, weight);
  }

 private:
  static constexpr uint8_t kEmpty = 0, kReady = 1, kSpecial = 2;

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

  void fill(int64_t block) {
    const int64_t begin = block * kAttentionKeys, count = std::min(kAttentionKeys, count_ - begin);
    const S* rows = rows_ + begin * ld_;
    T* data = data_ + block * size();
    const bool finite = rows_are_finite(rows, ld_, count, channels_);
    state_[block] = finite ? kReady : kSpecial;
    if constexpr (G::kParts > 1) {
      fill_parts(rows, count, finite, data);
    } else if constexpr (!G::kTakesColumns) {
      transpose_block(rows, ld_, count, channels_, data, kAttentionKeys);
      for (int64_t r = 0; !finite && r < count; ++r) {
        if (rows_are_finite(rows + r * ld_, ld_, 1, channels_)) continue;
        for (int64_t d = 0; d < channels_; ++d) data[d * kAttentionKeys + r] = T{};
      }
    } else if constexpr (G::kStep == 1) {
      if (finite) return;
      for (int64_t r = 0; r < count; ++r) {
        const bool keep = rows_are_finite(rows + r * ld_, ld_, 1, channels_);
        for (int64_t d = 0; d < channels_; ++d) data[r * channels_ + d] = keep ? to_acc(rows[r * ld_ + d]) : T{};
      }
    } else {
      const auto present = [&](int64_t r) {
        return r < count && (finite || rows_are_finite(rows + r * ld_, ld_, 1, channels_)) ? rows + r * ld_ : nullptr;
      };
      for (int64_t r = 0; r < count; r += 2) {
        interleave_rows(present(r), present(r + 1), channels_, data + r * channels_);
      }
    }
  }

  // The transpose in parts, by way of a few channels in the accumulation dtype. All that a product may read beyond the
  // rows there are is finite.
  void fill_parts(const S* rows, int64_t count, bool finite, T* data) {
    constexpr int64_t kChannels = 16;
    A tile[kChannels * kAttentionKeys];
    std::fill(tile, tile + kChannels * kAttentionKeys, A(0));
    for (int64_t d = 0; d < channels_; d += kChannels) {
      const int64_t width = std::min(kChannels, channels_ - d);
      transpose_block(rows + d, ld_, count, width, tile, kAttentionKeys);
      for (int64_t r = 0; !finite && r < count; ++r) {
        if (rows_are_finite(rows + r * ld_, ld_, 1, channels_)) continue;
        for (int64_t i = 0; i < width; ++i) tile[i * kAttentionKeys + r] = A(0);
      }
      for (int64_t i = 0; i < width; ++i) {
        G::convert_row(tile + i * kAttentionKeys, kAttentionKeys, data + (d + i) * kTransposedLd, kTransposedLd);
      }
    }
    std::fill_n(data + channels_ * kTransposedLd, G::kDepth, T{});
  }

  // Elements of a block; the last part of its last channel may be read a little beyond its end.
  int64_t size() const { return kTransposedLd * (G::kParts == 1 ? channels_ : round_up(channels_, kGemmRowsRead) + 1); }

  int64_t count_, channels_, blocks_, ld_ = 0;
  OperandRows<S>* shared_;
  const S* rows_ = nullptr;
  uint8_t* state_;
  T* data_;
};
