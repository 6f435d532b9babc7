// AVX-512 with BF16 conversions and AMX-BF16 tiles: Sapphire Rapids and later.
#include "cpu/target_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                                      \
    __attribute__((                                                                                                \
        target("avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2")
#endif

#define FASTATTN_TARGET_VEC "cpu/vec_avx512.h"
#define FASTATTN_TARGET_AVX512_BF16 1
#define FASTATTN_TARGET_AMX 1

namespace fastattn {
namespace amx {
#include "cpu/table-inl.h"
}  // namespace amx

// float32 in two parts instead of three (gemm_split-inl.h).
#define FASTATTN_TARGET_REDUCED_PRECISION 1
namespace amx_reduced {
#include "cpu/table-inl.h"
}  // namespace amx_reduced
}  // namespace fastattn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
