#include "ops/norm.h"

#include <algorithm>

#include "cpu/kernel_table.h"

namespace fastattn {

namespace {

// Below this many elements a thread's work is shorter than waking it up.
constexpr int64_t kElementsPerThread = 32768;

// Rows of a chunk of the weight gradients: a function of the shape alone, so that results never depend on threads. At
// most 64 chunks (their partial sums are read again at the end), of at least 16 rows (so that partial sums are little
// traffic).
int64_t chunk_rows(int64_t rows, int64_t, int) { return std::max<int64_t>((rows + 63) / 64, 16); }

}  // namespace

NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state) {
  NormForwardParams p;
  const NormResults results =
      prepare_norm_forward(x, residual, weight, bias, eps, rms, make_dropout(dropout_p, rng_state), &p, empty);
  const KernelTable& table = kernels();
  const int64_t grain = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(p.columns, 1), 1);
  parallel_for(p.rows, grain, [&](Range range) { table.norm_forward(p, range); });
  return results;
}

NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad) {
  NormBackwardParams p;
  std::tuple<Tensor, Tensor> partials;
  const NormResults results =
      prepare_norm_backward(dy, dh, h, weight, mean, rstd, rms, make_dropout(dropout_p, rng_state), weight_grad,
                            bias_grad, &p, &partials, empty, chunk_rows);
  const KernelTable& table = kernels();
  const int64_t chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows, columns = std::max<int64_t>(p.columns, 1);
  const int64_t grain = std::max<int64_t>(kElementsPerThread / (columns * p.chunk_rows), 1);
  parallel_for(chunks, grain, [&](Range range) { table.norm_backward(p, range); });
  if (weight_grad || bias_grad) {
    const int64_t strip = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(chunks, 1), 64);
    parallel_for(p.columns, strip, [&](Range range) { table.norm_backward_reduce(p, range); });
  }
  return results;
}

}  // namespace fastattn
