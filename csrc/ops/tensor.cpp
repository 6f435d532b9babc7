#include "ops/tensor.h"

#include <cmath>

namespace fastattn {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Bool: return DType::kBool;
    default: break;
  }
  FASTATTN_CHECK(false, "dtype is not float64, float32, float16, bfloat16 or bool");
  return DType::kBool;
}

ScalarType accumulation_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
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
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

}  // namespace fastattn
