"""Every operation in readable PyTorch: the definition, the oracle of the tests and the fallback that runs anywhere."""

from fastattn.reference.attention import attention
from fastattn.reference.ffn import ffn, glu_ffn
from fastattn.reference.linear import linear
from fastattn.reference.loss import cross_entropy, linear_cross_entropy
from fastattn.reference.norm import layer_norm, rms_norm
from fastattn.reference.rope import rope

__all__ = [
    "attention",
    "cross_entropy",
    "ffn",
    "glu_ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
]
