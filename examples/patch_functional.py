"""Reach the functions of torch.nn.functional in code that was not written for fastattn: fastattn.patch().

    python examples/patch_functional.py

A decoder block in plain PyTorch runs as it is, then within a patch, then compiled within one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn


def block(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Somebody's decoder block: pre-norm causal attention and a feed-forward network."""
    qkv, out, up, down = weights
    heads = (F.rms_norm(x, x.shape[-1:]) @ qkv).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
    x = x + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2) @ out
    return x + F.gelu(F.layer_norm(x, x.shape[-1:]) @ up) @ down


def milliseconds(call: Callable[[], Tensor]) -> float:
    call()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main(width: int = 256, tokens: int = 512) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width)
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    weights = [torch.randn(shape) / shape[0] ** 0.5 for shape in shapes]
    plain = block(x, weights)
    print(f"as it is           {milliseconds(lambda: block(x, weights)):7.2f} ms")

    with fastattn.patch():
        print(f"within a patch     {milliseconds(lambda: block(x, weights)):7.2f} ms")
        print(f"largest difference {(block(x, weights) - plain).abs().max().item():.1e}")
        q = torch.randn(1, width // 64, tokens, 64)
        print(fastattn.explain(F.scaled_dot_product_attention, q, q, q, is_causal=True))
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weights), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(block(x, weights), plain)


if __name__ == "__main__":
    main()
