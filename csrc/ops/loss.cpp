#include "ops/loss.h"

#include <algorithm>
#include <tuple>

#include "cpu/kernel_table.h"

namespace fastattn {
namespace {

// Below this many logits a thread's work is shorter than waking it up.
constexpr int64_t kLogitsPerThread = 32768;

template <class A>
double class_weight_at(const CrossEntropyParams& p, int64_t index) {
  return p.class_weight == nullptr ? 1.0 : static_cast<const A*>(p.class_weight)[index];
}

void set_class_weight_mean(CrossEntropyParams* p) {
  if (p->class_weight == nullptr) return;
  double sum = 0;
  with_accumulator(p->dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    for (int64_t c = 0; c < p->classes; ++c) sum += class_weight_at<A>(*p, c);
  });
  p->class_weight_mean = sum / static_cast<double>(p->classes);
}

// The parameters of logits (rows, classes), and the grain of parallel_for over them.
CrossEntropyParams make_cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& class_weight,
                                      const LossOptions& options, int64_t* grain) {
  FASTATTN_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && (logits.stride(1) == 1 || logits.size(1) == 1),
                 "cross_entropy: logits is not (tokens, classes) with unit last stride");
  CrossEntropyParams p =
      make_loss(dtype_of(logits), logits.size(0), logits.size(1), target, class_weight, logits.scalar_type(), options);
  set_class_weight_mean(&p);
  p.logits = logits.const_data_ptr(), p.logits_stride = logits.stride(0);
  *grain = std::max<int64_t>(kLogitsPerThread / p.classes, 1);
  return p;
}

}  // namespace

CrossEntropyParams make_loss(DType dtype, int64_t rows, int64_t classes, const Tensor& target,
                             const OptionalTensor& class_weight, ScalarType type, const LossOptions& options) {
  FASTATTN_CHECK(
      target.dim() == 1 && target.size(0) == rows && target.is_contiguous() && target.scalar_type() == ScalarType::Long,
      "cross_entropy: target is not a contiguous (tokens,) int64 tensor");
  FASTATTN_CHECK(!class_weight.has_value() ||
                     (class_weight->dim() == 1 && class_weight->size(0) == classes && class_weight->is_contiguous() &&
                      class_weight->scalar_type() == accumulation_type(type)),
                 "cross_entropy: class_weight is not a contiguous (classes,) tensor in the accumulation dtype");
  FASTATTN_CHECK(options.reduction >= kNone && options.reduction <= kSum, "cross_entropy: unknown reduction");
  CrossEntropyParams p = {};
  p.dtype = dtype;
  p.rows = rows, p.classes = classes;
  p.target = target.const_data_ptr<int64_t>();
  p.class_weight = data_or_null(class_weight);
  p.class_weight_mean = 1;
  p.ignore_index = options.ignore_index;
  p.label_smoothing = options.label_smoothing, p.softcap = options.softcap, p.z_loss = options.z_loss;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = p.target[row];
    FASTATTN_CHECK(index == p.ignore_index || (index >= 0 && index < classes), "cross_entropy: target[", row, "] is ",
                   index, ", out of bounds for ", classes, " classes");
  }
  return p;
}

double denominator(const CrossEntropyParams& p, int64_t reduction) {
  if (reduction != kMean) return 1;
  double total = 0;
  with_accumulator(p.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = 0; row < p.rows; ++row) {
      if (p.target[row] != p.ignore_index) total += class_weight_at<A>(p, p.target[row]);
    }
  });
  return total;
}

Tensor reduced(const CrossEntropyParams& p, const Tensor& row_loss, int64_t reduction, double total) {
  if (reduction == kNone) return row_loss;
  const Tensor loss = empty({}, row_loss.scalar_type());
  with_accumulator(p.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const A* rows = row_loss.const_data_ptr<A>();
    double sum = 0;
    for (int64_t row = 0; row < p.rows; ++row) sum += rows[row];
    *loss.mutable_data_ptr<A>() = static_cast<A>(sum / total);
  });
  return loss;
}

void set_statistics(CrossEntropyParams* p, const Tensor& statistics) {
  char* const base = static_cast<char*>(const_cast<void*>(statistics.const_data_ptr()));
  p->max = base, p->log_sum = base + p->rows * statistics.element_size();
}

void check_statistics(const Tensor& statistics, int64_t rows, ScalarType type) {
  FASTATTN_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == rows &&
                     statistics.is_contiguous() && statistics.scalar_type() == type,
                 "cross_entropy: statistics is not a contiguous (2, tokens) tensor in the accumulation dtype");
}

void check_upstream(const Tensor& dloss, int64_t rows, ScalarType type, int64_t reduction) {
  FASTATTN_CHECK((reduction == kNone ? dloss.dim() == 1 && dloss.size(0) == rows : dloss.dim() == 0) &&
                     dloss.is_contiguous() && dloss.scalar_type() == type,
                 "cross_entropy: dloss does not fit the loss");
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& class_weight, int64_t ignore_index,
                                                 double label_smoothing, double softcap, double z_loss,
                                                 int64_t reduction) {
  const ScalarType wide = accumulation_type(logits.scalar_type());
  const LossOptions options = {ignore_index, label_smoothing, softcap, z_loss, reduction};
  int64_t grain = 1;
  CrossEntropyParams p = make_cross_entropy(logits, target, class_weight, options, &grain);
  const Tensor row_loss = empty({p.rows}, wide), statistics = empty({2, p.rows}, wide);
  p.loss = row_loss.mutable_data_ptr();
  set_statistics(&p, statistics);
  const KernelTable& table = kernels();
  parallel_for(p.rows, grain, [&](Range range) { table.cross_entropy_forward(p, range); });
  return {reduced(p, row_loss, reduction, denominator(p, reduction)), statistics};
}

Tensor cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& class_weight, const Tensor& statistics, int64_t ignore_index,
                              double label_smoothing, double softcap, double z_loss, int64_t reduction) {
  const ScalarType type = logits.scalar_type(), wide = accumulation_type(type);
  const LossOptions options = {ignore_index, label_smoothing, softcap, z_loss, reduction};
  int64_t grain = 1;
  CrossEntropyParams p = make_cross_entropy(logits, target, class_weight, options, &grain);
  check_statistics(statistics, p.rows, wide);
  check_upstream(dloss, p.rows, wide, reduction);
  const Tensor dlogits = empty({p.rows, p.classes}, type), row_grad = empty({p.rows}, wide);
  const double total = denominator(p, reduction);
  with_accumulator(p.dtype, [&](auto* accumulator) {
    using A = std::remove_pointer_t<decltype(accumulator)>;
    const A* upstream = dloss.const_data_ptr<A>();
    A* grad = row_grad.mutable_data_ptr<A>();
    for (int64_t row = 0; row < p.rows; ++row) {
      grad[row] = reduction == kNone ? upstream[row] : static_cast<A>(*upstream / total);
    }
  });
  p.row_grad = row_grad.const_data_ptr();
  p.dlogits = dlogits.mutable_data_ptr();
  set_statistics(&p, statistics);
  const KernelTable& table = kernels();
  parallel_for(p.rows, grain, [&](Range range) { table.cross_entropy_backward(p, range); });
  return dlogits;
}

}  // namespace fastattn
