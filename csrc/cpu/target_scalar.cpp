// One lane per vector, any CPU.
#include "cpu/target_prelude.h"

#define FASTATTN_TARGET_VEC "cpu/vec_scalar.h"

namespace fastattn {
namespace scalar {
#include "cpu/table-inl.h"
}  // namespace scalar
}  // namespace fastattn
