"""Train a small decoder on real English: the language reference that ships with Python.

    python examples/train_tiny.py                      # 300 steps, loss 5.4 to 2.0, half a minute of CPU time
    python examples/train_tiny.py --steps 2000 --dim 192 --layers 6

Prints the loss in nats per byte (ln 256 = 5.55 is a uniform guess, 3.26 the entropy of this text's single bytes), then a
sample. ``train`` is what the test of the training step calls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
from torch import Tensor

from fastattn.models import Transformer, TransformerConfig


def corpus() -> Tensor:
    """The topics of Python's ``help()``, about 700 kB of prose and code, as bytes (N,)."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batch(text: Tensor, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows (rows, columns) and the same windows one byte later."""
    starts = torch.randint(len(text) - columns - 1, (rows, 1), generator=generator)
    windows = text[starts + torch.arange(columns + 1)]
    return windows[:, :-1], windows[:, 1:]


def train(
    config: TransformerConfig,
    steps: int,
    *,
    rows: int = 8,
    columns: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Transformer, list[float]]:
    """Train with AdamW, 20 steps of warm-up and linear decay. Returns the model and the loss of each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    text = corpus()
    model = Transformer(config)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate, betas=(0.9, 0.95),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - 0.9 * step / steps)
    )
    losses = []
    for step in range(steps):
        tokens, targets = batch(text, rows, columns, generator)
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        report(step, losses[-1])
    return model.eval(), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--implementation", default="auto", help="auto | cpu | reference | triton | cuda")
    args = parser.parse_args()
    config = TransformerConfig.tiny(
        dim=args.dim, nlayers=args.layers, nheads=args.heads, nheads_kv=args.heads, ffn_dim=8 * args.dim // 3,
        dropout=args.dropout, implementation=args.implementation,
    )  # fmt: skip

    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if (step + 1) % 25 == 0 or step == 0:
            print(f"step {step + 1:5d}   loss {loss:.3f}   {time.perf_counter() - started:5.1f} s", flush=True)

    model, _ = train(config, args.steps, report=report)
    prompt = list(b"The statement ")
    (continuation,) = model.generate([prompt], 200, temperature=0.8, top_k=20, seed=0)
    print(bytes(prompt + continuation).decode("utf-8", errors="replace"))


if __name__ == "__main__":
    main()
