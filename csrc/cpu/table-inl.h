// The algorithms, in dependency order, and the table that exports them. Included once per target, inside its region and namespace.

#include "cpu/convert-inl.h"
#include FASTATTN_TARGET_VEC
#include "cpu/math-inl.h"
#include "cpu/philox-inl.h"
#include "cpu/gemm_micro-inl.h"
#include "cpu/rope-inl.h"

const KernelTable kTable = {
    rope,
    gemm_product,
};
