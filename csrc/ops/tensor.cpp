#include "ops/tensor.h"

#include <cmath>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {

namespace {

// Outputs from this size on come from fresh pages on every call, and touching 4 KiB pages one by one takes longer than
// the kernels: 2.3 GB/s against 12 GB/s with 2 MiB pages (2-core virtual machine). Where the system leaves that choice
// to programs, take them.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeFrom = 2 * kHugePage;

void prefer_huge_pages(const Tensor& x) {
#if defined(__linux__)
  const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
  if (bytes < kHugeFrom) return;
  const size_t begin = (reinterpret_cast<size_t>(x.mutable_data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const size_t end = (reinterpret_cast<size_t>(x.mutable_data_ptr()) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      break;
  }
  FASTATTN_CHECK(false, "dtype is not float64, float32, float16, bfloat16 or bool");
  return DType::kBool;
}

ScalarType accumulation_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  const Tensor x = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
  prefer_huge_pages(x);
  return x;
}

Dropout make_dropout(double p, const OptionalTensor& rng_state) {
  Dropout dropout;
  if (p <= 0) return dropout;
  FASTATTN_CHECK(p < 1, "dropout_p is not in [0, 1)");
  FASTATTN_CHECK(rng_state.has_value() && rng_state->is_cpu() && rng_state->scalar_type() == ScalarType::Long &&
                     rng_state->numel() == 2 && rng_state->is_contiguous(),
                 "dropout_p > 0 needs rng_state, an int64 CPU tensor (seed, offset)");
  const int64_t* state = rng_state->const_data_ptr<int64_t>();
  dropout.seed = static_cast<uint64_t>(state[0]);
  dropout.offset = static_cast<uint32_t>(state[1]);
  dropout.threshold = static_cast<uint32_t>(std::floor(p * 4294967296.0));
  dropout.scale = 1.0 / (1.0 - p);
  return dropout;
}

}  // namespace fastattn
