"""The Gluon forward kernel's source on a model of its hardware (``gluon_model.py``): results, and what the model notices."""

import math
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from tolerance import assert_accurate

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gluon_model
from gluon_model import Deadlock, Fault, Pointer, Tiles
from triton.experimental.gluon.language.nvidia import hopper

from fastattn import reference
from fastattn.kernels import attention_gluon
from fastattn.kernels.attention_score import Score, prepare

HEADS, KEY_HEADS = 4, 2


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: tuple[int, int] = (-1, -1),
    stages: int = 2,
    seed: int = 0,
    eager: bool = False,
    replacing: dict[Any, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, flags) of every program of ``attention_gluon.launch_forward``; windows aligned to the bottom right."""
    (batch, heads, rows, dim), keys, block_n = q.shape, k.shape[2], 64
    score = Score(1 / math.sqrt(dim), 0.0, *window, keys - rows)
    inputs, features = prepare(q, k, v, None, None, None, score, 0.0, None, None, None)
    tiles = -(-rows // 128) * heads * batch
    out = torch.full_like(q, math.nan)
    lse, flags = torch.full((batch * heads * rows,), math.nan), torch.full((2 * tiles,), -1)
    arguments = {
        "q_tiles": Tiles(q, [1, 1, 64, dim]),
        "k_tiles": Tiles(k, [1, 1, block_n, dim]),
        "v_tiles": Tiles(v, [1, 1, block_n, dim]),
        "out_tiles": Tiles(out, [1, 1, 64, dim]),
        "lse": Pointer(lse),
        "flags": Pointer(flags),
        "inputs": inputs,
        "lines": batch * heads,
        "section": 2,
        "FEATURES": features,
        "BLOCK_N": block_n,
        "STAGES": stages,
        "DIM": dim,
    }
    kernel = attention_gluon.attention_forward_gluon_kernel
    gluon_model.run(kernel, tiles, arguments, seed, eager, replacing)
    return out, lse.view(batch, heads, rows), flags


def _inputs(rows: int, keys: int, dim: int = 64) -> list[torch.Tensor]:
    shapes = ((HEADS, rows), (KEY_HEADS, keys), (KEY_HEADS, keys))
    return [torch.randn(1, heads, n, dim, dtype=torch.float16) for heads, n in shapes]


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize(
    "rows, keys, window, stages",
    [
        (150, 330, (-1, -1), 2),
        (150, 330, (-1, 0), 3),
        (330, 150, (-1, 0), 2),
        (150, 330, (70, 9), 3),
        (3, 5, (-1, -1), 2),
    ],
)
def test_results(rows: int, keys: int, window: tuple[int, int], stages: int, eager: bool) -> None:
    """Full, causal (rows that see nothing among them) and windowed, several orders of events each."""
    q, k, v = _inputs(rows, keys)
    options = {"window_size": window, "return_lse": True}
    exact = reference.attention(q.double(), k.double(), v.double(), **options)
    peer = plain.attention(q, k, v, window_size=window)
    runs = [_attend(q, k, v, window, stages, seed, eager) for seed in (0, 100, 200)]
    for out, lse, flags in runs:
        assert_accurate(out, peer[0], exact[0], "out", terms=keys)
        assert_accurate(lse, peer[1].float(), exact[1], "lse", terms=keys * 64)
        assert (flags == 0).all()
        # The order of events changes nothing, not a bit.
        assert torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1])


def test_a_nan_behind_the_diagonal_is_flagged() -> None:
    q, k, v = _inputs(128, 128)
    v[:, 1, 100] = math.nan
    out, lse, flags = _attend(q, k, v, (-1, 0))
    assert flags.view(HEADS, 2).sum(0).tolist() == [2, 2]
    assert torch.isfinite(out[:, :2]).all() and torch.isfinite(lse).all()


def _is_wrong(eager: bool, **options: Any) -> bool:
    """Whether full attention over six blocks of keys fails or gives something else."""
    q, k, v = _inputs(128, 330)
    exact = reference.attention(q.double(), k.double(), v.double())
    try:
        out, _, _ = _attend(q, k, v, eager=eager, **options)
    except (Deadlock, Fault):
        return True
    return not torch.allclose(out.double(), exact, atol=1e-2)


def test_the_model_notices_a_ring_whose_parity_does_not_alternate() -> None:
    never = {attention_gluon.ring_slot: lambda index, stages: (index % stages, 0)}
    assert _is_wrong(False, replacing=never) and _is_wrong(True, replacing=never)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
def test_the_model_notices_a_producer_that_does_not_wait(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = gluon_model.Machine.wait

    def impatient(self: gluon_model.Machine, barrier: gluon_model.Barrier, parity: int) -> None:
        if barrier.count == 1:  # "empty" barriers count both warpgroups
            wait(self, barrier, parity)

    monkeypatch.setattr(gluon_model.Machine, "wait", impatient)
    assert _is_wrong(eager)


def test_the_model_notices_weights_that_are_not_waited_for() -> None:
    """s(j) and the product before it are both still running when its softmax begins."""
    real = gluon_model.Machine.finish
    with pytest.raises(Fault, match="before it has been waited for"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gluon_model.Machine, "finish", lambda self, num_outstanding, deps: real(self, 2 * num_outstanding, deps)
        )
        _attend(*_inputs(128, 330))


def test_the_model_notices_a_turn_that_never_comes() -> None:
    replacing = {attention_gluon.turn_parity: lambda index, consumer: index & 1}
    with pytest.raises(Deadlock):
        _attend(*_inputs(128, 330), replacing=replacing)


def test_the_model_notices_a_missing_fence() -> None:
    with pytest.raises(Fault, match="without a fence"):
        _attend(*_inputs(64, 64), replacing={hopper.fence_async_shared: lambda: None})
