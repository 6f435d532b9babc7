"""Let PyTorch's own dispatch of scaled_dot_product_attention end in fastattn: torch.nn.attention's registry.

    python examples/flash_registry.py

Activation is for the whole process and reaches every call that PyTorch sends to its flash backend, whoever makes it; here
nn.MultiheadAttention, forward and backward.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls, restore_flash_attention_impl

import fastattn  # noqa: F401  (registers FASTATTN)


def main(width: int = 512, tokens: int = 1024) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
    x = torch.randn(1, tokens, width)
    print(f"implementations: {', '.join(list_flash_attention_impls())}")

    def step() -> tuple[float, list[torch.Tensor]]:
        """Seconds of a forward and backward pass (the better of two), and the gradients."""
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            out = attention(x, x, x, need_weights=False)[0]
            gradients = torch.autograd.grad(out.square().mean(), list(attention.parameters()))
            best = min(best, time.perf_counter() - start)
        return best, list(gradients)

    before, plain = step()
    activate_flash_attention_impl("FASTATTN")
    try:
        after, ours = step()
    finally:
        restore_flash_attention_impl()
    print(
        f"forward and backward: {1e3 * before:.1f} ms with torch's flash kernel, {1e3 * after:.1f} ms with fastattn's"
    )
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    main()
