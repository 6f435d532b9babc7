// AVX-512 F, DQ, BW, VL: Skylake-SP and later.
#include "cpu/target_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define FASTATTN_TARGET_VEC "cpu/vec_avx512.h"

namespace fastattn {
namespace avx512 {
#include "cpu/table-inl.h"
}  // namespace avx512
}  // namespace fastattn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
