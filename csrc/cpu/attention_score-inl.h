// Scores of attention: exponentials, masks and dropout on blocks of S^T.
//
// Every block lies transposed, S^T[key][query]: queries are the lanes of a vector, so that maximum, sum, logsumexp and
// every per-row factor are lane-wise and nothing is ever reduced across lanes.
//
//   score(i, j) = softcap * tanh(scale * q_i.k_j / softcap)  [or scale * q_i.k_j]  + mask(i, j) - slope * |i + diagonal
//   - j|
//
// and -inf where j is not visible to i. A masked score is replaced, never added to, so that a NaN in a masked key stays
// where it is.

// Exponentials are taken in base e^(1/kLogUnit): 2 in single precision, e in double.
template <class A>
constexpr A kLogUnit = std::is_same_v<A, float> ? A(1.44269504088896340736) : A(1);

// 2^x, correct but for rounding (degree 6: 2e-9), or to 3e-6 (degree 4) where 16-bit storage hides it. NaN stays; x >
// 128 gives inf.
template <bool kCoarse>
inline VecF exp_unit(VecF x) {
  x = max(VecF(-160.0f), x);
  const VecF n = round_nearest(x), r = x - n;
  VecF p;
  if constexpr (kCoarse) {
    p = fma(r, VecF(9.582852994e-3f), VecF(5.590642474e-2f));
    p = fma(p, r, VecF(2.402409861e-1f));
    p = fma(p, r, VecF(6.931241934e-1f));
  } else {
    p = fma(r, VecF(1.535336207e-4f), VecF(1.339887456e-3f));
    p = fma(p, r, VecF(9.618437358e-3f));
    p = fma(p, r, VecF(5.550332471e-2f));
    p = fma(p, r, VecF(2.402264791e-1f));
    p = fma(p, r, VecF(6.931472029e-1f));
  }
  return scale_by_rounded(fma(p, r, VecF(1.0f)), min(VecF(129.0f), n));
}
template <bool kCoarse>
inline VecD exp_unit(VecD x) {
  return exp(x);
}

// log(l e^m) for m in units of exp_unit, rounded once.
inline float natural_lse(float m, float l) {
  return static_cast<float>(0.69314718055994530942 * m + std::log(static_cast<double>(l)));
}
inline double natural_lse(double m, double l) { return m + std::log(l); }

// tanh with small relative error: an odd polynomial below 0.625 (Cephes tanhf), 1 - 2 / (e^2x + 1) above.
inline VecF cap_tanh(VecF x) {
  const VecF magnitude = abs(x), square = x * x;
  VecF p = fma(square, VecF(-5.70498872745e-3f), VecF(2.06390887954e-2f));
  p = fma(p, square, VecF(-5.37397155531e-2f));
  p = fma(p, square, VecF(1.33314422036e-1f));
  p = fma(p, square, VecF(-3.33332819422e-1f));
  const VecF small = fma(p * square, x, x);
  const VecF large = VecF(1.0f) - VecF(2.0f) / (exp(magnitude + magnitude) + VecF(1.0f));
  return select(lt(magnitude, VecF(0.625f)), small, copysign(large, x));
}
inline VecD cap_tanh(VecD x) {
  return per_lane(x, [](double t) { return std::tanh(t); });
}

// Lane i of the result is the sum of x[i]'s lanes.
inline VecF sum_lanes(VecF (&x)[VecF::kLanes]) {
  constexpr int kLanes = VecF::kLanes;
  transpose(x);
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2 * step) x[i] = x[i] + x[i + step];
  }
  return x[0];
}
inline VecD sum_lanes(VecD (&x)[VecD::kLanes]) {
  alignas(64) double sums[VecD::kLanes];
  for (int i = 0; i < VecD::kLanes; ++i) sums[i] = reduce_add(x[i]);
  return VecD::load(sums);
}

// The first n values of storage as lanes; bool as an additive mask.
template <class S>
inline VecF load_lanes(const S* from, int64_t n) {
  return VecF::load_n(from, n);
}
inline VecF load_lanes(const bool* from, int64_t n) {
  return select(load_mask<float>(from, n), VecF::zero(), VecF(-std::numeric_limits<float>::infinity()));
}

// to[c * ld_to + r] = from[r * ld_from + c], converting between storage and accumulation dtypes.
template <class From, class To>
inline void transpose_block(const From* from, int64_t ld_from, int64_t rows, int64_t columns, To* to, int64_t ld_to) {
  if constexpr (std::is_same_v<From, double> || std::is_same_v<To, double>) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) to[c * ld_to + r] = from_acc<To>(to_acc(from[r * ld_from + c]));
    }
  } else {
    constexpr int kLanes = VecF::kLanes;
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t height = std::min<int64_t>(kLanes, rows - r);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, columns - c);
        VecF block[kLanes];
        if (height == kLanes && width == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) block[i] = load_lanes(from + (r + i) * ld_from + c, kLanes);
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) block[i].store(to + (c + i) * ld_to + r);
          continue;
        }
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < height ? load_lanes(from + (r + i) * ld_from + c, width) : VecF::zero();
        }
        transpose(block);
        for (int i = 0; i < width; ++i) block[i].store_n(to + (c + i) * ld_to + r, height);
      }
    }
  }
}

// One block of scores: rows (queries) [row, row + rows) padded to `lanes`, keys [key, key + keys).
struct ScoreBlock {
  int64_t batch, head, row, rows, lanes, key, keys;
};

// The extents of batch entry b.
inline Sequence sequence_of(const AttentionParams& p, int64_t b) {
  return p.sequences != nullptr ? p.sequences[b] : Sequence{0, p.rows, 0, p.keys, p.diagonal};
}

// The extents of sequence b, for everything that asks p for rows, keys and diagonal.
inline void enter_sequence(AttentionParams& p, int64_t b) {
  if (p.sequences == nullptr) return;
  const Sequence& own = p.sequences[b];
  p.rows = own.rows, p.keys = own.keys, p.diagonal = own.diagonal;
  p.first_row = own.q_begin, p.first_key = own.k_begin;
}

// Where the values of row 0 of the sequence at hand lie in lse and its like.
inline int64_t row_index(const AttentionParams& p, int64_t b, int64_t h) {
  return b * p.row_stride[0] + h * p.row_stride[1] + p.first_row;
}

// Keeps a row's lse = log(l e^m). m and l beside it give backward the probabilities of forward, where lse would cost
// them digits: half a unit in the last place at lse = 7 is four roundings, and so is that of the exponent s - lse.
template <class A>
inline void store_lse(const AttentionParams& p, int64_t row, A m, A l) {
  if (p.lse == nullptr) return;
  static_cast<A*>(p.lse)[row] = natural_lse(m, l);
  if (p.statistics == nullptr) return;
  A* statistics = static_cast<A*>(p.statistics) + row;
  statistics[0] = m, statistics[p.statistics_stride] = l;
}

// A work item as (b, head, block): `blocks` of each head, or as many as p.items_before says.
struct BlockItem {
  int64_t batch, head, block;
};
inline BlockItem block_item(const AttentionParams& p, int64_t heads, int64_t blocks, int64_t item) {
  const int64_t* before = p.items_before;
  if (before == nullptr) return {item / blocks / heads, item / blocks % heads, item % blocks};
  const int64_t b = std::upper_bound(before, before + p.batch + 1, item / heads) - before - 1;
  const int64_t own = before[b + 1] - before[b], within = item - heads * before[b];
  return {b, within / own, within % own};
}

// First and one past the last key visible to any of the rows [row, row + rows) by the window alone.
inline Range visible_keys(const AttentionParams& p, int64_t row, int64_t rows) {
  Range keys{0, p.keys};
  if (p.window_left >= 0) keys.begin = std::max<int64_t>(0, row + p.diagonal - p.window_left);
  if (p.window_right >= 0) keys.end = std::min<int64_t>(p.keys, row + rows + p.diagonal + p.window_right);
  // Dropout draws four keys at a time.
  keys.begin = std::min(keys.begin, p.keys) & ~int64_t{3};
  keys.end = std::max(keys.begin, keys.end);
  return keys;
}

// Whether the window hides some key of the block from some row of it.
inline bool window_cuts(const AttentionParams& p, const ScoreBlock& block) {
  const int64_t first = block.row + p.diagonal, last = first + block.rows - 1;
  return (p.window_left >= 0 && block.key < last - p.window_left) ||
         (p.window_right >= 0 && block.key + block.keys - 1 > first + p.window_right);
}

template <class A>
inline A mask_value(bool visible) {
  return visible ? A(0) : -std::numeric_limits<A>::infinity();
}
template <class A, class M>
inline A mask_value(M x) {
  return static_cast<A>(to_acc(x));
}

template <class M>
inline const M* mask_at(const AttentionParams& p, const ScoreBlock& block) {
  const int64_t* stride = p.mask_stride;
  return static_cast<const M*>(p.mask) + block.batch * stride[0] + block.head * stride[1] + block.row * stride[2] +
         block.key * stride[3];
}

// Calls f(null pointer to the mask's storage type).
template <class F>
inline void dispatch_mask(const AttentionParams& p, F&& f) {
  if (p.mask_dtype == DType::kBool) {
    f(static_cast<bool*>(nullptr));
  } else {
    dispatch(p.mask_dtype, f);
  }
}

// What the mask leaves of a block: nothing, some or (a boolean mask) everything.
enum class Cover { kHidden, kPartial, kOpen };

inline Cover mask_cover_of(const AttentionParams& p, const ScoreBlock& block, const bool* mask) {
  const int64_t rows = p.mask_stride[2] == 0 ? 1 : block.rows, keys = p.mask_stride[3] == 0 ? 1 : block.keys;
  uint8_t any = 0, all = 1;
  for (int64_t r = 0; r < rows; ++r) {
    const bool* row = mask + r * p.mask_stride[2];
    if (p.mask_stride[3] == 1) {
      for (int64_t j = 0; j < keys; ++j) any |= static_cast<uint8_t>(row[j]), all &= static_cast<uint8_t>(row[j]);
    } else {
      for (int64_t j = 0; j < keys; ++j) any |= row[j * p.mask_stride[3]], all &= row[j * p.mask_stride[3]];
    }
    if (any != all) return Cover::kPartial;
  }
  return any ? Cover::kOpen : Cover::kHidden;
}
template <class M>
inline Cover mask_cover_of(const AttentionParams& p, const ScoreBlock& block, const M* mask) {
  const int64_t rows = p.mask_stride[2] == 0 ? 1 : block.rows, keys = p.mask_stride[3] == 0 ? 1 : block.keys;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < keys; ++j) {
      const auto value = to_acc(mask[r * p.mask_stride[2] + j * p.mask_stride[3]]);
      if (!(value == -std::numeric_limits<decltype(value)>::infinity())) return Cover::kPartial;
    }
  }
  return Cover::kHidden;
}
inline Cover mask_cover(const AttentionParams& p, const ScoreBlock& block) {
  if (p.mask == nullptr) return Cover::kOpen;
  Cover cover = Cover::kPartial;
  dispatch_mask(p, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    cover = mask_cover_of(p, block, mask_at<M>(p, block));
  });
  return cover;
}

// f(j, c, mask of key j for the lanes from c on) for all of a block; lanes beyond its rows get anything but NaN. Rows
// of contiguous keys turn over in registers.
template <class A, class M, class F>
inline void for_mask_lanes(const AttentionParams& p, const ScoreBlock& block, const M* mask, const F& f) {
  using V = Vec<A>;
  const int64_t row_stride = p.mask_stride[2], key_stride = p.mask_stride[3];
  if (row_stride == 0) {
    for (int64_t j = 0; j < block.keys; ++j) {
      const V value(mask_value<A>(mask[j * key_stride]));
      for (int64_t c = 0; c < block.lanes; c += V::kLanes) f(j, c, value);
    }
    return;
  }
  for (int64_t c = 0; c < block.lanes; c += V::kLanes) {
    const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(V::kLanes, block.rows - c));
    if constexpr (std::is_same_v<A, float> && !std::is_same_v<M, double>) {
      for (int64_t j = 0; key_stride == 1 && j < block.keys; j += V::kLanes) {
        const int64_t keys = std::min<int64_t>(V::kLanes, block.keys - j);
        V square[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) {
          square[i] = i < rows ? load_lanes(mask + (c + i) * row_stride + j, keys) : V::zero();
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) {
          if (i < keys) f(j + i, c, square[i]);
        }
      }
      if (key_stride == 1) continue;
    }
    for (int64_t j = 0; j < block.keys; ++j) {
      A lanes[V::kLanes] = {};
      for (int64_t i = 0; i < rows; ++i) lanes[i] = mask_value<A>(mask[(c + i) * row_stride + j * key_stride]);
      f(j, c, V::load(lanes));
    }
  }
}

// Whether more than a window stands between scale * q.k and the score of this block.
inline bool needs_finish(const AttentionParams& p, Cover cover) {
  return cover == Cover::kPartial || p.slopes != nullptr || p.softcap > 0 || p.scale < 0;
}

template <class A>
inline A slope_of(const AttentionParams& p, const ScoreBlock& block) {
  return static_cast<const A*>(p.slopes)[block.batch * p.slopes_stride_batch + block.head];
}

// s = q.k in, score but for the window out. cap_slope, if given, receives 1 - tanh^2, the softcap's derivative.
template <class A>
inline void finish_scores(const AttentionParams& p, const ScoreBlock& block, Cover cover, A* s, A* cap_slope) {
  using V = Vec<A>;
  const V scale(static_cast<A>(p.scale)), hidden(-std::numeric_limits<A>::infinity());
  const V cap(static_cast<A>(p.softcap)), scale_over_cap(static_cast<A>(p.softcap > 0 ? p.scale / p.softcap : 0));
  const V slope(p.slopes != nullptr ? slope_of<A>(p, block) : A(0));
  const bool plain = p.softcap <= 0 && p.slopes == nullptr;
  const auto before_mask = [&](int64_t j, int64_t c, V x) {
    if (plain) return x * scale;
    if (p.softcap > 0) {
      const V t = cap_tanh(x * scale_over_cap);
      if (cap_slope != nullptr) fnma(t, t, V(A(1))).store(cap_slope + j * block.lanes + c);
      x = t * cap;
    } else {
      x = x * scale;
    }
    if (p.slopes == nullptr) return x;
    return fnma(slope, abs(V::iota(static_cast<A>(block.row + c + p.diagonal - block.key - j))), x);
  };
  if (cover == Cover::kOpen) {
    for (int64_t j = 0; j < block.keys; ++j) {
      for (int64_t c = 0; c < block.lanes; c += V::kLanes) {
        A* at = s + j * block.lanes + c;
        before_mask(j, c, V::load(at)).store(at);
      }
    }
    return;
  }
  dispatch_mask(p, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for_mask_lanes<A>(p, block, mask_at<M>(p, block), [&](int64_t j, int64_t c, V mask) {
      A* at = s + j * block.lanes + c;
      const V x = before_mask(j, c, V::load(at));
      select(le(mask, hidden), hidden, x + mask).store(at);
    });
  });
}

// Scores outside the window become -inf. Only keys that some lane of a vector does not see are touched.
template <class A>
inline void hide_outside_window(const AttentionParams& p, const ScoreBlock& block, A* s) {
  using V = Vec<A>;
  const V hidden(-std::numeric_limits<A>::infinity());
  for (int64_t c = 0; c < block.lanes; c += V::kLanes) {
    const int64_t first = block.row + c + p.diagonal - block.key, last = first + V::kLanes - 1;
    if (p.window_right >= 0) {
      const V bound(static_cast<A>(-p.window_right));
      for (int64_t j = std::max<int64_t>(0, first + p.window_right + 1); j < block.keys; ++j) {
        A* at = s + j * block.lanes + c;
        select(le(bound, V::iota(static_cast<A>(first - j))), V::load(at), hidden).store(at);
      }
    }
    if (p.window_left >= 0) {
      const V bound(static_cast<A>(p.window_left));
      for (int64_t j = 0; j < std::min(block.keys, last - p.window_left); ++j) {
        A* at = s + j * block.lanes + c;
        select(le(V::iota(static_cast<A>(first - j)), bound), V::load(at), hidden).store(at);
      }
    }
  }
}

// s = q.k in, score out but for the returned factor: what it takes to scores in units of exp_unit.
template <class A>
inline A score_block(const AttentionParams& p, const ScoreBlock& block, Cover cover, A* s, A* cap_slope) {
  const bool finish = needs_finish(p, cover);
  if (finish) finish_scores(p, block, cover, s, cap_slope);
  if (window_cuts(p, block)) hide_outside_window(p, block, s);
  return finish ? kLogUnit<A> : static_cast<A>(p.scale) * kLogUnit<A>;
}

// to[j] = additive mask of one row for the keys of a block with one row.
template <class A>
inline void load_mask_row(const AttentionParams& p, const ScoreBlock& block, A* to) {
  dispatch_mask(p, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    const M* mask = mask_at<M>(p, block);
    for (int64_t j = 0; j < block.keys; ++j) to[j] = mask_value<A>(mask[j * p.mask_stride[3]]);
  });
}

// tile[key][lane] = 1 where the weight is kept, else 0. block.key is a multiple of 4; the tile has room for keys
// rounded up to 4.
inline void dropout_tile(const AttentionParams& p, const ScoreBlock& block, float* tile) {
  const uint32_t z = static_cast<uint32_t>(block.batch * p.heads + block.head);
  const VecF one(1.0f);
  for (int64_t j = 0; j < block.keys; j += 4) {
    const VecU32 counter(static_cast<uint32_t>((block.key + j) / 4));
    for (int64_t c = 0; c < block.lanes; c += VecU32::kLanes) {
      const VecU32 row = VecU32::iota(static_cast<uint32_t>(block.row + c));
      const Words4 draw = philox(p.dropout.seed, counter, row, z, p.dropout.offset);
      for (int w = 0; w < 4; ++w) {
        keep(ge_unsigned(draw.word[w], p.dropout.threshold), one).store(tile + (j + w) * block.lanes + c);
      }
    }
  }
}
