#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/scratch.h"
#include "ops/linear.h"
#include "ops/loss.h"

namespace fastattn {
namespace {

void check_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const ScalarType type = x.scalar_type();
  check_matrix(x, type, "linear_cross_entropy: x is not a contiguous matrix");
  check_matrix(weight, type, "linear_cross_entropy: weight is not a contiguous matrix of x's dtype");
  FASTATTN_CHECK(weight.size(0) >= 1 && weight.size(1) == x.size(1),
                 "linear_cross_entropy: weight is not (classes, channels)");
  check_bias(bias, weight.size(0), type, "linear_cross_entropy");
}

struct Gradients {
  Tensor dx, dweight, dbias;  // (0,): not wanted
};
Gradients allocate(const Tensor& x, const Tensor& weight, bool x_grad, bool weight_grad, bool bias_grad) {
  const ScalarType type = x.scalar_type();
  const Gradients g = {x_grad ? empty({x.size(0), x.size(1)}, type) : none(x),
                       weight_grad ? empty({weight.size(0), weight.size(1)}, type) : none(x),
                       bias_grad ? empty({weight.size(0)}, type) : none(x)};
  if (x.size(0) > 0) return g;
  // Without tokens nothing is added to these.
  for (Tensor sum : {g.dweight, g.dbias}) torch::stable::zero_(sum);
  return g;
}

// The gradient of the rows' losses as row_grad times the returned factor, which is applied to sums in the accumulation
// dtype: what is rounded to 16 bits on the way is of the size of a probability. dloss null: a reduced loss with 1.
double split_upstream(const CrossEntropyParams& p, const Tensor* dloss, const Tensor& row_grad, int64_t reduction) {
  double scale = 1;
  with_accumulator(p.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const A unit = 1, *upstream = dloss == nullptr ? &unit : dloss->const_data_ptr<A>();
    A* grad = row_grad.mutable_data_ptr<A>();
    if (reduction != kNone) {
      std::fill_n(grad, p.rows, A(1));
      const double total = denominator(p, reduction);
      scale = total == 0 ? 0 : *upstream / total;  // every token ignored: nothing has a gradient
      return;
    }
    A most = 0;
    for (int64_t row = 0; row < p.rows; ++row) most = std::max(most, std::abs(upstream[row]));
    if (most > 0 && std::isfinite(most)) scale = std::exp2(std::ilogb(most));
    for (int64_t row = 0; row < p.rows; ++row) grad[row] = static_cast<A>(upstream[row] / scale);
  });
  return scale;
}

// The order of a linear cross-entropy (Wijmans et al., "Cut your losses in large-vocabulary language models", 2025; the
// gradient in the forward pass: Hsu et al., "Liger kernel", 2024). Logits exist for a strip of classes at a time:
//
//   first pass, strip by strip:   logits, their sums per row and block of classes         2 T V d operations
//   second pass, strip by strip:  their gradient G, in place;  dx += G W;  dW = Gᵀ x      4 T V d
//
// The second pass needs every row's whole sum, so what the first does not keep is computed again. Nothing is where all
// strips of a chunk of tokens are kept, and dW is added up over the chunks in the accumulation dtype; where that needs
// a copy of dW that does not fit, one chunk has all tokens, and as many of its strips are kept as fit. What is computed
// again is rounded as what is kept: the results of a token are the same bits either way.
constexpr int64_t kClassBlock = 512, kStrip = 5 * kClassBlock;  // of 5 KiB in 16 bits: no multiple of 4 KiB
// Columns of a work item of dx and dW: dW's turns over its rows of G once for all of them. And rows of any, at least.
constexpr int64_t kMostColumns = 768, kLeastRows = 32;
// All scratch together is at most this part of the logits in their dtype, from kLeastScratch on: less than a tenth of
// what log-softmax and its gradient hold, which is three times the logits.
constexpr double kLogitsPart = 0.25;
constexpr int64_t kLeastScratch = 16 << 20, kMostScratch = 512 << 20;
// Each chunk packs the weight twice and passes dW once; with fewer rows that takes longer than computing strips again.
constexpr int64_t kLeastChunk = 3 * kRowBlock;

class LinearLoss {
 public:
  // `loss` is of all tokens.
  LinearLoss(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const CrossEntropyParams& loss,
             bool reduced_precision)
      : table_(kernels_of(x, reduced_precision)),
        loss_(loss),
        rows_(x.size(0)),
        width_(x.size(1)),
        classes_(weight.size(0)),
        element_(static_cast<int64_t>(x.element_size())),
        wide_(std::max<int64_t>(element_, 4)),
        strips_(blocks_of(classes_, kStrip)),
        x_(static_cast<const char*>(x.const_data_ptr())),
        weight_(static_cast<const char*>(weight.const_data_ptr())),
        bias_(static_cast<const char*>(data_or_null(bias))) {}

  // The gradient of row t's loss is scale * loss.row_grad[t].
  void want(const Gradients& to, double scale) {
    const auto data = [](const Tensor& x) {
      return x.numel() == 0 ? nullptr : static_cast<char*>(x.mutable_data_ptr());
    };
    dx_ = data(to.dx), dweight_ = data(to.dweight), dbias_ = data(to.dbias);
    scale_ = scale;
  }
  bool wants_gradient() const { return dx_ != nullptr || dweight_ != nullptr || dbias_ != nullptr; }

  // Row losses and statistics, and the gradients that are wanted.
  void forward_and_backward() {
    first_pass_ = true;
    plan();
    each_chunk();
  }
  // The gradients from the statistics of an earlier forward.
  void backward() {
    first_pass_ = false;
    take_all_rows(0);
    each_chunk();
  }

 private:
  void plan();
  void take_all_rows(int64_t kept) { chunk_ = std::max<int64_t>(rows_, 1), kept_ = kept; }
  bool sums_dweight() const { return dweight_ != nullptr && element_ != wide_ && chunk_ < rows_; }
  int64_t strip_bytes() const { return chunk_ * std::min(kStrip, classes_) * element_; }
  size_t lay_out(void* base);
  void each_chunk();
  void sum_strips();
  void gradient_strips();
  LinearLossParams strip_at(int64_t strip) const;
  LinearParams product(int64_t M, int64_t N, int64_t K) const;
  void add_to_x(const LinearLossParams& strip, bool first, bool last) const;
  void add_to_weight(const LinearLossParams& strip) const;

  const KernelTable& table_;
  const CrossEntropyParams loss_;
  const int64_t rows_, width_, classes_, element_, wide_, strips_;
  const char *const x_, *const weight_, *const bias_;
  char *dx_ = nullptr, *dweight_ = nullptr, *dbias_ = nullptr;
  double scale_ = 1;
  bool first_pass_ = true;
  int64_t chunk_ = 0, kept_ = 0;  // rows of a chunk, and how many of its strips the first pass keeps

  // Of the chunk at hand.
  int64_t row_ = 0;
  CrossEntropyParams chunk_loss_ = {};
  LinearLossParams sums_ = {};
  char *packed_weight_ = nullptr, *packed_x_ = nullptr, *strip_buffers_ = nullptr;
  char *dx_sums_ = nullptr, *dweight_sums_ = nullptr;
};

LinearParams LinearLoss::product(int64_t M, int64_t N, int64_t K) const {
  LinearParams p = make_linear(loss_.dtype, M, N, K, Epilogue::kStore);
  // As many items for every thread, where a weight is packed for all rows: the bits do not depend on how they are cut.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t across = std::max<int64_t>(blocks_of(M, kRowBlock), 1);
  if (M > kRowBlock) across = std::max(across, std::min(blocks_of(across, threads) * threads, M / kLeastRows));
  p.row_block = std::max<int64_t>(blocks_of(M, across), 1);
  p.packs = M > kRowBlock ? Packs::kB : Packs::kNothing;
  const int64_t share = std::max<int64_t>(blocks_of(N * across, 4 * threads), 1);
  p.column_block = equal_columns(N, std::min(kMostColumns, share));
  return p;
}

// kernel(range) over the work items of a product.
template <class F>
void run_items(const LinearParams& p, const F& kernel) {
  parallel_chunks(blocks_of(p.M, p.row_block) * blocks_of(p.N, p.column_block), 0, kernel);
}

// The strip's logits as a product of the chunk at hand, not packed.
LinearLossParams LinearLoss::strip_at(int64_t strip) const {
  LinearLossParams p = sums_;
  p.first_class = strip * kStrip;
  p.product = product(chunk_loss_.rows, std::min(kStrip, classes_ - p.first_class), width_);
  p.product.product[0] = {
      x_ + row_ * width_ * element_, weight_ + p.first_class * width_ * element_, width_, width_, false, true, nullptr};
  p.product.column_block = kClassBlock;
  p.product.bias[0] = bias_ == nullptr ? nullptr : bias_ + p.first_class * element_;
  p.recompute = strip >= kept_;
  p.strip = strip_buffers_ + std::min(strip, kept_) * strip_bytes();
  return p;
}

// Scratch for one chunk, from `base` on; its size if that is null.
size_t LinearLoss::lay_out(void* base) {
  const LinearParams weight_rows = product(chunk_, kStrip, width_), weight_columns = product(chunk_, width_, kStrip);
  const LinearParams x_rows = product(kStrip, width_, chunk_);
  const size_t sums = first_pass_ ? blocks_of(classes_, kClassBlock) * chunk_ * wide_ : 0;
  const int64_t strips = wants_gradient() ? std::min(kept_ + 1, strips_) : 0;
  ScratchCursor cursor(base);
  packed_weight_ = cursor.take<char>(std::max(packed_bytes(table_, weight_rows), packed_bytes(table_, weight_columns)));
  packed_x_ = cursor.take<char>(dweight_ != nullptr ? packed_bytes(table_, x_rows) : 0);
  sums_.block_max = cursor.take<char>(sums);
  sums_.block_sum = cursor.take<char>(sums);
  sums_.block_weighted = cursor.take<char>(sums);
  sums_.target_logit = cursor.take<char>(chunk_ * wide_);
  dx_sums_ = cursor.take<char>(dx_ != nullptr && element_ != wide_ ? chunk_ * width_ * wide_ : 0);
  dweight_sums_ = cursor.take<char>(sums_dweight() ? classes_ * width_ * wide_ : 0);
  strip_buffers_ = cursor.take<char>(strips * strip_bytes());
  return cursor.take<char>(0) - static_cast<char*>(base);
}

void LinearLoss::plan() {
  if (!wants_gradient()) return take_all_rows(0);
  const auto limit = static_cast<size_t>(std::clamp<int64_t>(
      static_cast<int64_t>(kLogitsPart * rows_ * classes_ * element_), kLeastScratch, kMostScratch));
  const auto fits = [&](int64_t chunk, int64_t kept) {
    chunk_ = chunk, kept_ = kept;
    return lay_out(nullptr) <= limit;
  };
  if (fits(std::max<int64_t>(rows_, 1), strips_)) return;
  int64_t chunk = kRowBlock;
  while (chunk + kRowBlock < rows_ && fits(chunk + kRowBlock, strips_)) chunk += kRowBlock;
  // Column sums, for dbias, are rounded to 16 bits where they are added up.
  const bool rounds = dbias_ != nullptr || chunk < kLeastChunk || !fits(chunk, strips_);
  if (element_ == wide_ || !rounds) {
    chunk_ = std::min(chunk, rows_), kept_ = strips_;
    return;
  }
  int64_t kept = 0;
  while (fits(rows_, kept + 1)) ++kept;
  take_all_rows(kept);
}

void LinearLoss::each_chunk() {
  const CallScratch scratch(lay_out(nullptr));
  lay_out(scratch.data());
  for (row_ = 0; row_ < rows_; row_ += chunk_) {
    chunk_loss_ = loss_;
    chunk_loss_.rows = std::min(chunk_, rows_ - row_);
    chunk_loss_.target += row_;
    for (void** values : {&chunk_loss_.loss, &chunk_loss_.max, &chunk_loss_.log_sum}) {
      *values = static_cast<char*>(*values) + row_ * wide_;
    }
    chunk_loss_.row_grad = static_cast<const char*>(loss_.row_grad) + row_ * wide_;
    sums_.loss = chunk_loss_;
    sums_.block_stride = chunk_loss_.rows;
    if (!first_pass_) sums_.block_max = chunk_loss_.max, sums_.block_stride = 0;
    if (first_pass_) sum_strips();
    if (wants_gradient()) gradient_strips();
  }
}

void LinearLoss::sum_strips() {
  for (int64_t i = 0; i < strips_; ++i) {
    LinearLossParams strip = strip_at(i);
    if (strip.recompute) strip.strip = nullptr;
    pack(table_, &strip.product, packed_weight_);
    run_items(strip.product, [&](Range range) { table_.linear_loss_sums(strip, range); });
  }
  const LinearLossParams all = strip_at(0);
  parallel_for(chunk_loss_.rows, 64, [&](Range range) { table_.linear_loss_rows(all, range); });
}

void LinearLoss::gradient_strips() {
  LinearParams x_rows = product(kStrip, width_, chunk_loss_.rows);
  x_rows.product[0].b = x_ + row_ * width_ * element_, x_rows.product[0].ldb = width_;
  if (dweight_ != nullptr) pack(table_, &x_rows, packed_x_);
  for (int64_t i = 0; i < strips_; ++i) {
    LinearLossParams strip = strip_at(i);
    if (strip.recompute) pack(table_, &strip.product, packed_weight_);
    run_items(strip.product, [&](Range range) { table_.linear_loss_gradient(strip, range); });
    if (dx_ != nullptr) add_to_x(strip, i == 0, i == strips_ - 1);
    if (dweight_ != nullptr) add_to_weight(strip);
    if (dbias_ == nullptr) continue;
    const ColumnSumParams bias = {loss_.dtype,     loss_.dtype, chunk_loss_.rows,
                                  strip.product.N, strip.strip, dbias_ + strip.first_class * element_,
                                  scale_,          row_ > 0};
    parallel_for(strip.product.N, 64, [&](Range range) { table_.column_sums(bias, range); });
  }
}

// Sums over strips stay in the accumulation dtype until the last.
void LinearLoss::add_to_x(const LinearLossParams& strip, bool first, bool last) const {
  const int64_t classes = strip.product.N;
  char* const dx = dx_ + row_ * width_ * element_;
  char* const sums = element_ == wide_ ? dx : dx_sums_;
  ScaledProductParams p = {product(chunk_loss_.rows, width_, classes), scale_, first ? nullptr : sums, !last};
  p.product.product[0] = {strip.strip, weight_ + strip.first_class * width_ * element_, classes, width_, false, false,
                          nullptr};
  p.product.c = last ? dx : sums;
  pack(table_, &p.product, packed_weight_);
  run_items(p.product, [&](Range range) { table_.scaled_product(p, range); });
}

// Sums over chunks likewise.
void LinearLoss::add_to_weight(const LinearLossParams& strip) const {
  const int64_t classes = strip.product.N, at = strip.first_class * width_;
  const bool last = row_ + chunk_ >= rows_, wide = sums_dweight() && !last;
  char* const dweight = dweight_ + at * element_;
  char* const sums = sums_dweight() ? dweight_sums_ + at * wide_ : dweight;
  ScaledProductParams p = {product(classes, width_, chunk_loss_.rows), scale_, row_ > 0 ? sums : nullptr, wide};
  p.product.packs = Packs::kB;
  p.product.product[0] = {strip.strip, nullptr, classes, width_, true, false, packed_x_};
  p.product.c = wide ? sums : dweight;
  run_items(p.product, [&](Range range) { table_.scaled_product(p, range); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, int64_t reduction, bool x_grad, bool weight_grad,
    bool bias_grad, bool reduced_precision) {
  check_linear(x, weight, bias);
  FASTATTN_CHECK(reduction != kNone || !(x_grad || weight_grad || bias_grad),
                 "linear_cross_entropy: gradients in the forward pass need a reduction");
  const ScalarType type = x.scalar_type(), wide = accumulation_type(type);
  const LossOptions options = {ignore_index, label_smoothing, softcap, z_loss, reduction};
  CrossEntropyParams p = make_loss(dtype_of(x), x.size(0), weight.size(0), target, OptionalTensor(), type, options);
  const Tensor row_loss = empty({p.rows}, wide), statistics = empty({2, p.rows}, wide);
  p.loss = row_loss.mutable_data_ptr();
  set_statistics(&p, statistics);
  const double total = denominator(p, reduction);
  const Gradients gradients = allocate(x, weight, x_grad, weight_grad, bias_grad);
  const Tensor row_grad = empty({p.rows}, wide);
  const bool wanted = x_grad || weight_grad || bias_grad;
  const double scale = wanted ? split_upstream(p, nullptr, row_grad, reduction) : 1;
  p.row_grad = row_grad.const_data_ptr();
  LinearLoss linear(x, weight, bias, p, reduced_precision);
  linear.want(gradients, scale);
  linear.forward_and_backward();
  return {reduced(p, row_loss, reduction, total), statistics, gradients.dx, gradients.dweight, gradients.dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& dloss, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const Tensor& statistics, int64_t ignore_index, double label_smoothing, double softcap, double z_loss,
    int64_t reduction, bool x_grad, bool weight_grad, bool bias_grad, bool reduced_precision) {
  check_linear(x, weight, bias);
  const ScalarType type = x.scalar_type(), wide = accumulation_type(type);
  const LossOptions options = {ignore_index, label_smoothing, softcap, z_loss, reduction};
  CrossEntropyParams p = make_loss(dtype_of(x), x.size(0), weight.size(0), target, OptionalTensor(), type, options);
  check_statistics(statistics, p.rows, wide);
  check_upstream(dloss, p.rows, wide, reduction);
  set_statistics(&p, statistics);
  const Gradients gradients = allocate(x, weight, x_grad, weight_grad, bias_grad);
  const Tensor row_grad = empty({p.rows}, wide);
  const double scale = split_upstream(p, &dloss, row_grad, reduction);
  p.row_grad = row_grad.const_data_ptr();
  LinearLoss linear(x, weight, bias, p, reduced_precision);
  linear.want(gradients, scale);
  linear.backward();
  return {gradients.dx, gradients.dweight, gradients.dbias};
}

}  // namespace fastattn
