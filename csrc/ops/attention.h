// What the CPU and the CUDA operators of attention do alike: check the tensors, allocate the results, fill params.h.
#pragma once

#include <algorithm>
#include <tuple>

#include "ops/tensor.h"

namespace fastattn {

// The tensors of a call but q, k and v with unit last stride, in the schema's order.
struct AttentionInputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &attn_mask, &alibi_slopes, &sinks, &sequences, &block_table;
};

// The arguments that are no tensors of the score, in the schema's order.
struct AttentionOptions {
  double softmax_scale;
  int64_t window_left, window_right, diagonal;
  double softcap, dropout_p;
  const OptionalTensor& rng_state;
};

inline bool has_unit_last_stride(const Tensor& x) { return x.stride(3) == 1 || x.size(3) <= 1; }

// Last stride 1, as the kernels need; any other order of the rest is read in place.
inline Tensor unit_last_stride(const Tensor& x) { return has_unit_last_stride(x) ? x : torch::stable::contiguous(x); }

inline OptionalTensor contiguous_or_none(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(torch::stable::contiguous(*x)) : OptionalTensor(std::nullopt);
}

inline void set_strides(const Tensor& x, int64_t (&stride)[3]) {
  for (int i = 0; i < 3; ++i) stride[i] = x.stride(i);
}

inline void check_attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  FASTATTN_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v are 4-D");
  FASTATTN_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                 "attention: q, k and v differ in dtype");
  FASTATTN_CHECK(k.size(0) == v.size(0), "attention: k and v differ in batch size");
  FASTATTN_CHECK(k.size(1) == v.size(1) && (q.size(1) == 0 || (k.size(1) > 0 && q.size(1) % k.size(1) == 0)),
                 "attention: the heads of q are no multiple of those of k and v");
  FASTATTN_CHECK(k.size(2) == v.size(2), "attention: k and v differ in length");
  FASTATTN_CHECK(k.size(3) == q.size(3), "attention: q and k differ in head_dim");
  FASTATTN_CHECK(q.size(3) > 0 && v.size(3) > 0, "attention: head_dim is 0");
}

inline void set_mask(AttentionParams& p, const Tensor& mask) {
  const int64_t full[4] = {p.batch, p.heads, p.rows, p.keys};
  FASTATTN_CHECK(mask.dim() == 4, "attention: attn_mask is 4-D");
  p.mask_dtype = dtype_of(mask);
  FASTATTN_CHECK(p.mask_dtype == DType::kBool || p.mask_dtype == p.dtype || p.mask_dtype == DType::kFloat32,
                 "attention: attn_mask is bool, float32 or of q's dtype");
  for (int i = 0; i < 4; ++i) {
    FASTATTN_CHECK(mask.size(i) == 1 || mask.size(i) == full[i], "attention: attn_mask does not broadcast");
    p.mask_stride[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  p.mask = mask.const_data_ptr();
}

// A batch entry is a sequence from here on; rows and keys are what a sequence may have at most.
inline void set_sequences(AttentionParams& p, const AttentionInputs& x) {
  FASTATTN_CHECK(x.sequences.has_value() || !x.block_table.has_value(), "attention: block_table needs sequences");
  if (!x.sequences.has_value()) {
    FASTATTN_CHECK(x.k.size(0) == x.q.size(0), "attention: q, k and v differ in batch size");
    return;
  }
  const Tensor& table = *x.sequences;
  FASTATTN_CHECK(table.device() == x.q.device() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                     table.size(1) == 5 && table.is_contiguous(),
                 "attention: sequences is a contiguous int64 tensor (sequences, 5) where q lies");
  const int64_t count = table.size(0);
  FASTATTN_CHECK(x.q.size(0) == count || x.q.size(0) == 1, "attention: sequences: q is batched by sequence or packed");
  p.batch = count;
  p.sequences = static_cast<const Sequence*>(table.const_data_ptr());
  if (x.q.size(0) == 1) p.q_stride[0] = p.row_stride[0] = 0;
  if (x.block_table.has_value()) {
    const Tensor& pages = *x.block_table;
    FASTATTN_CHECK(pages.device() == x.q.device() && pages.scalar_type() == ScalarType::Int && pages.dim() == 2 &&
                       pages.size(0) == count && pages.is_contiguous() && x.k.size(2) > 0,
                   "attention: block_table is a contiguous int32 tensor (sequences, pages of each) where q lies");
    p.block_table = pages.const_data_ptr<int32_t>();
    p.max_pages = pages.size(1), p.page_size = x.k.size(2);
    p.keys *= p.max_pages;
  } else {
    FASTATTN_CHECK(x.k.size(0) == count || x.k.size(0) == 1,
                   "attention: sequences: k is batched by sequence or packed");
    if (x.k.size(0) == 1) p.k_stride[0] = p.v_stride[0] = 0;
  }
  FASTATTN_CHECK(
      p.mask == nullptr || count == 0 || (x.q.size(0) == count && x.k.size(0) == count && p.block_table == nullptr),
      "attention: attn_mask with packed or paged sequences");
}

// All but the outputs. read_sequences(p) looks at the values of p.sequences where the host can.
template <class ReadSequences>
inline AttentionParams attention_params(const AttentionInputs& x, const AttentionOptions& options,
                                        ReadSequences&& read_sequences) {
  check_attention_inputs(x.q, x.k, x.v);
  AttentionParams p{};
  p.dtype = p.mask_dtype = dtype_of(x.q);
  FASTATTN_CHECK(p.dtype != DType::kBool, "attention: q is bool");
  p.batch = x.q.size(0), p.heads = x.q.size(1), p.heads_kv = x.k.size(1);
  p.rows = x.q.size(2), p.keys = x.k.size(2), p.head_dim = x.q.size(3), p.head_dim_v = x.v.size(3);
  p.q = x.q.const_data_ptr(), p.k = x.k.const_data_ptr(), p.v = x.v.const_data_ptr();
  set_strides(x.q, p.q_stride), set_strides(x.k, p.k_stride), set_strides(x.v, p.v_stride);
  p.row_stride[0] = p.heads * p.rows, p.row_stride[1] = p.rows;
  if (x.attn_mask.has_value()) set_mask(p, *x.attn_mask);
  set_sequences(p, x);
  if (x.sequences.has_value()) read_sequences(p);
  const ScalarType accumulation = accumulation_type(x.q.scalar_type());
  if (x.alibi_slopes.has_value()) {
    const Tensor& slopes = *x.alibi_slopes;
    FASTATTN_CHECK(slopes.dim() == 2 && (slopes.size(0) == 1 || slopes.size(0) == p.batch) &&
                       slopes.size(1) == p.heads && slopes.scalar_type() == accumulation && slopes.is_contiguous(),
                   "attention: alibi_slopes is (1 | batch, heads), contiguous, in the accumulation dtype");
    p.slopes = slopes.const_data_ptr();
    p.slopes_stride_batch = slopes.size(0) == 1 ? 0 : p.heads;
  }
  if (x.sinks.has_value()) {
    FASTATTN_CHECK(x.sinks->dim() == 1 && x.sinks->size(0) == p.heads && x.sinks->scalar_type() == accumulation &&
                       x.sinks->is_contiguous(),
                   "attention: sinks is (heads,), contiguous, in the accumulation dtype");
    p.sinks = x.sinks->const_data_ptr();
  }
  p.scale = options.softmax_scale, p.softcap = options.softcap;
  p.window_left = options.window_left, p.window_right = options.window_right, p.diagonal = options.diagonal;
  p.dropout = make_dropout(options.dropout_p, options.rng_state);
  p.dropout_scale = 1 / (1 - std::max(options.dropout_p, 0.0));
  return p;
}

// (lse, statistics) of forward. allocate(shape, type) gives an empty tensor on q's device.
template <class Allocate>
inline std::tuple<Tensor, Tensor> allocate_statistics(AttentionParams& p, const Tensor& q, Allocate&& allocate) {
  const ScalarType wide = accumulation_type(q.scalar_type());
  const bool keeps = q.scalar_type() == ScalarType::Float;
  const Tensor lse = allocate({q.size(0), p.heads, q.size(2)}, wide);
  const Tensor statistics = keeps ? allocate({2, q.size(0), p.heads, q.size(2)}, wide) : allocate({0}, wide);
  p.lse = lse.mutable_data_ptr();
  if (keeps) p.statistics = statistics.mutable_data_ptr(), p.statistics_stride = lse.numel();
  return {lse, statistics};
}

// What backward has beside forward's inputs: dout and out with unit last stride, the rest contiguous.
struct AttentionUpstream {
  const Tensor& dout;
  const OptionalTensor& dlse;
  const Tensor &out, &lse;
  const OptionalTensor& statistics;
  bool mask_grad, slopes_grad, sinks_grad;
};

inline void set_upstream(AttentionBackwardParams& p, const AttentionInputs& x, const AttentionUpstream& up) {
  const ScalarType type = x.q.scalar_type(), accumulation = accumulation_type(type);
  for (const Tensor* t : {&up.dout, &up.out}) {
    FASTATTN_CHECK(t->dim() == 4 && t->size(0) == x.q.size(0) && t->size(1) == p.heads && t->size(2) == x.q.size(2) &&
                       t->size(3) == p.head_dim_v && t->scalar_type() == type,
                   "attention: dout and out are (batch, heads, rows, head_dim_v) in q's dtype");
  }
  FASTATTN_CHECK(up.lse.numel() == x.q.size(0) * p.heads * x.q.size(2) && up.lse.scalar_type() == accumulation,
                 "attention: lse is (batch, heads, rows) in the accumulation dtype");
  FASTATTN_CHECK(
      !up.statistics.has_value() || (type == ScalarType::Float && up.statistics->numel() == 2 * up.lse.numel() &&
                                     up.statistics->scalar_type() == accumulation),
      "attention: statistics is what forward returned for float32");
  FASTATTN_CHECK(!up.dlse.has_value() || (up.dlse->numel() == up.lse.numel() && up.dlse->scalar_type() == accumulation),
                 "attention: dlse is like lse");
  FASTATTN_CHECK(!up.mask_grad || (x.attn_mask.has_value() && p.mask_dtype != DType::kBool),
                 "attention: mask_grad needs an additive attn_mask");
  FASTATTN_CHECK(!up.slopes_grad || x.alibi_slopes.has_value(), "attention: slopes_grad needs alibi_slopes");
  FASTATTN_CHECK(!up.sinks_grad || x.sinks.has_value(), "attention: sinks_grad needs sinks");
  p.out = const_cast<void*>(up.out.const_data_ptr()), p.lse = const_cast<void*>(up.lse.const_data_ptr());
  p.statistics = const_cast<void*>(data_or_null(up.statistics)), p.statistics_stride = up.lse.numel();
  p.dout = up.dout.const_data_ptr(), p.dlse = data_or_null(up.dlse);
  set_strides(up.out, p.out_stride), set_strides(up.dout, p.dout_stride);
  if (p.sequences != nullptr && x.q.size(0) == 1) p.out_stride[0] = p.dout_stride[0] = 0;
}

// (dq, dk, dv, dmask, dslopes, dsinks); the last three are (0,) where not wanted.
using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Allocate>
inline AttentionGradients allocate_gradients(AttentionBackwardParams& p, const AttentionInputs& x,
                                             const AttentionUpstream& up, Allocate&& allocate) {
  const ScalarType type = x.q.scalar_type(), accumulation = accumulation_type(type);
  const Tensor dq = allocate({x.q.size(0), p.heads, x.q.size(2), p.head_dim}, type);
  const Tensor dk = allocate({x.k.size(0), p.heads_kv, x.k.size(2), p.head_dim}, type);
  const Tensor dv = allocate({x.k.size(0), p.heads_kv, x.k.size(2), p.head_dim_v}, type);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  const bool k_packed = p.sequences != nullptr && x.k.size(0) == 1;
  p.key_stride[0] = k_packed ? 0 : p.heads_kv * x.k.size(2), p.key_stride[1] = x.k.size(2);
  Tensor dmask = allocate({0}, type), dslopes = allocate({0}, type), dsinks = allocate({0}, type);
  if (up.mask_grad) {
    int64_t* extent = p.mask_extent;
    for (int i = 0; i < 4; ++i) extent[i] = x.attn_mask->size(i);
    dmask = allocate({extent[0], extent[1], extent[2], extent[3]}, x.attn_mask->scalar_type());
    p.dmask = dmask.mutable_data_ptr();
  }
  if (up.slopes_grad) {
    dslopes = allocate({x.alibi_slopes->size(0), p.heads}, accumulation);
    p.dslopes = dslopes.mutable_data_ptr();
  }
  if (up.sinks_grad) {
    dsinks = allocate({p.heads}, accumulation);
    p.dsinks = dsinks.mutable_data_ptr();
  }
  return {dq, dk, dv, dmask, dslopes, dsinks};
}

inline void set_weights_inputs(AttentionWeightsParams& p, const Tensor& q, const Tensor& lse, bool average) {
  FASTATTN_CHECK(lse.numel() == p.batch * p.heads * p.rows && lse.scalar_type() == accumulation_type(q.scalar_type()),
                 "attention_weights: lse is (batch, heads, rows) in the accumulation dtype");
  FASTATTN_CHECK(!average || p.heads > 0 || p.batch * p.rows * p.keys == 0,
                 "attention_weights: no heads to average over");
  p.lse = const_cast<void*>(lse.const_data_ptr());
  p.average = average;
}

}  // namespace fastattn
