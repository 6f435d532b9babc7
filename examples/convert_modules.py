"""Put fastattn into a model made of torch.nn modules, and take it out again: fastattn.convert, conversion_report, revert.

    python examples/convert_modules.py

Prints what was swapped, the largest difference that it makes, and the time of a forward and backward pass both ways.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import fastattn


def seconds(model: nn.Module, source: Tensor, target: Tensor) -> float:
    """The best of three training steps' forward and backward passes."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        model(source, target).square().mean().backward()
        best = min(best, time.perf_counter() - start)
    return best


def main(width: int = 256, layers: int = 2, tokens: int = 128) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(width, width // 64, layers, layers, 4 * width, dropout=0.0, batch_first=True)
    source, target = torch.randn(4, tokens, width), torch.randn(4, tokens, width)
    before, plain = seconds(model, source, target), model(source, target)

    fastattn.convert(model)
    print(fastattn.conversion_report(model))
    after, ours = seconds(model, source, target), model(source, target)
    print(f"largest difference {(ours - plain).abs().max().item():.1e}")
    print(f"forward and backward: {1e3 * before:.1f} ms with torch.nn, {1e3 * after:.1f} ms converted")

    fastattn.revert(model)
    assert torch.equal(model(source, target), plain)


if __name__ == "__main__":
    main()
