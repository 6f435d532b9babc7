"""The operations: each file validates, differentiates and chooses for one family."""

from fastattn.ops import _batching  # noqa: F401  registers rules
from fastattn.ops._select import Explanation, explain
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.attention_sequences import attention_varlen, attention_with_kv_cache
from fastattn.ops.attention_weights import attention_weights
from fastattn.ops.ffn import ffn, glu_ffn
from fastattn.ops.linear import linear
from fastattn.ops.loss import cross_entropy, linear_cross_entropy
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.rope import rope

__all__ = [
    "Explanation",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "cross_entropy",
    "explain",
    "ffn",
    "glu_ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
]
