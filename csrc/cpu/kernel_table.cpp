#include "cpu/kernel_table.h"

namespace fastattn {

const KernelTable& kernels_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmxEmulated:
      return amx_emulated::kTable;
    case Isa::kAmx:
      return amx::kTable;
    case Isa::kAvx512Bf16:
      return avx512_bf16::kTable;
    case Isa::kAvx512:
      return avx512::kTable;
    case Isa::kAvx2:
      return avx2::kTable;
#endif
    default:
      return scalar::kTable;
  }
}

const KernelTable& kernels() { return kernels_for(current_isa()); }

}  // namespace fastattn
