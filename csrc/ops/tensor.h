// The bridge from LibTorch's stable ABI to params.h: dtypes, pointers, strides, allocation, threads. csrc/ops only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>

#include "cpu/kernel_table.h"
#include "cpu/params.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Validation proper is in fastattn/ops (ValueError with names); these checks keep a direct torch.ops call from
// crashing.
#define FASTATTN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastattn: ", __VA_ARGS__)

DType dtype_of(const Tensor& x);
ScalarType accumulation_type(ScalarType type);  // float64 for float64, else float32

// What computes products of x's dtype; reduced_precision is that of SCHEMAS.
inline const KernelTable& kernels_of(const Tensor& x, bool reduced_precision) {
  return kernels(reduced_precision && x.scalar_type() == ScalarType::Float);
}

// The extents of a result.
struct Shape {
  static constexpr size_t kMostDims = 4;
  int64_t extent[kMostDims] = {};
  size_t dims = 0;

  Shape(std::initializer_list<int64_t> extents) {
    for (const int64_t n : extents) push(n);
  }
  // x's with `columns` in place of its last.
  Shape(const Tensor& x, int64_t columns) {
    const torch::headeronly::IntHeaderOnlyArrayRef of_x = x.sizes();
    for (size_t i = 0; i + 1 < of_x.size(); ++i) push(of_x[i]);
    push(columns);
  }
  operator torch::headeronly::IntHeaderOnlyArrayRef() const { return {extent, dims}; }

 private:
  void push(int64_t n) {
    FASTATTN_CHECK(dims < kMostDims, "a result of more than 4 dimensions");
    extent[dims++] = n;
  }
};

Tensor empty(const Shape& shape, ScalarType type);  // CPU

// (batch, heads, rows, channels), the first three those of x and in their memory order, as elementwise operators give.
Tensor empty_in_order_of(const Tensor& x, int64_t channels);
inline Tensor none(const Tensor& like) { return empty({0}, like.scalar_type()); }

inline const void* data_or_null(const OptionalTensor& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }
inline bool is_contiguous(const OptionalTensor& x) { return !x.has_value() || x->is_contiguous(); }

// rng_state: int64 (seed, offset).
Dropout make_dropout(double p, const OptionalTensor& rng_state);

// f(Range) over [0, items) on torch's threads; a thread gets at least `grain` items. The first exception reaches the
// caller as it was thrown: through torch's C interface it would arrive as "API call failed".
template <class F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  if (items <= 0) return;
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    try {
      f(Range{begin, end});
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failure);
}

constexpr int64_t kChunksPerThread = 4;

// The same where items differ in cost or threads in speed: threads take chunks as they get free, the last first (the
// last rows of a causal head see most keys). A chunk is of whole groups of `group` items, which share work, if there
// are enough of them.
template <class F>
void parallel_chunks(int64_t items, int64_t group, const F& f) {
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads <= 1) return parallel_for(items, items, f);
  int64_t size = (items + kChunksPerThread * threads - 1) / (kChunksPerThread * threads);
  if (group > 0 && items / group >= 2 * threads) size = (size + group - 1) / group * group;
  const int64_t chunks = (items + size - 1) / size;
  std::atomic<int64_t> left{chunks};
  parallel_for(std::min(threads, chunks), 1, [&](Range workers) {
    for (int64_t worker = workers.begin; worker < workers.end; ++worker) {
      for (int64_t chunk; (chunk = left.fetch_sub(1) - 1) >= 0;) {
        f(Range{chunk * size, std::min(items, (chunk + 1) * size)});
      }
    }
  });
}

}  // namespace fastattn
