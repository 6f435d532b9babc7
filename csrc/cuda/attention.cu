// Attention's CUDA operators behind LibTorch's stable ABI, and which kernels take a call. The tables of sequences and
// pages lie on the device: their values are the caller's word.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "cuda/attention_launch.h"
#include "cuda/attention_plan.h"
#include "cuda/operator.h"
#include "ops/attention.h"

namespace fastattn {
namespace cuda {
namespace {

int32_t device_of(const Tensor& q) {
  FASTATTN_CHECK(q.is_cuda(), "attention: q is not on a CUDA device");
  return q.get_device_index();
}

void check_device(const OptionalTensor& x, const Tensor& q, const char* name) {
  FASTATTN_CHECK(!x.has_value() || x->device() == q.device(), "attention: ", name, " is not where q lies");
}

// All that the kernels read is on one device.
void check_devices(const AttentionInputs& x) {
  check_device(x.k, x.q, "k"), check_device(x.v, x.q, "v");
  check_device(x.attn_mask, x.q, "attn_mask"), check_device(x.alibi_slopes, x.q, "alibi_slopes");
  check_device(x.sinks, x.q, "sinks");
}

AttentionParams device_params(const AttentionInputs& x, const AttentionOptions& options) {
  check_devices(x);
  return attention_params(x, options, [](AttentionParams&) {});
}

// (batch, heads, rows, channels) in the memory order of q, as the operator's fake announces.
Tensor output_like(const Tensor& q, int64_t channels) {
  const auto allocate = allocator(q);
  if (q.stride(1) >= q.stride(2)) return allocate({q.size(0), q.size(1), q.size(2), channels}, q.scalar_type());
  return torch::stable::transpose(allocate({q.size(0), q.size(2), q.size(1), channels}, q.scalar_type()), 1, 2);
}

// Whether the sequences of a call lie in one batch entry of q, or of k.
bool rows_packed(const AttentionInputs& x) {
  // One sequence in a batch entry of more rows than a decoding step has may have few itself.
  return x.sequences.has_value() && x.q.size(0) == 1 && (x.sequences->size(0) > 1 || x.q.size(2) > kDecodeRows);
}
bool keys_packed(const AttentionInputs& x) {
  return x.sequences.has_value() && x.sequences->size(0) > 1 && x.k.size(0) == 1 && !x.block_table.has_value();
}

// With unit last stride, and not the same rows for several sequences by a stride of 0, which would pass for packed
// ones.
Tensor readable_queries(const Tensor& q) {
  return q.size(0) > 1 && q.stride(0) == 0 ? torch::stable::contiguous(q) : unit_last_stride(q);
}

// What rows have that are no sequence's.
void fill_uncovered(Tensor out, const OptionalTensor& lse) {
  torch::stable::zero_(out);
  if (lse.has_value()) torch::stable::fill_(*lse, -std::numeric_limits<double>::infinity());
}

// This call's own keys and values, to be appended to the cache; null: they are there.
struct Fresh {
  const Tensor *k = nullptr, *v = nullptr;
};

void run_decode(const AttentionParams& attention, const AttentionInputs& x, const StreamLaunch& launch,
                const Fresh& fresh) {
  DecodeParams p = decode_params(attention, rows_packed(x), keys_packed(x));
  if (fresh.k != nullptr) {
    p.fresh_k = fresh.k->const_data_ptr(), p.fresh_v = fresh.v->const_data_ptr();
    set_strides(*fresh.k, p.fresh_k_stride), set_strides(*fresh.v, p.fresh_v_stride);
  }
  const auto allocate = allocator(x.q);
  const Tensor acc = allocate({p.slots, p.heads, p.part_rows, p.head_dim_v}, ScalarType::Float);
  const Tensor sums = allocate({2, p.slots, p.heads, p.part_rows}, ScalarType::Float);
  p.acc = acc.mutable_data_ptr<float>(), p.sums = sums.mutable_data_ptr<float>();
  launch_attention_decode(p, launch);
}

// The kernels of full tiles: TMA and wgmma where device and tensors allow it, else mma.sync.
void run_tiles(const AttentionParams& p, const DeviceFacts& facts, const StreamLaunch& launch) {
  if (facts.capability == 90 && attention_forward_sm90_takes(p)) {
    return launch_attention_forward_sm90(p, facts.multiprocessors, launch);
  }
  launch_attention_sm80_forward(p, launch);
}

// out; p.lse where it is wanted. q_in has the memory order that out shall have.
Tensor run_forward(AttentionParams& p, const AttentionInputs& x, const Tensor& q_in, const OptionalTensor& lse,
                   const Fresh& fresh = {}) {
  const ForwardPlan plan = plan_forward(p, x.sequences.has_value(), rows_packed(x));
  FASTATTN_CHECK(plan.refusal == nullptr, "attention: the CUDA kernels do not take ", plan.refusal);
  const Tensor out = output_like(q_in, p.head_dim_v);
  p.out = out.mutable_data_ptr();
  set_strides(out, p.out_stride);
  if (x.sequences.has_value() && x.q.size(0) == 1) p.out_stride[0] = 0;
  const int32_t device = x.q.get_device_index();
  const StreamLaunch launch{current_stream(device)};
  if (plan.fills) fill_uncovered(out, lse);
  if (p.batch == 0 || p.heads == 0 || p.rows == 0) return out;
  if (plan.tiles) run_tiles(p, device_facts(device), launch);
  if (plan.decodes) run_decode(p, x, launch, fresh);
  return out;
}

// dq, dk and dv of what the Hopper kernels take. dq is summed by blocks as they come where that is taken; in a fixed
// order where torch is asked to be deterministic.
void run_backward_sm90(const AttentionBackwardParams& p, const Tensor& like, const StreamLaunch& launch) {
  if (deterministic_algorithms() || !attention_backward_sm90_sums_takes(p)) {
    return launch_attention_backward_sm90(p, launch);
  }
  Tensor sums = allocator(like)({attention_backward_sm90_sums(p)}, ScalarType::Float);
  torch::stable::zero_(sums);
  launch_attention_backward_sm90_sums(p, sums.mutable_data_ptr<float>(), launch);
}

// Every gradient that p has a place for: TMA and wgmma where device and tensors allow it, else and of a mask mma.sync.
void run_backward(const AttentionBackwardParams& p, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const StreamLaunch launch{current_stream(device)};
  launch_attention_delta(p, launch);
  if (device_facts(device).capability == 90 && attention_backward_sm90_takes(p)) {
    run_backward_sm90(p, like, launch);
    AttentionBackwardParams mask = p;
    mask.dq = nullptr;
    if (p.dmask != nullptr) launch_attention_sm80_backward(mask, launch);
  } else {
    launch_attention_sm80_backward(p, launch);
  }
  launch_attention_row_sums(p, launch);
}

}  // namespace

Tensor attention_inference(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& attn_mask,
                           const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
                           int64_t window_left, int64_t window_right, int64_t diagonal, double softcap,
                           double dropout_p, const OptionalTensor& rng_state, const OptionalTensor& sequences,
                           const OptionalTensor& block_table, bool) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(q_in));
  const Tensor q = readable_queries(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const AttentionInputs x{q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table};
  AttentionParams p =
      device_params(x, {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  return run_forward(p, x, q_in, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                     const OptionalTensor& attn_mask,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     double softmax_scale, int64_t window_left, int64_t window_right,
                                                     int64_t diagonal, double softcap, double dropout_p,
                                                     const OptionalTensor& rng_state, const OptionalTensor& sequences,
                                                     const OptionalTensor& block_table, bool) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(q_in));
  const Tensor q = readable_queries(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const AttentionInputs x{q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table};
  AttentionParams p =
      device_params(x, {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  auto [lse, statistics] = allocate_statistics(p, q, allocator(q));
  // The CUDA kernels keep nothing beside lse.
  if (p.statistics != nullptr) torch::stable::zero_(statistics);
  p.statistics = nullptr;
  const Tensor out = run_forward(p, x, q_in, lse);
  return {out, lse, statistics};
}

std::tuple<Tensor, Tensor> attention_append(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& k_in, const Tensor& v_in, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sinks, double softmax_scale, int64_t window_left,
                                            int64_t window_right, double softcap, const Tensor& sequences_in,
                                            const OptionalTensor& block_table) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(q_in));
  const Tensor q = readable_queries(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const OptionalTensor none = std::nullopt, sequences = sequences_in;
  const AttentionInputs x{q, k_cache, v_cache, none, alibi_slopes, sinks, sequences, block_table};
  AttentionParams p = device_params(x, {softmax_scale, window_left, window_right, 0, softcap, 0.0, none});
  FASTATTN_CHECK(has_unit_last_stride(k_cache) && has_unit_last_stride(v_cache),
                 "attention: the caches are written where they lie, with unit last stride");
  FASTATTN_CHECK(q.size(0) == sequences->size(0) && p.rows <= kDecodeRows, "attention: append takes up to ",
                 kDecodeRows, " rows of every sequence");
  for (const auto& [fresh, cache] : {std::pair(&k, &k_cache), std::pair(&v, &v_cache)}) {
    FASTATTN_CHECK(fresh->dim() == 4 && fresh->size(0) == q.size(0) && fresh->size(1) == p.heads_kv &&
                       fresh->size(2) == p.rows && fresh->size(3) == cache->size(3) &&
                       fresh->scalar_type() == q.scalar_type() && fresh->device() == q.device(),
                   "attention: k and v are (batch, heads, rows, head_dim) of the caches, like q");
  }
  const auto [lse, statistics] = allocate_statistics(p, q, allocator(q));
  p.statistics = nullptr;
  const Tensor out = run_forward(p, x, q_in, lse, {&k, &v});
  return {out, lse};
}

AttentionGradients attention_backward(const Tensor& dout_in, const OptionalTensor& dlse_in, const Tensor& q_in,
                                      const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
                                      const Tensor& lse_in, const OptionalTensor& attn_mask,
                                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                      double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
                                      double softcap, double dropout_p, const OptionalTensor& rng_state, bool mask_grad,
                                      bool slopes_grad, bool sinks_grad, const OptionalTensor& sequences,
                                      const OptionalTensor&, bool) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(q_in));
  const Tensor q = readable_queries(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor dout = readable_queries(dout_in), out = readable_queries(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const OptionalTensor dlse = contiguous_or_none(dlse_in), none = std::nullopt;
  const AttentionInputs x{q, k, v, attn_mask, alibi_slopes, sinks, sequences, none};
  const AttentionUpstream upstream{dout, dlse, out, lse, none, mask_grad, slopes_grad, sinks_grad};
  check_device(dout, q, "dout"), check_device(out, q, "out");
  check_device(lse, q, "lse"), check_device(dlse, q, "dlse");
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) =
      device_params(x, {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  const char* refusal = backward_refusal(p);
  FASTATTN_CHECK(refusal == nullptr, "attention: the CUDA kernels have no gradients of ", refusal);
  set_upstream(p, x, upstream);
  const auto allocate = allocator(q);
  AttentionGradients gradients = allocate_gradients(p, x, upstream, allocate);
  // What no sequence has, and what no block writes where there are no pairs.
  const bool nothing = p.batch * p.heads * p.rows * p.keys == 0;
  auto& [dq, dk, dv, dmask, dslopes, dsinks] = gradients;
  if (sequences.has_value() || nothing) {
    for (Tensor* gradient : {&dq, &dk, &dv}) torch::stable::zero_(*gradient);
  }
  if (nothing) torch::stable::zero_(dmask);
  const Tensor delta = allocate({q.size(0), p.heads, q.size(2)}, ScalarType::Float);
  const Tensor slope_rows = allocate({slopes_grad ? q.size(0) : 0, p.heads, q.size(2)}, ScalarType::Float);
  p.delta = delta.mutable_data_ptr();
  if (slopes_grad) p.slope_rows = slope_rows.mutable_data_ptr();
  if (p.heads > 0) run_backward(p, q);
  return gradients;
}

}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_inference", TORCH_BOX(&fastattn::cuda::attention_inference));
  m.impl("attention_forward", TORCH_BOX(&fastattn::cuda::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::cuda::attention_backward));
  m.impl("attention_append", TORCH_BOX(&fastattn::cuda::attention_append));
}
