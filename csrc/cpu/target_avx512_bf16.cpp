// AVX-512 with BF16 dot products and VBMI: Zen 4 and later.
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

namespace fastattn {
namespace avx512_bf16 {
#include "cpu/table-inl.h"
}  // namespace avx512_bf16
}  // namespace fastattn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
