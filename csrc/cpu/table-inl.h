// The algorithms, in dependency order, and the table that exports them. Included once per target, inside its region and
// namespace.

// clang-format off
#include "cpu/convert-inl.h"
#include FASTATTN_TARGET_VEC
#include "cpu/math-inl.h"
#include "cpu/philox-inl.h"
#include "cpu/gemm_micro-inl.h"
#include "cpu/gemm_stream-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/activation-inl.h"
#include "cpu/ffn-inl.h"
#include "cpu/rope-inl.h"
#include "cpu/attention_score-inl.h"
#include "cpu/attention_keys-inl.h"
#include "cpu/attention_forward-inl.h"
#include "cpu/attention_rows-inl.h"
#include "cpu/attention_decode-inl.h"
#include "cpu/attention_backward-inl.h"
#include "cpu/attention_decode_backward-inl.h"
#include "cpu/attention_weights-inl.h"
#include "cpu/norm-inl.h"
#include "cpu/loss-inl.h"
// clang-format on

const KernelTable kTable = {
    rope,
    gemm_product,

    norm_forward,
    norm_backward,
    norm_backward_reduce,

    kAttentionQueries,
    kAttentionKeys,
    kDecodeKeys,
    attention_forward,
    attention_backward,
    kWeightKeys,
    attention_weights,

    linear_packs,
    linear_packed_bytes,
    linear_pack_items,
    linear_pack,
    linear,
    column_sums,

    cross_entropy_forward,
    cross_entropy_backward,
    linear_loss_sums,
    linear_loss_rows,
    linear_loss_gradient,
    scaled_product,
};
