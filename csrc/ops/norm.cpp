#include "ops/norm.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernel_table.h"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace fastattn {

namespace {

// Below this many elements a thread's work is shorter than waking it up.
constexpr int64_t kElementsPerThread = 32768;

// Rows of a chunk of the weight gradients: a function of the shape alone, so that results never depend on threads. At
// most 256 chunks (their partial sums are read again at the end; with 64 the chains of additions in them lost 1.7 times
// what torch's sums lose), of at least 16 rows (so that partial sums are little traffic).
int64_t chunk_rows(int64_t rows, int64_t, int) { return std::max<int64_t>((rows + 255) / 256, 16); }

int64_t last_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t{32} << 20;
}

// Where the `matrices` of x's shape that a call reads and writes outgrow the last cache, the result is not in it when
// it is read, and stores past the caches spare reading what they overwrite. 8192 x 768 on two Zen 5 cores: float32
// forward 1.30 to 0.95 ms and backward 2.29 to 1.63, bfloat16 backward 0.88 to 0.69; bfloat16 forward, which fits, lost
// a fifth.
template <class Params>
bool outgrows_cache(const Params& p, const Tensor& x, int64_t matrices) {
  static const int64_t limit = last_cache_bytes();
  return matrices * p.rows * p.columns * static_cast<int64_t>(x.element_size()) > limit;
}

void run_forward(const NormForwardParams& p) {
  const KernelTable& table = kernels();
  const int64_t grain = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(p.columns, 1), 1);
  parallel_for(p.rows, grain, [&](Range range) { table.norm_forward(p, range); });
}

}  // namespace

NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state) {
  NormForwardParams p;
  const NormResults results =
      prepare_norm_forward(x, residual, weight, bias, eps, rms, make_dropout(dropout_p, rng_state), &p, empty);
  p.stream = outgrows_cache(p, x, p.h == nullptr ? 2 : p.residual == nullptr ? 3 : 4);
  run_forward(p);
  return results;
}

Tensor norm_inference(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t columns,
                      double eps, bool rms) {
  const int64_t last = x.dim() - 1;
  FASTATTN_CHECK(last >= 0 && x.size(last) == columns && x.scalar_type() != ScalarType::Bool,
                 "norm: x is not a floating tensor of `columns` columns");
  FASTATTN_CHECK(x.is_contiguous() || (last == 1 && has_unit_columns(x)), "norm: x has no rows of one stride");
  FASTATTN_CHECK(std::isfinite(eps) && eps >= 0, "norm: eps is not a finite number >= 0");
  check_parameters(weight, bias, x, columns);
  NormForwardParams p;
  p.dtype = dtype_of(x), p.columns = columns, p.rows = columns > 0 ? x.numel() / columns : 0;
  const OptionalTensor& parameter = weight.has_value() ? weight : bias;
  p.weight_dtype = parameter.has_value() ? parameter_dtype(parameter->scalar_type(), x) : p.dtype;
  const Tensor y = empty(Shape(x, columns), x.scalar_type());
  p.x = x.const_data_ptr(), p.x_stride = last == 1 ? x.stride(0) : columns;
  p.residual = nullptr, p.residual_stride = 0, p.h = p.mean = p.rstd = nullptr;
  p.weight = data_or_null(weight), p.bias = data_or_null(bias), p.y = y.mutable_data_ptr();
  p.eps = eps, p.rms = rms, p.stream = outgrows_cache(p, x, 2);
  run_forward(p);
  return y;
}

NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad) {
  NormBackwardParams p;
  std::tuple<Tensor, Tensor> partials;
  const NormResults results =
      prepare_norm_backward(dy, dh, h, weight, mean, rstd, rms, make_dropout(dropout_p, rng_state), weight_grad,
                            bias_grad, &p, &partials, empty, chunk_rows);
  p.stream = p.dropout.threshold == 0 && outgrows_cache(p, h, p.dh == nullptr ? 3 : 4);
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
