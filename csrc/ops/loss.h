// What the two operators of csrc/ops/loss.cpp and csrc/ops/linear_loss.cpp share: checks, the reduction over tokens.
#pragma once

#include "ops/tensor.h"

namespace fastattn {

enum Reduction : int64_t { kNone, kMean, kSum };  // fastattn.reference.loss.REDUCTIONS

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, softcap, z_loss;
  int64_t reduction;
};

// f(null pointer of the accumulation type).
template <class F>
inline void with_accumulator(DType dtype, F&& f) {
  dtype == DType::kFloat64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

// Checks target, class_weight and the options.
CrossEntropyParams make_loss(DType dtype, int64_t rows, int64_t classes, const Tensor& target,
                             const OptionalTensor& class_weight, ScalarType type, const LossOptions& options);

// What the sum over rows is divided by: with kMean the weights of the targets that count, else 1.
double denominator(const CrossEntropyParams& p, int64_t reduction);

// The scalar loss, in the order of rows whatever the number of threads; the rows themselves without reduction.
Tensor reduced(const CrossEntropyParams& p, const Tensor& row_loss, int64_t reduction, double total);

void set_statistics(CrossEntropyParams* p, const Tensor& statistics);
void check_statistics(const Tensor& statistics, int64_t rows, ScalarType type);
void check_upstream(const Tensor& dloss, int64_t rows, ScalarType type, int64_t reduction);

}  // namespace fastattn
