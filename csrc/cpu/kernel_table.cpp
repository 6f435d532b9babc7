#include "cpu/kernel_table.h"

namespace fastattn {

const KernelTable& kernels_for(Isa isa, bool reduced_precision) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmxEmulated:
      return reduced_precision ? amx_emulated_reduced::kTable : amx_emulated::kTable;
    case Isa::kAmx:
      return reduced_precision ? amx_reduced::kTable : amx::kTable;
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

const KernelTable& kernels(bool reduced_precision) { return kernels_for(current_isa(), reduced_precision); }

}  // namespace fastattn
