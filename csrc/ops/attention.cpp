#include "ops/attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/kernel_table.h"

namespace fastattn {
namespace {

// Up to this many rows a call is a decoding step: the rest has too few lanes to fill.
constexpr int64_t kDecodeRows = 8;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Every page that a sequence's keys lie in exists.
void check_pages(const AttentionParams& p, int64_t pages) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& own = p.sequences[b];
    FASTATTN_CHECK(own.k_begin == 0 && own.keys <= p.max_pages * p.page_size,
                   "attention: sequences: more keys than block_table has pages for");
    const int32_t* page = p.block_table + b * p.max_pages;
    for (int64_t i = 0; i * p.page_size < own.keys; ++i) {
      FASTATTN_CHECK(page[i] >= 0 && page[i] < pages, "attention: block_table: a page index is out of range");
    }
  }
}

// The extents of the largest sequence, once all of them are known to lie in their tensors.
void read_sequences(AttentionParams& p, const Tensor& q, const Tensor& k) {
  const int64_t capacity = p.keys;
  p.rows = p.keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& own = p.sequences[b];
    FASTATTN_CHECK(own.q_begin >= 0 && own.rows >= 0 && own.rows <= q.size(2) - own.q_begin,
                   "attention: sequences: rows outside q");
    FASTATTN_CHECK(own.k_begin >= 0 && own.keys >= 0 && own.keys <= capacity - own.k_begin,
                   "attention: sequences: keys outside k");
    FASTATTN_CHECK(p.mask == nullptr || (own.q_begin == 0 && own.k_begin == 0),
                   "attention: attn_mask with packed or paged sequences");
    p.rows = std::max(p.rows, own.rows), p.keys = std::max(p.keys, own.keys);
  }
  if (p.block_table != nullptr) check_pages(p, k.size(0));
}

AttentionParams make_params(const AttentionInputs& x, const AttentionOptions& options) {
  return attention_params(x, options, [&](AttentionParams& p) { read_sequences(p, x.q, x.k); });
}

// Of the sequences before each, per head: how many work items they have and what these cost. Empty without sequences.
struct Items {
  std::vector<int64_t> before, cost;
};

// count(sequence): its items per head; an item costs what cost(sequence) says, in scores, and a little for itself.
template <class Count, class Cost>
Items items_of(const AttentionParams& p, const Count& count, const Cost& cost) {
  Items items;
  if (p.sequences == nullptr) return items;
  items.before.assign(p.batch + 1, 0), items.cost.assign(p.batch + 1, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t own = count(p.sequences[b]);
    items.before[b + 1] = items.before[b] + own;
    items.cost[b + 1] = items.cost[b] + own * (cost(p.sequences[b]) + 1);
  }
  return items;
}

// The first item of part t of `parts` that cost about the same.
int64_t split(const Items& items, int64_t heads, int64_t t, int64_t parts) {
  const std::vector<int64_t>&before = items.before, &cost = items.cost;
  if (t == parts) return heads * before.back();
  const int64_t wanted = heads * cost.back() / parts * t;
  const int64_t b = std::upper_bound(cost.begin(), cost.end() - 1, wanted / heads) - cost.begin() - 1;
  const int64_t each = (cost[b + 1] - cost[b]) / std::max<int64_t>(1, before[b + 1] - before[b]);
  return heads * before[b] + (wanted - heads * cost[b]) / std::max<int64_t>(1, each);
}

// f(p, range) over the work items: `each` per batch entry and head, or those of sequences, which differ in length and
// so are split by what they cost.
template <class Params, class F>
void for_items(Params p, int64_t heads, int64_t each, const Items& items, const F& f) {
  if (p.sequences == nullptr) {
    parallel_chunks(p.batch * heads * each, each, [&](Range range) { f(p, range); });
    return;
  }
  p.items_before = items.before.data();
  const int64_t total = heads * items.before.back();
  const int64_t parts = std::min<int64_t>(total, kChunksPerThread * torch::stable::get_num_threads());
  parallel_chunks(parts, 1, [&](Range range) {
    f(p, Range{split(items, heads, range.begin, parts), split(items, heads, range.end, parts)});
  });
}

// Whether every row (or key) of the tensor belongs to a sequence, none to two; `packed`: the sequences share one batch
// entry.
bool covered(const AttentionParams& p, bool packed, int64_t extent, int64_t Sequence::* begin,
             int64_t Sequence::* length) {
  int64_t end = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& own = p.sequences[b];
    if (own.*begin != end) return false;
    end += own.*length;
    if (!packed && end != extent) return false;
    if (!packed) end = 0;
  }
  return !packed || end == extent;
}

// `count` values of the accumulation dtype, if they are there.
void fill(DType dtype, void* x, int64_t count, double value) {
  if (x == nullptr) return;
  if (dtype == DType::kFloat64) {
    std::fill_n(static_cast<double*>(x), count, value);
  } else {
    std::fill_n(static_cast<float*>(x), count, static_cast<float>(value));
  }
}

int64_t rows_of(const Sequence& own) { return own.rows; }
int64_t keys_of(const Sequence& own) { return own.keys; }

// Whether `is` holds for some sequence; p.rows and p.keys become the largest of these. Without sequences all batch
// entries are one such.
template <class Is>
bool narrow(AttentionParams* p, const Is& is) {
  if (p->sequences == nullptr) return p->batch > 0 && is(Sequence{0, p->rows, 0, p->keys, p->diagonal});
  bool any = false;
  p->rows = p->keys = 0;
  for (int64_t b = 0; b < p->batch; ++b) {
    const Sequence& own = p->sequences[b];
    if (is(own)) any = true, p->rows = std::max(p->rows, own.rows), p->keys = std::max(p->keys, own.keys);
  }
  return any;
}

// The sequences of few rows, which `decodes` names: parts of their keys into p.partial, records of `size` values, then
// rows from these.
template <class Params, class F, class Decodes>
void run_decode(const KernelTable& table, Params p, ScalarType accumulation, int64_t size, const F& kernel,
                const Decodes& decodes) {
  if (!narrow(&p, decodes)) return;
  const int64_t part = table.attention_decode_keys, parts = std::max<int64_t>(1, blocks_of(p.keys, part));
  const Tensor partial = empty({p.batch * p.heads * p.rows, parts, size}, accumulation);
  p.partial = partial.mutable_data_ptr();
  if (p.partial == nullptr) return;
  const Items scoring = items_of(
      p, [&](const Sequence& own) { return decodes(own) && own.rows > 0 ? blocks_of(own.keys, part) : 0; },
      [&](const Sequence& own) { return std::min(part, own.keys); });
  for_items(p, p.heads_kv, blocks_of(p.keys, part), scoring, kernel);
  p.merge = true;
  const Items merging = items_of(
      p, [&](const Sequence& own) { return decodes(own) ? own.rows : 0; },
      [&](const Sequence& own) { return blocks_of(own.keys, part); });
  for_items(p, p.heads, p.rows, merging, kernel);
}

// out, and p.lse and p.statistics where these are wanted; q_in has the memory order that out shall have.
Tensor run_forward(const KernelTable& table, AttentionParams& p, const Tensor& q, const Tensor& q_in) {
  const int64_t batch = q.size(0), rows = q.size(2);
  Tensor out = empty_in_order_of(q_in, p.head_dim_v);
  p.out = out.mutable_data_ptr();
  set_strides(out, p.out_stride);
  if (p.sequences != nullptr) {
    if (batch == 1) p.out_stride[0] = 0;
    if (!covered(p, batch == 1, rows, &Sequence::q_begin, &Sequence::rows)) {
      torch::stable::zero_(out);
      const int64_t count = batch * p.heads * rows;
      fill(p.dtype, p.lse, count, -std::numeric_limits<double>::infinity());
      if (p.statistics != nullptr) std::fill_n(static_cast<float*>(p.statistics), 2 * count, 0.0f);
    }
  }

  const auto decodes = [few = p.dropout.threshold == 0](const Sequence& own) { return few && own.rows <= kDecodeRows; };
  const auto by_blocks = [&](const Sequence& own) { return !decodes(own); };
  run_decode(table, p, accumulation_type(q.scalar_type()), p.head_dim_v + 2, table.attention_forward, decodes);
  if (!narrow(&p, by_blocks)) return out;
  const int64_t queries = table.attention_queries;
  const Items blocks =
      items_of(p, [&](const Sequence& own) { return by_blocks(own) ? blocks_of(own.rows, queries) : 0; }, keys_of);
  for_items(p, p.heads, blocks_of(p.rows, queries), blocks, table.attention_forward);
  return out;
}

}  // namespace

Tensor attention_inference(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& attn_mask,
                           const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
                           int64_t window_left, int64_t window_right, int64_t diagonal, double softcap,
                           double dropout_p, const OptionalTensor& rng_state, const OptionalTensor& sequences,
                           const OptionalTensor& block_table, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  AttentionParams p = make_params({q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table},
                                  {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  return run_forward(kernels_of(q, reduced_precision), p, q, q_in);
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                     const OptionalTensor& attn_mask,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     double softmax_scale, int64_t window_left, int64_t window_right,
                                                     int64_t diagonal, double softcap, double dropout_p,
                                                     const OptionalTensor& rng_state, const OptionalTensor& sequences,
                                                     const OptionalTensor& block_table, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  AttentionParams p = make_params({q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table},
                                  {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  const auto [lse, statistics] = allocate_statistics(p, q, empty);
  const Tensor out = run_forward(kernels_of(q, reduced_precision), p, q, q_in);
  return {out, lse, statistics};
}

namespace {

// How long `items` equal parts of one whole take on the threads, if the whole takes 1 on one.
double time_of(int64_t items, int64_t threads) {
  return static_cast<double>(blocks_of(items, threads)) / std::max<int64_t>(1, items);
}

// Whether (b, kv head) items, at five products a block, take no longer than the two finer stages, at three and four.
bool heads_fill_threads(const KernelTable& table, const AttentionParams& p) {
  const int64_t heads = p.batch * p.heads_kv, threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  if (p.sequences != nullptr && threads > 1) {
    double total = 0, largest = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const double scores = static_cast<double>(p.sequences[b].rows) * p.sequences[b].keys;
      total += scores * p.heads_kv, largest = std::max(largest, scores);
    }
    return 5 * (total + threads * largest) <= 7 * total;
  }
  const int64_t query_items = p.batch * p.heads * blocks_of(p.rows, table.attention_queries);
  const int64_t key_items = heads * blocks_of(p.keys, table.attention_keys);
  return 5 * time_of(heads, threads) <= 3 * time_of(query_items, threads) + 4 * time_of(key_items, threads);
}

void run_stage(const KernelTable& table, AttentionBackwardParams p, AttentionStage stage, int64_t items) {
  p.stage = stage;
  if (stage != AttentionStage::kFinish) p.slope_rows = p.delta = nullptr;
  parallel_chunks(items, 1, [&](Range range) { table.attention_backward(p, range); });
}

// The sequences that `takes` names, whole heads at a time, or dq and the row sums by query blocks, then dk and dv by
// key blocks.
template <class Takes>
void run_by_blocks(const KernelTable& table, AttentionBackwardParams p, const Takes& takes) {
  if (!narrow(&p, takes)) return;
  if (heads_fill_threads(table, p)) {
    const auto scores = [](const Sequence& own) { return own.rows * own.keys; };
    p.stage = AttentionStage::kAll;
    const Items heads = items_of(p, [&](const Sequence& own) { return takes(own) ? 1 : 0; }, scores);
    for_items(p, p.heads_kv, 1, heads, table.attention_backward);
    return;
  }
  const int64_t queries = table.attention_queries, keys = table.attention_keys;
  const Items query_blocks =
      items_of(p, [&](const Sequence& own) { return takes(own) ? blocks_of(own.rows, queries) : 0; }, keys_of);
  p.stage = AttentionStage::kQueries;
  for_items(p, p.heads, blocks_of(p.rows, queries), query_blocks, table.attention_backward);
  const Items key_blocks =
      items_of(p, [&](const Sequence& own) { return takes(own) ? blocks_of(own.keys, keys) : 0; }, rows_of);
  p.stage = AttentionStage::kKeys;
  p.slope_rows = p.delta = nullptr;
  for_items(p, p.heads_kv, blocks_of(p.keys, keys), key_blocks, table.attention_backward);
}

// Zeroes what no sequence covers; what two share has no gradient that is well defined.
void zero_uncovered(const AttentionBackwardParams& p, const AttentionInputs& x, AttentionGradients& gradients) {
  if (p.sequences == nullptr) return;
  const bool q_packed = x.q.size(0) == 1, k_packed = x.k.size(0) == 1;
  for (int64_t b = 1; b < p.batch; ++b) {
    const Sequence &own = p.sequences[b], &before = p.sequences[b - 1];
    FASTATTN_CHECK((!q_packed || own.q_begin >= before.q_begin + before.rows) &&
                       (!k_packed || own.k_begin >= before.k_begin + before.keys),
                   "attention: sequences: backward needs packed sequences one after the other");
  }
  if (!covered(p, q_packed, x.q.size(2), &Sequence::q_begin, &Sequence::rows)) {
    torch::stable::zero_(std::get<0>(gradients));
  }
  if (!covered(p, k_packed, x.k.size(2), &Sequence::k_begin, &Sequence::keys)) {
    torch::stable::zero_(std::get<1>(gradients));
    torch::stable::zero_(std::get<2>(gradients));
  }
}

}  // namespace

AttentionGradients attention_backward(const Tensor& dout_in, const OptionalTensor& dlse_in, const Tensor& q_in,
                                      const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
                                      const Tensor& lse_in, const OptionalTensor& attn_mask,
                                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                      double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
                                      double softcap, double dropout_p, const OptionalTensor& rng_state, bool mask_grad,
                                      bool slopes_grad, bool sinks_grad, const OptionalTensor& sequences,
                                      const OptionalTensor& statistics_in, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor dout = unit_last_stride(dout_in), out = unit_last_stride(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const bool kept = statistics_in.has_value() && statistics_in->numel() > 0;
  const OptionalTensor statistics = kept ? contiguous_or_none(statistics_in) : OptionalTensor(std::nullopt);
  const OptionalTensor dlse = contiguous_or_none(dlse_in), block_table = std::nullopt;
  const AttentionInputs inputs{q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table};
  const AttentionUpstream upstream{dout, dlse, out, lse, statistics, mask_grad, slopes_grad, sinks_grad};
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) =
      make_params(inputs, {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  set_upstream(p, inputs, upstream);
  AttentionGradients gradients = allocate_gradients(p, inputs, upstream, empty);
  zero_uncovered(p, inputs, gradients);
  const ScalarType accumulation = accumulation_type(q.scalar_type());
  const Tensor delta = empty({q.size(0), p.heads, sinks_grad ? q.size(2) : 0}, accumulation);
  const Tensor slope_rows = empty({q.size(0), p.heads, slopes_grad ? q.size(2) : 0}, accumulation);
  if (sinks_grad) p.delta = delta.mutable_data_ptr();
  if (slopes_grad) p.slope_rows = slope_rows.mutable_data_ptr();

  const KernelTable& table = kernels_of(q, reduced_precision);
  // Too few rows of a kv head to be lanes.
  const int64_t most = p.dropout.threshold == 0 && p.heads > 0 ? kDecodeRows * p.heads_kv / p.heads : 0;
  const auto decodes = [&](const Sequence& own) { return own.rows > 0 && own.keys > 0 && own.rows <= most; };
  run_decode(table, p, accumulation, p.head_dim + 1, table.attention_backward, decodes);
  run_by_blocks(table, p, [&](const Sequence& own) { return !decodes(own); });

  if (mask_grad) {
    const int64_t* extent = p.mask_extent;
    run_stage(table, p, AttentionStage::kMask,
              extent[0] * extent[1] * blocks_of(extent[2], table.attention_queries) *
                  blocks_of(extent[3], table.attention_keys));
  }
  if (slopes_grad && p.batch == 0) torch::stable::zero_(std::get<4>(gradients));
  if (slopes_grad || sinks_grad) run_stage(table, p, AttentionStage::kFinish, p.heads);
  return gradients;
}

Tensor attention_weights(const Tensor& q_in, const Tensor& k_in, const Tensor& lse_in, const OptionalTensor& attn_mask,
                         const OptionalTensor& alibi_slopes, double softmax_scale, int64_t window_left,
                         int64_t window_right, int64_t diagonal, double softcap, double dropout_p,
                         const OptionalTensor& rng_state, bool average, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), lse = torch::stable::contiguous(lse_in);
  const OptionalTensor none = std::nullopt;
  AttentionWeightsParams p{};
  static_cast<AttentionParams&>(p) =
      make_params({q, k, k, attn_mask, alibi_slopes, none, none, none},
                  {softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state});
  set_weights_inputs(p, q, lse, average);
  const ScalarType type = q.scalar_type();
  const Tensor weights =
      average ? empty({p.batch, p.rows, p.keys}, type) : empty({p.batch, p.heads, p.rows, p.keys}, type);
  if (weights.numel() == 0) return weights;
  p.weights = weights.mutable_data_ptr();
  const KernelTable& table = kernels_of(q, reduced_precision);
  const int64_t items = p.batch * (average ? 1 : p.heads) * blocks_of(p.rows, table.attention_queries) *
                        blocks_of(p.keys, table.attention_weight_keys);
  parallel_chunks(items, 0, [&](Range range) { table.attention_weights(p, range); });
  return weights;
}

}  // namespace fastattn
