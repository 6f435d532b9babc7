"""Whole models on fastattn's operations: a decoder-only Transformer, text generation, GGUF weights."""

from fastattn.models.gguf import from_gguf
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.transformer import KVCache, Transformer, TransformerConfig

__all__ = ["KVCache", "Tokenizer", "Transformer", "TransformerConfig", "from_gguf"]
