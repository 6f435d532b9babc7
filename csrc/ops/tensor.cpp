#include "ops/tensor.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {

namespace {

// Outputs from this size on mostly come from fresh pages, and touching 4 KiB pages one by one takes longer than the
// kernels: 1.8 GB/s against 20 with 2 MiB pages (2-core virtual machine). Where the system leaves that choice to
// programs, take them, as long as they come quickly: a page that has to be put together first (compaction) or that a
// virtual machine's host has yet to supply takes milliseconds (3.3 measured, host memory; 4 KiB pages are then mostly
// ones that the process just gave back). So three of an output's pages are touched under a clock, and one beyond
// kSlowPage turns the request off for kAvoidSeconds.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeFrom = 2 * kHugePage;
constexpr auto kSlowPage = std::chrono::microseconds(600);  // as 512 small pages
constexpr auto kAvoidSeconds = std::chrono::seconds(4);

#if defined(__linux__)
using Clock = std::chrono::steady_clock;

bool system_leaves_the_choice() {
  char modes[64] = {};
  if (std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
    if (std::fgets(modes, sizeof modes, file) == nullptr) modes[0] = 0;
    std::fclose(file);
  }
  return std::strstr(modes, "[madvise]") != nullptr;
}

// Writes to the page at `address` and says whether that was quick.
bool comes_quickly(size_t address) {
  const Clock::time_point start = Clock::now();
  *reinterpret_cast<volatile char*>(address) = 0;
  return Clock::now() - start < kSlowPage;
}
#endif

void prefer_huge_pages(const Tensor& x) {
#if defined(__linux__)
  const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
  if (bytes < kHugeFrom) return;
  static const bool possible = system_leaves_the_choice();
  static std::atomic<Clock::rep> avoid_until{Clock::time_point::min().time_since_epoch().count()};
  const Clock::rep now = Clock::now().time_since_epoch().count();
  if (!possible || now < avoid_until.load(std::memory_order_relaxed)) return;

  const size_t data = reinterpret_cast<size_t>(x.mutable_data_ptr());
  const size_t begin = (data + kHugePage - 1) / kHugePage * kHugePage, end = (data + bytes) / kHugePage * kHugePage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  const size_t middle = begin + (end - begin) / kHugePage / 2 * kHugePage;
  if (comes_quickly(begin) && comes_quickly(middle) && comes_quickly(end - kHugePage)) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_NOHUGEPAGE);
  avoid_until = now + Clock::duration(kAvoidSeconds).count();
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

// Straight to the allocator: torch::stable::empty looks its operator up by name on every call, which takes 1 µs.
namespace {

Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef shape, const int64_t* stride, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), stride,
                                                  static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  const Tensor x(handle);
  prefer_huge_pages(x);
  return x;
}

}  // namespace

Tensor empty(const Shape& shape, ScalarType type) {
  int64_t stride[Shape::kMostDims];
  int64_t count = 1;
  for (size_t i = shape.dims; i-- > 0;) {
    stride[i] = count;
    count *= std::max<int64_t>(1, shape.extent[i]);
  }
  return allocate(shape, stride, type);
}

Tensor empty_in_order_of(const Tensor& x, int64_t channels) {
  const int64_t shape[4] = {x.size(0), x.size(1), x.size(2), channels};
  const int64_t width = std::max<int64_t>(1, channels);
  const int64_t heads = std::max<int64_t>(1, shape[1]) * width, rows = std::max<int64_t>(1, shape[2]) * width;
  const bool heads_inside = x.stride(1) < x.stride(2);
  const int64_t stride[4] = {std::max<int64_t>(1, shape[1]) * rows, heads_inside ? width : rows,
                             heads_inside ? heads : width, 1};
  return allocate({shape, 4}, stride, x.scalar_type());
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
