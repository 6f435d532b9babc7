"""Text generation: one prefill, then one token a step through the KV cache.

Prompts of unequal length are padded on the left, so that all rows write the same cache slot at each step and only a mask and
the positions differ between rows: a row gives the tokens that it would give alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.models.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, at most ``max_new_tokens`` each.

    Args:
        model: any ``Transformer``; runs in eval mode without gradients and is left in the mode it was in.
        prompts: sequences of token ids, of any lengths ≥ 1, or a (B, N) integer tensor.
        max_new_tokens: ≥ 0.
        temperature: 0 takes the most probable token; otherwise the logits are divided by it before sampling.
        top_k: sample among the k most probable tokens only.
        top_p: of those, sample among the fewest whose probability reaches p (Holtzman et al. 2020).
        stop_tokens: a row ends at any of these; the stop token itself is not returned.
        seed: row b draws from a generator seeded ``seed + b``, whatever the other rows do; None draws a fresh seed.
        on_token: called as ``on_token(row, token)`` for each token as it is chosen.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, a context beyond ``max_seq_len``, a sampling
            parameter out of range.
    """
    rows = _checked_prompts(model, prompts, max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(rows))] if temperature > 0 else []
    stops = frozenset(int(token) for token in stop_tokens)
    results: list[list[int]] = [[] for _ in rows]
    if not rows or max_new_tokens == 0:
        return results

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            tokens, cache = _left_padded(model, rows, max_new_tokens)
            active = set(range(len(rows)))
            for step in range(max_new_tokens):
                logits = model(tokens, cache=cache, last_only=True)[:, 0]
                chosen = sample(logits, temperature, top_k, top_p, generators)
                for row, token in enumerate(chosen.tolist()):
                    if token in stops:
                        active.discard(row)
                    if row in active:
                        results[row].append(token)
                        if on_token is not None:
                            on_token(row, token)
                if not active or step + 1 == max_new_tokens:
                    break
                tokens = chosen[:, None].to(tokens.device)
    finally:
        model.train(training)
    return results


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """One token id per row of logits (B, V): the argmax at temperature 0, else a draw from row b's own CPU generator."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, kept)
    probabilities = probabilities.cpu()
    draws = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return torch.cat(draws)


def _left_padded(model: Transformer, rows: list[list[int]], max_new_tokens: int):  # type: ignore[no-untyped-def]
    """tokens (B, N) padded with id 0 in front, and a cache that knows how many slots of each row are padding."""
    device = model.embedding.weight.device
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    tokens = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)], device=device)
    left_padding = torch.tensor(padding, device=device) if any(padding) else None
    return tokens, model.new_cache(len(rows), longest + max_new_tokens, left_padding)


def _checked_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int
) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(f"prompts must be a (B, N) integer tensor, got {prompts.dtype} {tuple(prompts.shape)}")
        rows = prompts.tolist()
    else:
        if any(isinstance(row, int | str) for row in prompts):
            raise ValueError("prompts must be a sequence of token id sequences; for one prompt pass [prompt]")
        rows = [[int(token) for token in row] for row in prompts]
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be ≥ 0, got {max_new_tokens}")
    config = model.config
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{number}] is empty: there is nothing to continue")
        if min(row) < 0 or max(row) >= config.vocab_size:
            raise ValueError(f"prompts[{number}] has a token id outside [0, {config.vocab_size})")
        if len(row) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"prompts[{number}]: {len(row)} tokens + max_new_tokens={max_new_tokens} exceed "
                f"max_seq_len={config.max_seq_len}"
            )
    return rows


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be ≥ 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be ≥ 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p}")
