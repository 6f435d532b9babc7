#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {
namespace {

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
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

// Up to this many rows a call is a decoding step: the rest has too few lanes to fill.
constexpr int64_t kDecodeRows = 8;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Last stride 1, as the kernels need; any other order of the rest is read in place.
Tensor unit_last_stride(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

void set_strides(const Tensor& x, int64_t (&stride)[3]) {
  for (int i = 0; i < 3; ++i) stride[i] = x.stride(i);
}

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

// Reads `sequences` into p: from here on a batch entry is a sequence, rows and keys are the largest of any.
void set_sequences(AttentionParams& p, const Tensor& q, const Tensor& k, const OptionalTensor& sequences,
                   const OptionalTensor& block_table) {
  FASTATTN_CHECK(sequences.has_value() || !block_table.has_value(), "attention: block_table needs sequences");
  if (!sequences.has_value()) {
    FASTATTN_CHECK(k.size(0) == q.size(0), "attention: q, k and v differ in batch size");
    return;
  }
  const Tensor& table = *sequences;
  FASTATTN_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == 5 &&
                     table.is_contiguous(),
                 "attention: sequences is a contiguous int64 CPU tensor (sequences, 5)");
  const int64_t count = table.size(0);
  FASTATTN_CHECK(q.size(0) == count || q.size(0) == 1, "attention: sequences: q is batched by sequence or packed");
  p.batch = count, p.rows = p.keys = 0;
  p.sequences = static_cast<const Sequence*>(table.const_data_ptr());
  if (q.size(0) == 1) p.q_stride[0] = p.row_stride[0] = 0;
  int64_t capacity = k.size(2);
  if (block_table.has_value()) {
    FASTATTN_CHECK(block_table->is_cpu() && block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 &&
                       block_table->size(0) == count && block_table->is_contiguous() && k.size(2) > 0,
                   "attention: block_table is a contiguous int32 CPU tensor (sequences, pages of each)");
    p.block_table = block_table->const_data_ptr<int32_t>();
    p.max_pages = block_table->size(1), p.page_size = k.size(2);
    capacity *= p.max_pages;
  } else {
    FASTATTN_CHECK(k.size(0) == count || k.size(0) == 1, "attention: sequences: k is batched by sequence or packed");
    if (k.size(0) == 1) p.k_stride[0] = p.v_stride[0] = 0;
  }
  for (int64_t b = 0; b < count; ++b) {
    const Sequence& own = p.sequences[b];
    FASTATTN_CHECK(own.q_begin >= 0 && own.rows >= 0 && own.rows <= q.size(2) - own.q_begin,
                   "attention: sequences: rows outside q");
    FASTATTN_CHECK(own.k_begin >= 0 && own.keys >= 0 && own.keys <= capacity - own.k_begin,
                   "attention: sequences: keys outside k");
    FASTATTN_CHECK(p.mask == nullptr || (q.size(0) == count && k.size(0) == count && own.q_begin == 0 &&
                                         own.k_begin == 0 && p.block_table == nullptr),
                   "attention: attn_mask with packed or paged sequences");
    p.rows = std::max(p.rows, own.rows), p.keys = std::max(p.keys, own.keys);
  }
  if (p.block_table != nullptr) check_pages(p, k.size(0));
}

AttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask,
                            const OptionalTensor& slopes, const OptionalTensor& sinks, const OptionalTensor& sequences,
                            const OptionalTensor& block_table) {
  check_inputs(q, k, v);
  AttentionParams p{};
  p.dtype = p.mask_dtype = dtype_of(q);
  FASTATTN_CHECK(p.dtype != DType::kBool, "attention: q is bool");
  p.batch = q.size(0), p.heads = q.size(1), p.heads_kv = k.size(1);
  p.rows = q.size(2), p.keys = k.size(2), p.head_dim = q.size(3), p.head_dim_v = v.size(3);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  set_strides(q, p.q_stride), set_strides(k, p.k_stride), set_strides(v, p.v_stride);
  p.row_stride[0] = p.heads * p.rows, p.row_stride[1] = p.rows;
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
  set_sequences(p, q, k, sequences, block_table);
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
  AttentionParams p = make_params(q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);
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
  AttentionParams p = make_params(q, k, v, attn_mask, alibi_slopes, sinks, sequences, block_table);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);
  const ScalarType type = q.scalar_type(), wide = accumulation_type(type);
  const Tensor lse = empty({q.size(0), p.heads, q.size(2)}, wide);
  const bool keeps = type == ScalarType::Float;
  const Tensor statistics = keeps ? empty({2, q.size(0), p.heads, q.size(2)}, wide) : empty({0}, wide);
  p.lse = lse.mutable_data_ptr();
  if (keeps) p.statistics = statistics.mutable_data_ptr(), p.statistics_stride = lse.numel();
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

// Sets p.dq, p.dk and p.dv; what no sequence covers has gradient 0, what two share has none that is well defined.
std::tuple<Tensor, Tensor, Tensor> input_gradients(AttentionBackwardParams& p, const Tensor& q, const Tensor& k) {
  const ScalarType type = q.scalar_type();
  Tensor dq = empty({q.size(0), p.heads, q.size(2), p.head_dim}, type);
  Tensor dk = empty({k.size(0), p.heads_kv, k.size(2), p.head_dim}, type);
  Tensor dv = empty({k.size(0), p.heads_kv, k.size(2), p.head_dim_v}, type);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.key_stride[0] = p.heads_kv * k.size(2), p.key_stride[1] = k.size(2);
  if (p.sequences == nullptr) return {dq, dk, dv};
  const bool q_packed = q.size(0) == 1, k_packed = k.size(0) == 1;
  if (q_packed) p.out_stride[0] = p.dout_stride[0] = 0;
  if (k_packed) p.key_stride[0] = 0;
  for (int64_t b = 1; b < p.batch; ++b) {
    const Sequence &own = p.sequences[b], &before = p.sequences[b - 1];
    FASTATTN_CHECK((!q_packed || own.q_begin >= before.q_begin + before.rows) &&
                       (!k_packed || own.k_begin >= before.k_begin + before.keys),
                   "attention: sequences: backward needs packed sequences one after the other");
  }
  if (!covered(p, q_packed, q.size(2), &Sequence::q_begin, &Sequence::rows)) torch::stable::zero_(dq);
  if (!covered(p, k_packed, k.size(2), &Sequence::k_begin, &Sequence::keys)) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  return {dq, dk, dv};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const OptionalTensor& dlse_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double softmax_scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, double dropout_p, const OptionalTensor& rng_state, bool mask_grad, bool slopes_grad,
    bool sinks_grad, const OptionalTensor& sequences, const OptionalTensor& statistics_in, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor dout = unit_last_stride(dout_in), out = unit_last_stride(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const bool kept = statistics_in.has_value() && statistics_in->numel() > 0;
  const OptionalTensor statistics =
      kept ? OptionalTensor(torch::stable::contiguous(*statistics_in)) : OptionalTensor(std::nullopt);
  const OptionalTensor dlse = dlse_in.has_value() ? OptionalTensor(torch::stable::contiguous(*dlse_in)) : std::nullopt;
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) = make_params(q, k, v, attn_mask, alibi_slopes, sinks, sequences, std::nullopt);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);
  const ScalarType type = q.scalar_type(), accumulation = accumulation_type(type);
  for (const Tensor* x : {&dout, &out}) {
    FASTATTN_CHECK(x->dim() == 4 && x->size(0) == q.size(0) && x->size(1) == p.heads && x->size(2) == q.size(2) &&
                       x->size(3) == p.head_dim_v && x->scalar_type() == type,
                   "attention: dout and out are (batch, heads, rows, head_dim_v) in q's dtype");
  }
  FASTATTN_CHECK(lse.numel() == q.size(0) * p.heads * q.size(2) && lse.scalar_type() == accumulation,
                 "attention: lse is (batch, heads, rows) in the accumulation dtype");
  FASTATTN_CHECK(!kept || (type == ScalarType::Float && statistics->numel() == 2 * lse.numel() &&
                           statistics->scalar_type() == accumulation),
                 "attention: statistics is what forward returned for float32");
  FASTATTN_CHECK(!dlse.has_value() || (dlse->numel() == lse.numel() && dlse->scalar_type() == accumulation),
                 "attention: dlse is like lse");
  FASTATTN_CHECK(!mask_grad || (attn_mask.has_value() && p.mask_dtype != DType::kBool),
                 "attention: mask_grad needs an additive attn_mask");
  FASTATTN_CHECK(!slopes_grad || alibi_slopes.has_value(), "attention: slopes_grad needs alibi_slopes");
  FASTATTN_CHECK(!sinks_grad || sinks.has_value(), "attention: sinks_grad needs sinks");
  p.out = const_cast<void*>(out.const_data_ptr()), p.lse = const_cast<void*>(lse.const_data_ptr());
  p.statistics = const_cast<void*>(data_or_null(statistics)), p.statistics_stride = lse.numel();
  p.dout = dout.const_data_ptr(), p.dlse = data_or_null(dlse);
  set_strides(out, p.out_stride), set_strides(dout, p.dout_stride);

  const auto [dq, dk, dv] = input_gradients(p, q, k);
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

  Tensor dmask = none(q), dslopes = none(q), dsinks = none(q);
  if (mask_grad) {
    int64_t* extent = p.mask_extent;
    for (int i = 0; i < 4; ++i) extent[i] = attn_mask->size(i);
    dmask = empty({extent[0], extent[1], extent[2], extent[3]}, attn_mask->scalar_type());
    p.dmask = dmask.mutable_data_ptr();
    run_stage(table, p, AttentionStage::kMask,
              extent[0] * extent[1] * blocks_of(extent[2], table.attention_queries) *
                  blocks_of(extent[3], table.attention_keys));
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
  if (slopes_grad || sinks_grad) run_stage(table, p, AttentionStage::kFinish, p.heads);
  return {dq, dk, dv, dmask, dslopes, dsinks};
}

Tensor attention_weights(const Tensor& q_in, const Tensor& k_in, const Tensor& lse_in, const OptionalTensor& attn_mask,
                         const OptionalTensor& alibi_slopes, double softmax_scale, int64_t window_left,
                         int64_t window_right, int64_t diagonal, double softcap, double dropout_p,
                         const OptionalTensor& rng_state, bool average, bool reduced_precision) {
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), lse = torch::stable::contiguous(lse_in);
  AttentionWeightsParams p{};
  static_cast<AttentionParams&>(p) =
      make_params(q, k, k, attn_mask, alibi_slopes, std::nullopt, std::nullopt, std::nullopt);
  set_scalars(p, softmax_scale, window_left, window_right, diagonal, softcap, dropout_p, rng_state);
  const ScalarType type = q.scalar_type();
  FASTATTN_CHECK(lse.numel() == p.batch * p.heads * p.rows && lse.scalar_type() == accumulation_type(type),
                 "attention_weights: lse is (batch, heads, rows) in the accumulation dtype");
  const Tensor weights =
      average ? empty({p.batch, p.rows, p.keys}, type) : empty({p.batch, p.heads, p.rows, p.keys}, type);
  if (weights.numel() == 0) return weights;
  FASTATTN_CHECK(p.heads > 0, "attention_weights: no heads to average over");
  p.lse = const_cast<void*>(lse.const_data_ptr());
  p.weights = weights.mutable_data_ptr();
  p.average = average;
  const KernelTable& table = kernels_of(q, reduced_precision);
  const int64_t items = p.batch * (average ? 1 : p.heads) * blocks_of(p.rows, table.attention_queries) *
                        blocks_of(p.keys, table.attention_weight_keys);
  parallel_chunks(items, 0, [&](Range range) { table.attention_weights(p, range); });
  return weights;
}

}  // namespace fastattn
