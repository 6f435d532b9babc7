// Cross-entropy of logits with class indices, and of logits that are a product, never whole in memory.
//
//   z = softcap tanh(logit / softcap)  [or the logit]      lse = log Σ_j e^{z_j} = max + log_sum
//   loss = (1-ε) w_y (lse - z_y) + ε/V Σ_j w_j (lse - z_j) + z_loss lse²        y the target, w class weights or 1
//   dz_j = f (a p_j - ε/V w_j - (1-ε) w_y [j = y]),  p_j = e^{z_j - lse},  a = (1-ε) w_y + ε mean(w) + 2 z_loss lse
//
// f is the gradient of the row's loss, and dlogit = dz (1 - (z / softcap)²). Only `max` and `log_sum` are kept for
// backward: apart, since lse of large logits has no digits left for p. The target's own gradient is formed in double
// from e^x - 1: where p_y is close to 1 nothing cancels.
//
// With logits = x Wᵀ + b (csrc/ops/loss.cpp says in which order): every block of column_block classes leaves each row's
// maximum, sum of exponentials and sum of logits, which are then added up in the order of classes. What is stored of a
// block's logits is their distance to the block's maximum, so that rounding to 16 bits is small where p is large.

// Sums of the exponentials seen so far, relative to the largest.
template <class A>
struct ExpSum {
  A max, sum, weighted;  // weighted = Σ w z
};
template <class A>
inline ExpSum<A> no_sum() {
  return {-std::numeric_limits<A>::infinity(), A(0), A(0)};
}
// What is subtracted before exponentials are taken: with -inf alone in a row, all of them shall be 0.
template <class A>
inline A finite_max(A max) {
  return max == -std::numeric_limits<A>::infinity() ? A(0) : max;
}

template <class A>
struct Softcap {
  explicit Softcap(const CrossEntropyParams& p)
      : cap(static_cast<A>(p.softcap)),
        over_cap(static_cast<A>(p.softcap > 0 ? 1 / p.softcap : 0)),
        on(p.softcap > 0) {}
  Vec<A> operator()(Vec<A> logit) const { return on ? cap_tanh(logit * over_cap) * cap : logit; }

  Vec<A> cap, over_cap;
  bool on;
};

// `other` in every lane beyond the first `count`.
template <class A>
inline Vec<A> only_first(Vec<A> x, int64_t count, A other) {
  return count == Vec<A>::kLanes ? x : select(first_n<A>(count), x, Vec<A>(other));
}

// z[i] = capped load(i, count) for n classes from first_class on (z is written up to whole vectors), and `sums` with
// them.
template <class A, class Load>
inline void add_logits(const CrossEntropyParams& p, int64_t first_class, int64_t n, const Load& load, A* z,
                       ExpSum<A>* sums) {
  using V = Vec<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const Softcap<A> capped(p);
  const A* weight = static_cast<const A*>(p.class_weight);
  V high(kNone), weighted = V::zero();
  for_vectors<V::kLanes>(n, [&](int64_t i, int64_t count) {
    V x = capped(load(i, count));
    if (p.label_smoothing > 0) {
      const V term = weight == nullptr ? x : x * load_part<V>(weight + first_class + i, count);
      weighted = weighted + only_first(term, count, A(0));
    }
    x = only_first(x, count, kNone);
    high = max(x, high);
    x.store(z + i);
  });
  const A largest = std::max(sums->max, reduce_max(high));
  if (largest > sums->max) sums->sum *= std::exp(sums->max - largest), sums->max = largest;
  const V shift(finite_max(sums->max));
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::kLanes <= n; i += 4 * V::kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + exp(V::load(z + i + k * V::kLanes) - shift);
  }
  for (; i < n; i += V::kLanes) sum[0] = sum[0] + exp(V::load(z + i) - shift);
  sums->sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  sums->weighted += reduce_add(weighted);
}

template <class A>
inline double class_weight(const CrossEntropyParams& p, int64_t index) {
  return p.class_weight == nullptr ? 1.0 : static_cast<double>(static_cast<const A*>(p.class_weight)[index]);
}

// The row's results from its sums; target_z is not looked at where the row is ignored.
template <class A>
inline void finish_row(const CrossEntropyParams& p, int64_t row, const ExpSum<A>& sums, A target_z) {
  const double log_sum = std::log(static_cast<double>(sums.sum)), lse = sums.max + log_sum;
  static_cast<A*>(p.max)[row] = sums.max;
  static_cast<A*>(p.log_sum)[row] = static_cast<A>(log_sum);
  const int64_t target = p.target[row];
  double loss = 0;
  if (target != p.ignore_index) {
    loss =
        (1 - p.label_smoothing) * class_weight<A>(p, target) * ((sums.max - static_cast<double>(target_z)) + log_sum);
    if (p.label_smoothing > 0) {
      loss += p.label_smoothing * (p.class_weight_mean * lse - sums.weighted / static_cast<double>(p.classes));
    }
    if (p.z_loss != 0) loss += p.z_loss * lse * lse;
  }
  static_cast<A*>(p.loss)[row] = static_cast<A>(loss);
}

// What the gradient of a row needs: f, (1-ε) w_y, a - (1-ε) w_y.
template <class A>
struct LossRow {
  A grad, max, log_sum;
  double at_target, beyond_target;
  int64_t target;
};
template <class A>
inline LossRow<A> loss_row(const CrossEntropyParams& p, int64_t row) {
  const A max = static_cast<const A*>(p.max)[row], log_sum = static_cast<const A*>(p.log_sum)[row];
  const int64_t target = p.target[row];
  if (target == p.ignore_index) return {A(0), max, log_sum, 0, 0, -1};
  const double lse = static_cast<double>(max) + log_sum;
  const double beyond = p.label_smoothing * p.class_weight_mean + (p.z_loss != 0 ? 2 * p.z_loss * lse : 0.0);
  const double at_target = (1 - p.label_smoothing) * class_weight<A>(p, target);
  return {static_cast<const A*>(p.row_grad)[row], max, log_sum, at_target, beyond, target};
}

// to[i] = gradient of the logits of n classes from first_class on, where load(i, count) is z - origin.
template <class A, class Load, class To>
inline void gradient_of_logits(const CrossEntropyParams& p, const LossRow<A>& row, int64_t first_class, int64_t n,
                               A origin, const Load& load, To* to) {
  using V = Vec<A>;
  if (row.grad == 0) return std::fill(to, to + n, To{});
  const V from_max(origin - row.max), log_sum(row.log_sum), grad(row.grad);
  const V factor(static_cast<A>(row.at_target + row.beyond_target));
  const V start(origin), one(A(1));
  const Softcap<A> capped(p);
  const double smoothing = p.label_smoothing / static_cast<double>(p.classes);
  const V smooth(static_cast<A>(smoothing));
  const A* weight = static_cast<const A*>(p.class_weight);
  for_vectors<V::kLanes>(n, [&](int64_t i, int64_t count) {
    const V z = load(i, count);
    V dz = factor * exp((z + from_max) - log_sum);
    if (p.label_smoothing > 0) {
      dz = dz - (weight == nullptr ? smooth : smooth * load_part<V>(weight + first_class + i, count));
    }
    if (capped.on) {
      const V t = (z + start) * capped.over_cap;
      dz = dz * fnma(t, t, one);
    }
    store_part(dz * grad, to + i, count);
  });
}

// The target's own gradient, of its (capped) logit z.
template <class A>
inline A gradient_of_target(const CrossEntropyParams& p, const LossRow<A>& row, A z) {
  const double x = (static_cast<double>(z) - row.max) - row.log_sum;
  double dz = row.at_target * std::expm1(x) + row.beyond_target * std::exp(x);
  dz -= p.label_smoothing / static_cast<double>(p.classes) * class_weight<A>(p, row.target);
  const double t = p.softcap > 0 ? z / p.softcap : 0.0;
  return static_cast<A>(row.grad * dz * (1 - t * t));
}

template <class S>
inline Acc<S> capped_logit(const CrossEntropyParams& p, const S* logits, int64_t index) {
  using A = Acc<S>;
  const double x = to_acc(logits[index]);
  return static_cast<A>(p.softcap > 0 ? p.softcap * std::tanh(x / p.softcap) : x);
}

// Logits of a row at a time: what the first cache holds of them in the accumulation dtype.
constexpr int64_t kLossBlock = 2048;

template <class S>
inline void cross_entropy_forward_rows(const CrossEntropyParams& p, Range range) {
  using A = Acc<S>;
  using V = Vec<A>;
  ScratchCursor scratch(thread_scratch(kLossBlock * sizeof(A)));
  A* z = scratch.take<A>(kLossBlock);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const S* logits = static_cast<const S*>(p.logits) + row * p.logits_stride;
    ExpSum<A> sums = no_sum<A>();
    for (int64_t first = 0; first < p.classes; first += kLossBlock) {
      const auto load = [&](int64_t i, int64_t count) { return load_part<V>(logits + first + i, count); };
      add_logits(p, first, std::min(kLossBlock, p.classes - first), load, z, &sums);
    }
    const int64_t target = p.target[row];
    finish_row(p, row, sums, target == p.ignore_index ? A(0) : capped_logit(p, logits, target));
  }
}

template <class S>
inline void cross_entropy_backward_rows(const CrossEntropyParams& p, Range range) {
  using A = Acc<S>;
  using V = Vec<A>;
  const Softcap<A> capped(p);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const S* logits = static_cast<const S*>(p.logits) + row * p.logits_stride;
    S* dlogits = static_cast<S*>(p.dlogits) + row * p.classes;
    const LossRow<A> state = loss_row<A>(p, row);
    const auto load = [&](int64_t i, int64_t count) { return capped(load_part<V>(logits + i, count)); };
    gradient_of_logits(p, state, 0, p.classes, A(0), load, dlogits);
    if (state.grad != 0) {
      dlogits[state.target] = from_acc<S>(gradient_of_target(p, state, capped_logit(p, logits, state.target)));
    }
  }
}

// The target's logit, if it is among the n classes from `first` on.
template <class A>
inline void keep_target(const LinearLossParams& p, int64_t row, int64_t first, int64_t n, const A* z) {
  const int64_t target = p.loss.target[row];
  if (target == p.loss.ignore_index || target < first || target >= first + n) return;
  static_cast<A*>(p.target_logit)[row] = z[target - first];
}

// Sums of each row of one piece of logits, the target's logit if it is among them, and what a strip keeps.
template <class S>
inline void finish_logits(const LinearLossParams& p, const Piece& piece, Acc<S>* logits) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t column_block = p.product.column_block, first = p.first_class + piece.column;
  const S* bias = offset_or_null<S>(const_cast<void*>(p.product.bias[0]), piece.column);
  const int64_t at = first / column_block * p.loss.rows + piece.row;
  A *block_max = static_cast<A*>(p.block_max) + at, *block_sum = static_cast<A*>(p.block_sum) + at;
  A* block_weighted = static_cast<A*>(p.block_weighted) + at;
  for (int64_t r = 0; r < piece.rows; ++r) {
    A* z = logits + r * column_block;
    const auto load = [&](int64_t i, int64_t count) {
      return load_part<V>(z + i, count) + load_optional<V>(bias, i, count);
    };
    ExpSum<A> sums = no_sum<A>();
    add_logits(p.loss, first, piece.columns, load, z, &sums);
    block_max[r] = sums.max, block_sum[r] = sums.sum, block_weighted[r] = sums.weighted;
    keep_target(p, piece.row + r, first, piece.columns, z);
    if (p.strip == nullptr) continue;
    S* strip = static_cast<S*>(p.strip) + (piece.row + r) * p.product.N + piece.column;
    const V shift(finite_max(sums.max));
    for_vectors<V::kLanes>(piece.columns,
                           [&](int64_t i, int64_t count) { store_part(V::load(z + i) - shift, strip + i, count); });
  }
}

// The same distances once more, bit for bit.
template <class S>
inline void recompute_strip(const LinearLossParams& p, const Piece& piece, Acc<S>* logits) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t column_block = p.product.column_block, first = p.first_class + piece.column;
  const S* bias = offset_or_null<S>(const_cast<void*>(p.product.bias[0]), piece.column);
  const A* block_max = static_cast<const A*>(p.block_max) + first / column_block * p.block_stride + piece.row;
  const Softcap<A> capped(p.loss);
  for (int64_t r = 0; r < piece.rows; ++r) {
    A* z = logits + r * column_block;
    S* strip = static_cast<S*>(p.strip) + (piece.row + r) * p.product.N + piece.column;
    const V shift(finite_max(block_max[r]));
    for_vectors<V::kLanes>(piece.columns, [&](int64_t i, int64_t count) {
      const V x = capped(load_part<V>(z + i, count) + load_optional<V>(bias, i, count));
      x.store(z + i);
      store_part(x - shift, strip + i, count);
    });
    keep_target(p, piece.row + r, first, piece.columns, z);
  }
}

// The gradient of a piece of logits, in place of the logits themselves.
template <class S>
inline void gradient_of_piece(const LinearLossParams& p, const Piece& piece) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t first = p.first_class + piece.column;
  const A* block_max = static_cast<const A*>(p.block_max) + first / p.product.column_block * p.block_stride;
  for (int64_t row = piece.row; row < piece.row + piece.rows; ++row) {
    S* strip = static_cast<S*>(p.strip) + row * p.product.N + piece.column;
    const LossRow<A> state = loss_row<A>(p.loss, row);
    const auto load = [&](int64_t i, int64_t count) { return load_part<V>(strip + i, count); };
    gradient_of_logits(p.loss, state, first, piece.columns, finite_max(block_max[row]), load, strip);
    const int64_t target = state.target - first;
    if (state.grad != 0 && target >= 0 && target < piece.columns) {
      const A z = static_cast<const A*>(p.target_logit)[row];
      strip[target] = from_acc<S>(gradient_of_target(p.loss, state, z));
    }
  }
}

template <class S>
inline void linear_loss_gradient_of(const LinearLossParams& p, Range range) {
  if (p.recompute) {
    linear_range<S>(p.product, range, [&](const Piece& piece, Acc<S>* logits, const Acc<S>*) {
      recompute_strip<S>(p, piece, logits);
      gradient_of_piece<S>(p, piece);
    });
  } else {
    for (int64_t item = range.begin; item < range.end; ++item) gradient_of_piece<S>(p, piece_of(p.product, item));
  }
}

// Rows' results from the sums of all blocks; rows are the lanes.
template <class A>
inline void linear_loss_rows_of(const LinearLossParams& p, Range range) {
  using V = Vec<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const int64_t rows = p.loss.rows, block = p.product.column_block, blocks = (p.loss.classes + block - 1) / block;
  const A *block_max = static_cast<const A*>(p.block_max), *block_sum = static_cast<const A*>(p.block_sum);
  const A* block_weighted = static_cast<const A*>(p.block_weighted);
  for (int64_t row = range.begin; row < range.end; row += V::kLanes) {
    const int64_t count = std::min<int64_t>(V::kLanes, range.end - row);
    V high(kNone), sum = V::zero(), weighted = V::zero();
    for (int64_t b = 0; b < blocks; ++b) high = max(load_part<V>(block_max + b * rows + row, count), high);
    const V shift = select(le(high, V(kNone)), V::zero(), high);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * rows + row;
      const V factor = exp(load_part<V>(block_max + at, count) - shift);
      sum = fma(load_part<V>(block_sum + at, count), factor, sum);
      weighted = weighted + load_part<V>(block_weighted + at, count);
    }
    alignas(64) A lanes[3][V::kLanes];
    high.store(lanes[0]), sum.store(lanes[1]), weighted.store(lanes[2]);
    for (int64_t i = 0; i < count; ++i) {
      const ExpSum<A> sums = {lanes[0][i], lanes[1][i], lanes[2][i]};
      const bool ignored = p.loss.target[row + i] == p.loss.ignore_index;
      finish_row(p.loss, row + i, sums, ignored ? A(0) : static_cast<const A*>(p.target_logit)[row + i]);
    }
  }
}

template <class S, class To>
inline void scaled_product_of(const ScaledProductParams& p, Range range) {
  using A = Acc<S>;
  using V = Vec<A>;
  const V scale(static_cast<A>(p.scale));
  linear_range<S>(p.product, range, [&](const Piece& piece, const A* sums, const A*) {
    for (int64_t r = 0; r < piece.rows; ++r) {
      const int64_t at = (piece.row + r) * p.product.N + piece.column;
      const A* from = sums + r * p.product.column_block;
      const A* base = p.base == nullptr ? nullptr : static_cast<const A*>(p.base) + at;
      To* to = static_cast<To*>(p.product.c) + at;
      for_vectors<V::kLanes>(piece.columns, [&](int64_t i, int64_t count) {
        store_part(fma(load_part<V>(from + i, count), scale, load_optional<V>(base, i, count)), to + i, count);
      });
    }
  });
}

inline void cross_entropy_forward(const CrossEntropyParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { cross_entropy_forward_rows<std::remove_pointer_t<decltype(type)>>(p, range); });
}
inline void cross_entropy_backward(const CrossEntropyParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { cross_entropy_backward_rows<std::remove_pointer_t<decltype(type)>>(p, range); });
}
inline void linear_loss_sums(const LinearLossParams& p, Range range) {
  dispatch(p.product.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    linear_range<S>(p.product, range,
                    [&](const Piece& piece, Acc<S>* sums, const Acc<S>*) { finish_logits<S>(p, piece, sums); });
  });
}
inline void linear_loss_rows(const LinearLossParams& p, Range range) {
  if (p.product.dtype == DType::kFloat64) {
    linear_loss_rows_of<double>(p, range);
  } else {
    linear_loss_rows_of<float>(p, range);
  }
}
inline void linear_loss_gradient(const LinearLossParams& p, Range range) {
  dispatch(p.product.dtype,
           [&](auto* type) { linear_loss_gradient_of<std::remove_pointer_t<decltype(type)>>(p, range); });
}
inline void scaled_product(const ScaledProductParams& p, Range range) {
  dispatch(p.product.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    p.wide ? scaled_product_of<S, Acc<S>>(p, range) : scaled_product_of<S, S>(p, range);
  });
}
