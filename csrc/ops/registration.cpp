// The catalogue: which C++ function implements which operator on the CPU. Schemas are in fastattn/ops/_library.py.
#include "ops/tensor.h"

namespace fastattn {
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate);
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("rope", TORCH_BOX(&fastattn::rope));
}
