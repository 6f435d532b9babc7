// One table of kernels per ISA, all from the same source (target_*.cpp). Operators call through kernels().
#pragma once

#include "cpu/isa.h"
#include "cpu/params.h"

namespace fastattn {

struct KernelTable {
  void (*rope)(const RopeParams&, Range);
  void (*gemm)(const GemmParams&);

  void (*norm_forward)(const NormForwardParams&, Range);
  void (*norm_backward)(const NormBackwardParams&, Range);
  void (*norm_backward_reduce)(const NormBackwardParams&, Range);

  // Rows and keys of one block, and keys of a part of a decoding step: what attention's work items count.
  int64_t attention_queries, attention_keys, attention_decode_keys;
  void (*attention_forward)(const AttentionParams&, Range);
  void (*attention_backward)(const AttentionBackwardParams&, Range);
  int64_t attention_weight_keys;  // of a work item
  void (*attention_weights)(const AttentionWeightsParams&, Range);

  Packs (*linear_packs)(const LinearParams&);
  size_t (*linear_packed_bytes)(const LinearParams&);  // of each product
  int64_t (*linear_pack_items)(const LinearParams&);
  void (*linear_pack)(const LinearParams&, Range);
  void (*linear)(const LinearParams&, Range);
  void (*column_sums)(const ColumnSumParams&, Range);

  void (*cross_entropy_forward)(const CrossEntropyParams&, Range);
  void (*cross_entropy_backward)(const CrossEntropyParams&, Range);
  void (*linear_loss_sums)(const LinearLossParams&, Range);
  void (*linear_loss_rows)(const LinearLossParams&, Range);
  void (*linear_loss_gradient)(const LinearLossParams&, Range);
  void (*scaled_product)(const ScaledProductParams&, Range);
};

// The table of the ISA in force, and of a given one (compiled in for every x86-64 build; call only if isa_available()).
// The one of reduced precision is for float32 alone: its products may have relative errors of 2^-16 a term, where that
// is faster (AMX; elsewhere it is the ordinary table).
const KernelTable& kernels(bool reduced_precision = false);
FASTATTN_API const KernelTable& kernels_for(Isa isa, bool reduced_precision = false);

namespace scalar {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
namespace amx {
extern const KernelTable kTable;
}
namespace amx_emulated {
extern const KernelTable kTable;
}
namespace amx_reduced {
extern const KernelTable kTable;
}
namespace amx_emulated_reduced {
extern const KernelTable kTable;
}

}  // namespace fastattn
