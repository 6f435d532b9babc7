"""The same bad input: what fastattn.nn raises is caught by code that catches what torch.nn raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastattn

B, L, S, E, H = 2, 4, 5, 8, 2
Case = Callable[[Any], object]


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _none(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _attend(*, built: dict[str, Any] | None = None, **changed: Any) -> Case:
    given = {"query": _draw(B, L, E), "key": _draw(B, S, E), "value": _draw(B, S, E)} | changed
    return lambda namespace: namespace.MultiheadAttention(E, H, **{"batch_first": True} | (built or {}))(**given)


def _module(name: str, *inputs: torch.Tensor, args: tuple[int, ...] = (E, H), **changed: Any) -> Case:
    options = {} if name.endswith("Norm") else {"batch_first": True}
    return lambda namespace: getattr(namespace, name)(*args, **options)(*inputs, **changed)


_ALONE = {"query": _draw(L, E), "key": _draw(S, E), "value": _draw(S, E)}
CASES: dict[str, Case] = {
    "query 4-D": _attend(query=_draw(1, B, L, E)),
    "query 1-D": _attend(query=_draw(E)),
    "query's features": _attend(query=_draw(B, L, E + 1)),
    "query's dtype": _attend(query=_draw(B, L, E).double()),
    "integers": _attend(query=_none(B, L, E, dtype=torch.int64)),
    "key 2-D": _attend(key=_draw(S, E)),
    "key's batch": _attend(key=_draw(B + 1, S, E)),
    "key's features": _attend(key=_draw(B, S, E + 1)),
    "value's rows": _attend(value=_draw(B, S + 1, E)),
    "value's features": _attend(value=_draw(B, S, E + 1)),
    "kdim": _attend(built={"kdim": 3}),
    "key_padding_mask 1-D": _attend(key_padding_mask=_none(S)),
    "key_padding_mask": _attend(key_padding_mask=_none(B, L)),
    "key_padding_mask of integers": _attend(key_padding_mask=_none(B, S, dtype=torch.int64)),
    "attn_mask of integers": _attend(attn_mask=_none(L, S, dtype=torch.int64)),
    "attn_mask of bytes": _attend(attn_mask=_none(L, S, dtype=torch.uint8)),
    "attn_mask": _attend(attn_mask=_none(S, L)),
    "attn_mask, a list": _attend(attn_mask=[1]),
    "key_padding_mask, a list": _attend(key_padding_mask=[1]),
    "encoder layer's mask, a list": _module("TransformerEncoderLayer", _draw(B, 3, E), src_mask=[1]),
    "attn_mask 3-D": _attend(attn_mask=_none(B, L, S)),
    "attn_mask 4-D": _attend(attn_mask=_none(B, H, L, S)),
    "attn_mask 1-D": _attend(attn_mask=_none(S)),
    "is_causal without a mask": _attend(is_causal=True),
    "unbatched, key_padding_mask": _attend(**_ALONE, key_padding_mask=_none(1, S)),
    "unbatched, attn_mask": _attend(**_ALONE, attn_mask=_none(H + 1, L, S)),
    "unbatched query": _attend(query=_draw(L, E)),
    "heads do not divide": lambda namespace: namespace.MultiheadAttention(8, 3),
    "no heads": lambda namespace: namespace.MultiheadAttention(8, 0),
    "no features": lambda namespace: namespace.MultiheadAttention(0, 1),
    "dropout of 2": lambda namespace: namespace.TransformerEncoderLayer(E, H, dropout=2.0),
    "unknown activation": lambda namespace: namespace.TransformerEncoderLayer(E, H, activation="tan"),
    "LayerNorm's width": _module("LayerNorm", _draw(2, 7), args=(E,)),
    "LayerNorm of a scalar": _module("LayerNorm", torch.tensor(1.0), args=(E,)),
    "LayerNorm of integers": _module("LayerNorm", _none(2, E, dtype=torch.int64), args=(E,)),
    "LayerNorm in another dtype": lambda namespace: namespace.LayerNorm(E).half()(_draw(2, E)),
    "LayerNorm(None)": lambda namespace: namespace.LayerNorm(None),
    "LayerNorm of None": lambda namespace: namespace.LayerNorm(E)(None),
    "RMSNorm of a list": lambda namespace: namespace.RMSNorm(E)([1.0]),
    "RMSNorm of integers": _module("RMSNorm", _none(2, E, dtype=torch.int64), args=(E,)),
    "LayerNorm(-1)": lambda namespace: namespace.LayerNorm(-1),
    "RMSNorm's width": _module("RMSNorm", _draw(2, 7), args=(E,)),
    "encoder layer's width": _module("TransformerEncoderLayer", _draw(B, 3, 7)),
    "encoder layer 4-D": _module("TransformerEncoderLayer", _draw(1, B, 3, E)),
    "encoder layer's dtype": _module("TransformerEncoderLayer", _draw(B, 3, E).double()),
    "encoder layer's mask": _module("TransformerEncoderLayer", _draw(B, 3, E), src_mask=_none(4, 4)),
    "encoder layer's padding": _module("TransformerEncoderLayer", _draw(B, 3, E), src_key_padding_mask=_none(3, B)),
    "encoder layer, is_causal": _module("TransformerEncoderLayer", _draw(B, 3, E), is_causal=True),
    "decoder layer's memory": _module("TransformerDecoderLayer", _draw(B, 3, E), _draw(B, 3, 7)),
    "decoder layer's batches": _module("TransformerDecoderLayer", _draw(B, 3, E), _draw(3, 3, E)),
    "decoder layer's mask": _module("TransformerDecoderLayer", _draw(B, 3, E), _draw(B, 4, E), memory_mask=_none(4, 3)),
    "Transformer's batches": _module("Transformer", _draw(B, 3, E), _draw(3, 3, E), args=(E, H, 1, 1, E)),
    "Transformer's width": _module("Transformer", _draw(B, 3, 7), _draw(B, 3, 7), args=(E, H, 1, 1, E)),
}


def _raised(case: Case, namespace: Any) -> Exception:
    with pytest.raises(Exception) as found:
        case(namespace)
    return found.value


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input")
@pytest.mark.parametrize("name", CASES)
def test_what_torch_raises(name: str) -> None:
    theirs, ours = (_raised(CASES[name], namespace) for namespace in (nn, fastattn.nn))
    assert isinstance(ours, type(theirs)), f"torch {theirs!r}, ours {ours!r}"
    if type(theirs) is not type(ours):
        assert isinstance(ours, (TypeError, ValueError))
