"""torch.nn's modules computed by fastattn, and the conversion of models that were built with torch.nn.

``LayerNorm``, ``RMSNorm``, ``MultiheadAttention``, ``Transformer`` with its encoder, decoder and their layers, and
``Sequential`` derive from the classes of the same names in :mod:`torch.nn`, with the same constructors, parameters and results;
``FeedForward`` is new.
"""

from fastattn.nn._convert import ConversionReport, ConversionRow, conversion_report, convert, revert
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.ffn import FeedForward, Sequential
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "ConversionReport",
    "ConversionRow",
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Sequential",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "conversion_report",
    "convert",
    "revert",
]
