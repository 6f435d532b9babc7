#include <algorithm>

#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {
namespace {

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  FASTATTN_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v are 4-D");
  FASTATTN_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                 "attention: q, k and v differ in dtype");
  FASTATTN_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0), "attention: q, k and v differ in batch size");
  FASTATTN_CHECK(k.size(1) == v.size(1) && (q.size(1) == 0 || (k.size(1) > 0 && q.size(1) % k.size(1) == 0)),
                 "attention: the heads of q are no multiple of those of k and v");
  FASTATTN_CHECK(k.size(2) == v.size(2), "attention: k and v differ in length");
  FASTATTN_CHECK(k.size(3) == q.size(3), "attention: q and k differ in head_dim");
}

// Up to this many rows a call is a decoding step: the rest has too few lanes to fill.
constexpr int64_t kDecodeRows = 8;

// Last stride 1, as the kernels need; any other order of the rest is read in place.
Tensor unit_last_stride(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

void set_strides(const Tensor& x, int64_t (&stride)[3]) {
  for (int i = 0; i < 3; ++i) stride[i] = x.stride(i);
}

AttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask,
                            const OptionalTensor& slopes, const OptionalTensor& sinks) {
  check_inputs(q, k, v);
  AttentionParams p{};
  p.dtype = p.mask_dtype = dtype_of(q);
  FASTATTN_CHECK(p.dtype != DType::kBool, "attention: q is bool");
  p.batch = q.size(0), p.heads = q.size(1), p.heads_kv = k.size(1);
  p.rows = q.size(2), p.keys = k.size(2), p.head_dim = q.size(3), p.head_dim_v = v.size(3);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  set_strides(q, p.q_stride), set_strides(k, p.k_stride), set_strides(v, p.v_stride);
  const ScalarType accumulation = accumulation_type(q.scalar_type());
  if (attn_mask.has_value()) {
    const Tensor& mask = *attn_mask;
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
  if (slopes.has_value()) {
    FASTATTN_CHECK(slopes->dim() == 2 && (slopes->size(0) == 1 || slopes->size(0) == p.batch) &&
                       slopes->size(1) == p.heads && slopes->scalar_type() == accumulation && slopes->is_contiguous(),
                   "attention: alibi_slopes is (1 | batch, heads), contiguous, in the accumulation dtype");
    p.slopes = slopes->const_data_ptr();
    p.slopes_stride_batch = slopes->size(0) == 1 ? 0 : p.heads;
  }
  if (sinks.has_value()) {
    FASTATTN_CHECK(sinks->dim() == 1 && sinks->size(0) == p.heads && sinks->scalar_type() == accumulation &&
                       sinks->is_contiguous(),
                   "attention: sinks is (heads,), contiguous, in the accumulation dtype");
    p.sinks = sinks->const_data_ptr();
  }
  return p;
}

void set_scalars(AttentionParams& p, double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
                 double softcap, double dropout_p, const OptionalTensor& rng_state) {
  p.scale = softmax_scale, p.softcap = softcap;
  p.window_left = window_left, p.window_right = window_right, p.diagonal = diagonal;
  p.dropout = make_dropout(dropout_p, rng_state);
  p.dropout_scale = 1 / (1 - std::max(dropout_p, 0.0));
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                             const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                                             const OptionalTensor& sinks, double softmax_scale, int64_t window_left,
                                             int64_t window_right, int64_t diagonal, double softcap, double dropout_p,
                                             const OptionalTensor& rng_state) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  AttentionParams p = make_params(q, k, v, attn_mask, alibi_slopes, sinks);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);

  const bool rows_outside = q_in.stride(1) < q_in.stride(2);  // (batch, seq, heads, dim) in memory
  const Tensor out =
      rows_outside ? torch::stable::transpose(empty({p.batch, p.rows, p.heads, p.head_dim_v}, q.scalar_type()), 1, 2)
                   : empty({p.batch, p.heads, p.rows, p.head_dim_v}, q.scalar_type());
  const Tensor lse = empty({p.batch, p.heads, p.rows}, accumulation_type(q.scalar_type()));
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  set_strides(out, p.out_stride);

  const KernelTable& table = kernels();
  if (p.rows <= kDecodeRows && p.dropout.threshold == 0) {
    const int64_t parts = (p.keys + table.attention_decode_keys - 1) / table.attention_decode_keys;
    const Tensor partial = empty({p.batch * p.heads * p.rows, parts, p.head_dim_v + 2}, lse.scalar_type());
    p.partial = partial.mutable_data_ptr();
    if (p.partial != nullptr) {
      parallel_for(p.batch * p.heads_kv * parts, 1, [&](Range range) { table.attention_forward(p, range); });
      p.merge = true;
      table.attention_forward(p, Range{0, p.batch * p.heads * p.rows});
      return {out, lse};
    }
  }
  const int64_t blocks = (p.rows + table.attention_queries - 1) / table.attention_queries;
  parallel_for(p.batch * p.heads * blocks, 1, [&](Range range) { table.attention_forward(p, range); });
  return {out, lse};
}

namespace {

// Whether (b, kv head) items keep all threads busy: they need 5 products a block, the two finer stages 3 + 4.
bool heads_fill_threads(int64_t heads) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t rounds = (heads + threads - 1) / threads;
  return 5 * rounds * threads <= 7 * heads;
}

void run_stage(AttentionBackwardParams p, AttentionStage stage, int64_t items) {
  const KernelTable& table = kernels();
  p.stage = stage;
  if (stage != AttentionStage::kAll && stage != AttentionStage::kQueries && stage != AttentionStage::kFinish) {
    p.slope_rows = p.delta = nullptr;
  }
  parallel_for(items, 1, [&](Range range) { table.attention_backward(p, range); });
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const OptionalTensor& dlse_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, double dropout_p, const OptionalTensor& rng_state, bool mask_grad, bool slopes_grad,
    bool sinks_grad) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor dout = unit_last_stride(dout_in), out = unit_last_stride(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const OptionalTensor dlse = dlse_in.has_value() ? OptionalTensor(torch::stable::contiguous(*dlse_in)) : std::nullopt;
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) = make_params(q, k, v, attn_mask, alibi_slopes, sinks);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);
  const ScalarType type = q.scalar_type(), accumulation = accumulation_type(type);
  for (const Tensor* x : {&dout, &out}) {
    FASTATTN_CHECK(x->dim() == 4 && x->size(0) == p.batch && x->size(1) == p.heads && x->size(2) == p.rows &&
                       x->size(3) == p.head_dim_v && x->scalar_type() == type,
                   "attention: dout and out are (batch, heads, rows, head_dim_v) in q's dtype");
  }
  FASTATTN_CHECK(lse.numel() == p.batch * p.heads * p.rows && lse.scalar_type() == accumulation,
                 "attention: lse is (batch, heads, rows) in the accumulation dtype");
  FASTATTN_CHECK(!dlse.has_value() || (dlse->numel() == lse.numel() && dlse->scalar_type() == accumulation),
                 "attention: dlse is like lse");
  FASTATTN_CHECK(!mask_grad || (attn_mask.has_value() && p.mask_dtype != DType::kBool),
                 "attention: mask_grad needs an additive attn_mask");
  FASTATTN_CHECK(!slopes_grad || alibi_slopes.has_value(), "attention: slopes_grad needs alibi_slopes");
  FASTATTN_CHECK(!sinks_grad || sinks.has_value(), "attention: sinks_grad needs sinks");
  p.out = const_cast<void*>(out.const_data_ptr()), p.lse = const_cast<void*>(lse.const_data_ptr());
  p.dout = dout.const_data_ptr(), p.dlse = data_or_null(dlse);
  set_strides(out, p.out_stride), set_strides(dout, p.dout_stride);

  const Tensor dq = empty({p.batch, p.heads, p.rows, p.head_dim}, type);
  const Tensor dk = empty({p.batch, p.heads_kv, p.keys, p.head_dim}, type);
  const Tensor dv = empty({p.batch, p.heads_kv, p.keys, p.head_dim_v}, type);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  const Tensor delta = empty({p.batch, p.heads, sinks_grad ? p.rows : 0}, accumulation);
  const Tensor slope_rows = empty({p.batch, p.heads, slopes_grad ? p.rows : 0}, accumulation);
  if (sinks_grad) p.delta = delta.mutable_data_ptr();
  if (slopes_grad) p.slope_rows = slope_rows.mutable_data_ptr();

  const KernelTable& table = kernels();
  const int64_t heads = p.batch * p.heads_kv;
  const int64_t query_blocks = blocks_of(p.rows, table.attention_queries);
  const int64_t key_blocks = blocks_of(p.keys, table.attention_keys);
  if (heads_fill_threads(heads)) {
    run_stage(p, AttentionStage::kAll, heads);
  } else {
    run_stage(p, AttentionStage::kQueries, p.batch * p.heads * query_blocks);
    run_stage(p, AttentionStage::kKeys, heads * key_blocks);
  }

  Tensor dmask = none(q), dslopes = none(q), dsinks = none(q);
  if (mask_grad) {
    int64_t* extent = p.mask_extent;
    for (int i = 0; i < 4; ++i) extent[i] = attn_mask->size(i);
    dmask = empty({extent[0], extent[1], extent[2], extent[3]}, attn_mask->scalar_type());
    p.dmask = dmask.mutable_data_ptr();
    run_stage(p, AttentionStage::kMask,
              extent[0] * extent[1] * (extent[2] == 1 ? 1 : query_blocks) * (extent[3] == 1 ? 1 : key_blocks));
  }
  if (slopes_grad) {
    dslopes = empty({alibi_slopes->size(0), p.heads}, accumulation);
    if (p.batch == 0) torch::stable::zero_(dslopes);
    p.dslopes = dslopes.mutable_data_ptr();
  }
  if (sinks_grad) {
    dsinks = empty({p.heads}, accumulation);
    p.dsinks = dsinks.mutable_data_ptr();
  }
  if (slopes_grad || sinks_grad) run_stage(p, AttentionStage::kFinish, p.heads);
  return {dq, dk, dv, dmask, dslopes, dsinks};
}

}  // namespace fastattn
