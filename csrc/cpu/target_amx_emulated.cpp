// The AMX target with tile registers in memory (tile.h): runs, slowly, wherever AVX512-BF16 does. For tests only.
#include "cpu/target_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2")
#endif

#define FASTATTN_TARGET_VEC "cpu/vec_avx512.h"
#define FASTATTN_TARGET_AVX512_BF16 1
#define FASTATTN_TARGET_AMX 1
#define FASTATTN_TARGET_TILE_EMULATION 1

namespace fastattn {
namespace amx_emulated {
#include "cpu/table-inl.h"
}  // namespace amx_emulated

// float32 in two parts instead of three (gemm_split-inl.h).
#define FASTATTN_TARGET_REDUCED_PRECISION 1
namespace amx_emulated_reduced {
#include "cpu/table-inl.h"
}  // namespace amx_emulated_reduced
}  // namespace fastattn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
