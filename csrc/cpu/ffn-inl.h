// The feed-forward network: epilogues of the large matrix product (LinearParams in params.h) and column sums.
//
//   hidden = dropout(act(pre)),   or with a gate   dropout(act(gate) * pre)
//   dpre   = dhidden * factor * act'(pre)          dpre  = dhidden * factor * act(gate)
//                                                  dgate = dhidden * factor * pre * act'(gate)
// Everything between two products is in the accumulation dtype; what is stored is rounded once.

// f(n, count) over [0, columns) in vectors of Lanes.
template <int Lanes, class F>
inline void for_vectors(int64_t columns, const F& f) {
  for (int64_t n = 0; n < columns; n += Lanes) f(n, std::min<int64_t>(Lanes, columns - n));
}
template <class V, class S>
inline V load_part(const S* p, int64_t count) {
  return count == V::kLanes ? V::load(p) : V::load_n(p, count);
}
template <class V, class S>
inline void store_part(V x, S* p, int64_t count) {
  count == V::kLanes ? x.store(p) : x.store_n(p, count);
}
template <class V, class S>
inline V load_optional(const S* p, int64_t n, int64_t count) {
  return p == nullptr ? V::zero() : load_part<V>(p + n, count);
}
template <class S>
inline S* offset_or_null(void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<S*>(base) + offset;
}

// The dropout factors of a row's columns [column, column + columns), in the accumulation dtype.
class DropoutRow {
 public:
  explicit DropoutRow(const LinearParams& p) : p_(p) {
    if (!p.dropout.threshold) return;
    keep_ = p.dropout;
    keep_.scale = 1.0f;
    factor_.reset(new float[p.column_block + 4 * VecU32::kLanes]);
  }
  void draw(int64_t row, int64_t column, int64_t columns) {
    if (factor_ == nullptr) return;
    const uint64_t y = static_cast<uint64_t>(p_.first_row + row);
    dropout_factors(keep_, column, columns, static_cast<uint32_t>(y), static_cast<uint32_t>(y >> 32), factor_.get());
  }
  template <class V>
  V apply(V x, int64_t n, int64_t count) const {
    if (factor_ == nullptr) return x;
    using A = std::decay_t<decltype(reduce_add(x))>;
    // A dropped element is zero even where x is not finite, and draws nothing from it.
    const V kept = load_part<V>(factor_.get() + n, count);
    return select(le(kept, V::zero()), V::zero(), x * V(static_cast<A>(p_.dropout_scale)));
  }

 private:
  const LinearParams& p_;
  Dropout keep_;
  std::unique_ptr<float[]> factor_;
};

template <class S>
inline void finish_store(const LinearParams& p, const Piece& piece, const Acc<S>* sums) {
  using V = Vec<Acc<S>>;
  const S* bias = static_cast<const S*>(p.bias[0]);
  for (int64_t r = 0; r < piece.rows; ++r) {
    const Acc<S>* from = sums + r * p.column_block;
    const int64_t at = (piece.row + r) * p.N + piece.column;
    S* to = static_cast<S*>(p.c) + at;
    const S* residual = p.residual == nullptr ? nullptr : static_cast<const S*>(p.residual) + at;
    for_vectors<V::kLanes>(piece.columns, [&](int64_t n, int64_t count) {
      V x = load_part<V>(from + n, count);
      if (bias != nullptr) x = x + load_part<V>(bias + piece.column + n, count);
      if (residual != nullptr) x = x + load_part<V>(residual + n, count);
      store_part(x, to + n, count);
    });
  }
}

template <class S, class F>
inline void finish_activation(const LinearParams& p, const Piece& piece, const Acc<S>* sums, const Acc<S>* gate_sums,
                              DropoutRow& dropout) {
  using V = Vec<Acc<S>>;
  const S* bias = offset_or_null<S>(const_cast<void*>(p.bias[0]), piece.column);
  const S* gate_bias = offset_or_null<S>(const_cast<void*>(p.bias[1]), piece.column);
  const bool gated = p.second_apart;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t at = (piece.row + r) * p.N + piece.column;
    const Acc<S>*from = sums + r * p.column_block, *gate_from = gate_sums + r * p.column_block;
    S *hidden = static_cast<S*>(p.c) + at, *pre_out = offset_or_null<S>(p.pre, at),
      *gate_out = offset_or_null<S>(p.gate, at);
    dropout.draw(piece.row + r, piece.column, piece.columns);
    for_vectors<V::kLanes>(piece.columns, [&](int64_t n, int64_t count) {
      const V pre = load_part<V>(from + n, count) + load_optional<V>(bias, n, count);
      if (pre_out != nullptr) store_part(pre, pre_out + n, count);
      V y;
      if (gated) {
        const V gate = load_part<V>(gate_from + n, count) + load_optional<V>(gate_bias, n, count);
        if (gate_out != nullptr) store_part(gate, gate_out + n, count);
        y = F::value(gate) * pre;
      } else {
        y = F::value(pre);
      }
      store_part(dropout.apply(y, n, count), hidden + n, count);
    });
  }
}

template <class S, class F>
inline void finish_activation_grad(const LinearParams& p, const Piece& piece, const Acc<S>* sums, DropoutRow& dropout) {
  using A = Acc<S>;
  using V = Vec<A>;
  const int64_t block = piece.row / p.row_block;
  A* pre_sums = offset_or_null<A>(p.dpre_sums, block * p.N + piece.column);
  A* gate_sums = p.gate == nullptr ? nullptr : offset_or_null<A>(p.dgate_sums, block * p.N + piece.column);
  if (pre_sums != nullptr) std::fill(pre_sums, pre_sums + piece.columns, A(0));
  if (gate_sums != nullptr) std::fill(gate_sums, gate_sums + piece.columns, A(0));
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t at = (piece.row + r) * p.N + piece.column;
    const A* from = sums + r * p.column_block;
    const S *pre_in = static_cast<const S*>(p.pre) + at, *gate_in = offset_or_null<S>(p.gate, at);
    S *hidden = offset_or_null<S>(p.c, at), *dpre_out = static_cast<S*>(p.dpre) + at,
      *dgate_out = offset_or_null<S>(p.dgate, at);
    dropout.draw(piece.row + r, piece.column, piece.columns);
    for_vectors<V::kLanes>(piece.columns, [&](int64_t n, int64_t count) {
      const V dhidden = dropout.apply(load_part<V>(from + n, count), n, count), pre = load_part<V>(pre_in + n, count);
      V value, dpre;
      if (gate_in != nullptr) {
        const V slope = F::slope(load_part<V>(gate_in + n, count), &value);
        const V dgate = dhidden * pre * slope;
        dpre = dhidden * value;
        value = value * pre;
        store_part(dgate, dgate_out + n, count);
        if (gate_sums != nullptr) store_part(load_part<V>(gate_sums + n, count) + dgate, gate_sums + n, count);
      } else {
        dpre = dhidden * F::slope(pre, &value);
      }
      store_part(dpre, dpre_out + n, count);
      if (pre_sums != nullptr) store_part(load_part<V>(pre_sums + n, count) + dpre, pre_sums + n, count);
      if (hidden != nullptr) store_part(dropout.apply(value, n, count), hidden + n, count);
    });
  }
}

template <class S>
inline void linear_of(const LinearParams& p, Range range) {
  using A = Acc<S>;
  DropoutRow dropout(p);
  switch (p.epilogue) {
    case Epilogue::kStore:
      linear_range<S>(p, range, [&](const Piece& piece, const A* sums, const A*) { finish_store<S>(p, piece, sums); });
      break;
    case Epilogue::kActivation:
      linear_range<S>(p, range, [&](const Piece& piece, const A* sums, const A* gate_sums) {
        with_activation(p.activation, [&](auto activation) {
          finish_activation<S, decltype(activation)>(p, piece, sums, gate_sums, dropout);
        });
      });
      break;
    case Epilogue::kActivationGrad:
      linear_range<S>(p, range, [&](const Piece& piece, const A* sums, const A*) {
        with_activation(p.activation, [&](auto activation) {
          finish_activation_grad<S, decltype(activation)>(p, piece, sums, dropout);
        });
      });
      break;
  }
}

// Sums of many terms are taken in runs of this many, and those of runs again: what a chain of n additions loses grows
// with its length.
constexpr int64_t kSumRun = 16;

// Sum of the vectors load(begin), ..., load(end - 1).
template <class V, class Load>
inline V sum_in_runs(int64_t begin, int64_t end, const Load& load) {
  V total = V::zero();
  for (int64_t group = begin; group < end; group += kSumRun * kSumRun) {
    V of_group = V::zero();
    for (int64_t run = group; run < std::min(end, group + kSumRun * kSumRun); run += kSumRun) {
      V sum = V::zero();
      for (int64_t i = run; i < std::min(end, run + kSumRun); ++i) sum = sum + load(i);
      of_group = of_group + sum;
    }
    total = total + of_group;
  }
  return total;
}

template <class From, class To>
inline void column_sums_of(const ColumnSumParams& p, Range range) {
  using A = Acc<From>;
  using V = Vec<A>;
  const From* x = static_cast<const From*>(p.x);
  To* out = static_cast<To*>(p.sums);
  for (int64_t n = range.begin; n < range.end; n += V::kLanes) {
    const int64_t count = std::min<int64_t>(V::kLanes, range.end - n);
    V total = sum_in_runs<V>(0, p.M, [&](int64_t m) { return load_part<V>(x + m * p.N + n, count); });
    total = total * V(static_cast<A>(p.scale));
    store_part(p.add ? load_part<V>(out + n, count) + total : total, out + n, count);
  }
}

inline Packs linear_packs(const LinearParams& p) {
  Packs packs = Packs::kNothing;
  dispatch(p.dtype, [&](auto* type) { packs = packs_of<std::remove_pointer_t<decltype(type)>>(p); });
  return packs;
}
inline size_t linear_packed_bytes(const LinearParams& p) {
  size_t bytes = 0;
  dispatch(p.dtype, [&](auto* type) { bytes = packed_bytes_of<std::remove_pointer_t<decltype(type)>>(p); });
  return bytes;
}
inline int64_t linear_pack_items(const LinearParams& p) {
  int64_t items = 0;
  dispatch(p.dtype, [&](auto* type) { items = pack_items<std::remove_pointer_t<decltype(type)>>(p); });
  return items;
}
inline void linear_pack(const LinearParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { pack_range<std::remove_pointer_t<decltype(type)>>(p, range); });
}
inline void linear(const LinearParams& p, Range range) {
  dispatch(p.dtype, [&](auto* type) { linear_of<std::remove_pointer_t<decltype(type)>>(p, range); });
}
inline void column_sums(const ColumnSumParams& p, Range range) {
  dispatch(p.to, [&](auto* type) {
    using To = std::remove_pointer_t<decltype(type)>;
    if (p.from == p.to) {
      column_sums_of<To, To>(p, range);
    } else {
      column_sums_of<Acc<To>, To>(p, range);
    }
  });
}
