// What travels from csrc/ops to a kernel: one plain struct per operation and direction. Raw pointers, strides in
// elements.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kBool };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The dtype of statistics and accumulators.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulate<T>::type;

// A half-open range of work items; what an item is, each kernel says.
struct Range {
  int64_t begin, end;
};

// Dropout (docs/numerics.md): element (row, column) of a call is dropped iff its Philox word is below `threshold` =
// round(p * 2^32); what is kept is multiplied by `scale` = 1 / (1 - p). threshold == 0 means no dropout.
struct Dropout {
  uint64_t seed = 0;
  uint32_t offset = 0;
  uint32_t threshold = 0;
  double scale = 1;
};

// y[b,h,n,:] = x[b,h,n,:] with the first 2*half_dim channels rotated by the angles of row n. Work item: (b, h, n)
// flattened.
struct RopeParams {
  DType dtype;
  int64_t batch, heads, rows, head_dim, half_dim;
  const void* x;  // (batch, heads, rows, head_dim), last stride 1
  int64_t x_stride[3];
  void* y;  // same shape, own strides
  int64_t y_stride[3];
  const void *cos, *sin;  // (1 | batch, rows, half_dim) in the accumulation dtype, contiguous; batch stride 0 if shared
  int64_t angle_stride_batch;
  bool interleaved;  // pairs (2i, 2i+1) instead of (i, i + half_dim)
  bool conjugate;    // rotate by the negative angle: the gradient
};

// c (M, N) (+)= a (M, K) · b through the micro-kernel, for tests and tuning: b is (K, N), or (N, K) if transposed. a is
// in the operand dtype's storage (rounded to `dtype`), c in the accumulation dtype.
struct GemmParams {
  DType dtype;
  int64_t M, N, K, lda, ldb, ldc;
  const void *a, *b;
  void* c;
  bool transposed, accumulate;
  int64_t repeats;  // products after one packing
};

// h = dropout(x) + residual, y = norm(h) row by row. Work item: a row. x and residual have unit column stride and their
// own row stride; every output is contiguous. weight and bias (columns,) in weight_dtype (dtype or float32), null where
// absent.
struct NormForwardParams {
  DType dtype, weight_dtype;
  int64_t rows, columns;
  const void *x, *residual;  // residual null: none
  int64_t x_stride, residual_stride;
  const void *weight, *bias;
  void *y, *h;        // h null when it would equal x (no residual, no dropout)
  void *mean, *rstd;  // (rows,) in the accumulation dtype; mean null for rms, both in inference
  double eps;
  bool rms;
  bool stream;  // y leaves the caches anyway: store past them
  Dropout dropout;
};

// The gradients. norm_backward's work item: a chunk of chunk_rows rows; norm_backward_reduce's, after all chunks: a
// column.
struct NormBackwardParams {
  DType dtype, weight_dtype;
  int64_t rows, columns, chunk_rows;
  const void *dy, *dh, *h;  // unit column stride; dh (the incoming gradient of h) may be null
  int64_t dy_stride, dh_stride, h_stride;
  const void* weight;
  const void *mean, *rstd;  // as norm_forward gave them
  void *dh_total, *dx;      // contiguous; dx null without dropout
  void *partial_dweight,
      *partial_dbias;     // (chunks, columns), accumulation dtype; null where not wanted, bias needs weight
  void *dweight, *dbias;  // (columns,) in weight_dtype; null where not wanted
  bool rms;
  bool stream;  // as above, dh_total; not with dropout, which reads it again
  Dropout dropout;
};

// One sequence of a call that has its own extents: rows [q_begin, q_begin + rows) and keys [k_begin, k_begin + keys) of
// its batch entry. The layout is that of a row of the operators' `sequences`.
struct Sequence {
  int64_t q_begin, rows, k_begin, keys, diagonal;
};

// softmax(score) v with every feature of fastattn.attention; the formulas are in attention_score-inl.h. Tensors are
// (batch, heads | heads_kv, rows | keys, channels) with unit last stride; strides below are of the first three extents.
struct AttentionParams {
  DType dtype, mask_dtype;
  int64_t batch, heads, heads_kv, rows, keys, head_dim, head_dim_v;
  const void *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const void* mask;        // null, bool (true = visible) or additive
  int64_t mask_stride[4];  // 0 where the mask's extent is 1
  const void* slopes;      // null or ALiBi slopes (1 | batch, heads) in the accumulation dtype, contiguous
  int64_t slopes_stride_batch;
  const void* sinks;  // null or (heads,) in the accumulation dtype
  double scale, softcap;
  int64_t window_left, window_right, diagonal;  // key j is visible to row i iff -left <= j - (i + diagonal) <= right
  Dropout dropout;
  double dropout_scale;  // 1 / (1 - p) in double
  void* out;             // (batch, heads, rows, head_dim_v)
  int64_t out_stride[3];
  void* lse;  // null or (batch, heads, rows), contiguous, in the accumulation dtype
  // Null or (2, batch, heads, rows): m and l of float32, with lse = log(l 2^m); statistics_stride from one to the
  // other.
  void* statistics;
  int64_t statistics_stride;
  int64_t row_stride[2];  // of lse and of all else that has one value per row: batch, head
  // Null, or for few rows (batch, heads, rows, key parts, 2 + head_dim_v): see attention_decode-inl.h; in backward
  // (..., 1 + head_dim): see attention_decode_backward-inl.h.
  void* partial;
  bool merge;  // second half of such a call

  // Null, or the extents of each of `batch` sequences; rows and keys are then the largest of any sequence, and the
  // batch strides are 0 for tensors that hold the sequences one after the other in one batch entry.
  const Sequence* sequences;
  const int64_t* items_before;   // (batch + 1,) with sequences: work items per head in the sequences before each
  int64_t first_row, first_key;  // q_begin and k_begin of the sequence at hand, 0 without
  // Null, or (batch, max_pages): k and v are (pages, heads_kv, page_size, channels), and key j of sequence b is row
  // j % page_size of page block_table[b * max_pages + j / page_size].
  const int32_t* block_table;
  int64_t max_pages, page_size;
};

// Probabilities exp(score - lse) after dropout, in q's dtype: (batch, heads, rows, keys) contiguous, or averaged over
// heads (batch, rows, keys). Work item: (b, head | 1, query block, attention_weight_keys keys). Without sequences; v is
// not read.
struct AttentionWeightsParams : AttentionParams {
  void* weights;
  bool average;
};

// What one call of the backward kernel computes, and so what its work items are.
enum class AttentionStage {
  kAll,      // (b, kv head): every gradient of q, k and v at five products a block
  kQueries,  // (b, head, query block): dq and the row sums, at three products
  kKeys,     // (b, kv head, key block): dk and dv, at four; together with kQueries bitwise equal to kAll
  kMask,     // (mask batch | 1, mask head | 1, query block | 1, key block | 1): dmask
  kFinish,   // head: dslopes and dsinks from the row sums
};

struct AttentionBackwardParams : AttentionParams {
  AttentionStage stage;
  const void* dout;
  int64_t dout_stride[3];
  const void* dlse;       // null or like lse
  void *dq, *dk, *dv;     // contiguous
  int64_t key_stride[2];  // of dk and dv in keys: batch, kv head
  void* dmask;            // null or contiguous, mask_extent[i] == 1 where the mask is broadcast
  int64_t mask_extent[4];
  void *dslopes, *dsinks;    // null or like slopes and sinks
  void *delta, *slope_rows;  // (batch, heads, rows) accumulators behind dsinks and dslopes
};

// In the order of fastattn.reference.ffn.ACTIVATIONS.
enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu };

// A (M, K) times B (K, N), row-major with leading dimensions; a transposed operand is stored as (K, M), or (N, K).
struct MatrixProduct {
  const void *a, *b;
  int64_t lda, ldb;
  bool a_transposed, b_transposed;
  void* packed;  // by `linear_pack`: all of the operand that Packs names
};

// What becomes of the sums. All matrices are (M, N) with leading dimension N.
enum class Epilogue : int {
  kStore,           // c = sum + bias[0] + residual
  kActivation,      // pre = sum + bias[0], gate = sum2 + bias[1]; c = dropout(act(pre)), or dropout(act(gate) * pre)
  kActivationGrad,  // sum is the gradient of c above: c again, and the gradients of pre and gate
};

// The operand of a product that is packed before it starts. kA, for few rows and a transposed B, computes the product
// turned over, Cᵀ = Bᵀ·Aᵀ, and leaves B as it is; with kNothing every work item packs the columns of B it needs, or
// streams them.
enum class Packs : int { kNothing, kA, kB };

// One or two products and an epilogue. Work item: a row_block x column_block piece of the result, column blocks
// fastest. The second product adds to the first's sums, or (second_apart) has its own.
struct LinearParams {
  DType dtype;
  int64_t M, N, K;
  int products;
  bool second_apart;
  MatrixProduct product[2];  // with second_apart of the same A
  Packs packs;
  int64_t row_block, column_block;  // column_block is a multiple of 64

  Epilogue epilogue;
  const void* bias[2];   // (N,) or null
  const void* residual;  // kStore: (M, N) or null
  void* c;               // null: not wanted
  void *pre, *gate;      // kActivation writes them unless null; kActivationGrad reads them (gate null: not gated)
  void *dpre, *dgate;    // kActivationGrad
  void *dpre_sums, *dgate_sums;  // kActivationGrad: (row blocks, N) column sums in the accumulation dtype, or null
  Activation activation;
  Dropout dropout;
  double dropout_scale;
  int64_t first_row;  // the row of the dropout mask that row 0 is
};

// Cross-entropy of rows of logits with class indices; the formulas are in loss-inl.h. Work item: a row. What has one
// value per row or class is in the accumulation dtype.
struct CrossEntropyParams {
  DType dtype;
  int64_t rows, classes;
  const void* logits;  // (rows, classes), unit column stride
  int64_t logits_stride;
  const int64_t* target;     // (rows,)
  const void* class_weight;  // (classes,) or null
  double class_weight_mean;  // 1 without class weights
  int64_t ignore_index;
  double label_smoothing, softcap, z_loss;
  void* loss;            // (rows,), 0 where ignored
  void *max, *log_sum;   // (rows,): largest (capped) logit, and log of the sum of exponentials relative to it
  const void* row_grad;  // backward: (rows,), gradient of each row's loss
  void* dlogits;         // backward: (rows, classes), contiguous
};

// The same for logits = x · weightᵀ + bias, of which a strip of classes exists at a time.
struct LinearLossParams {
  CrossEntropyParams loss;  // without logits and dlogits
  LinearParams product;  // the logits of the strip, and its part of the bias; column_block is the same for all strips
  int64_t first_class;   // of the strip
  void *block_max, *block_sum, *block_weighted;  // (blocks of column_block classes, rows): sums of each block
  int64_t block_stride;  // of block_max: rows, or 0 if `strip` is relative to the maximum of the whole row
  void* target_logit;    // (rows,)
  void* strip;  // (rows, strip's classes) in `dtype`: logits less their block's maximum, then their gradient; or null
  bool recompute;  // the gradient kernel fills `strip` itself
};

// c = base + scale · A·B. base is in the accumulation dtype, or null; c (which may be base) in the product's dtype or
// (wide) in its accumulation dtype.
struct ScaledProductParams {
  LinearParams product;
  double scale;
  const void* base;
  bool wide;
};

// sums[n] (+)= scale · sum over m of x (M, N), in `to`; x is in `from`. Work item: a column.
struct ColumnSumParams {
  DType from, to;
  int64_t M, N;
  const void* x;
  void* sums;
  double scale = 1;
  bool add = false;
};

}  // namespace fastattn
