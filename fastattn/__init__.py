"""fastattn: fast, exact softmax attention, feed-forward and normalization for PyTorch, on CPUs and GPUs.

>>> import fastattn
>>> out = fastattn.attention(q, k, v, causal=True)        # (batch, heads, seq, head_dim)
>>> fastattn.convert(model)                               # swap torch.nn modules in place
>>> with fastattn.patch(): ...                            # F.scaled_dot_product_attention and norms of code as it is
>>> print(fastattn.explain(fastattn.attention, q, k, v))  # which implementation runs, and why

``python -m fastattn info | explain | check | bench | tune | demo`` on the command line.
"""

import sys as _sys

__version__ = "0.1.0"

#: Why the package could not be imported; only ever set under ``python -m fastattn``, which then says so.
import_error: Exception | None = None

_command = " ".join(_sys.orig_argv)
# `info` must report a broken installation, even a library whose loading kills the process: it looks from a child process.
if "-m fastattn info" not in _command:
    try:
        from fastattn import nn, ops, reference
        from fastattn.integrations import flash as _flash
        from fastattn.integrations.functional import patch
        from fastattn.nn import conversion_report, convert, revert
        from fastattn.ops import (
            Explanation,
            attention,
            attention_varlen,
            attention_weights,
            attention_with_kv_cache,
            cross_entropy,
            explain,
            ffn,
            glu_ffn,
            layer_norm,
            linear,
            linear_cross_entropy,
            rms_norm,
            rope,
            scaled_dot_product_attention,
        )

        _flash.register()
    except Exception as _error:
        if "-m fastattn" not in _command:
            raise
        import_error = _error

__all__ = [
    "Explanation",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "conversion_report",
    "convert",
    "cross_entropy",
    "explain",
    "ffn",
    "glu_ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "nn",
    "ops",
    "patch",
    "reference",
    "revert",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
]
