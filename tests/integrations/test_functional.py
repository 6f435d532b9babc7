"""fastattn.patch(): who is reached, who is not, and that everything is put back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn

NAMES = ("scaled_dot_product_attention", "layer_norm", "rms_norm")
TORCH = {name: getattr(F, name) for name in NAMES}


@pytest.fixture(autouse=True)
def nothing_left():  # type: ignore[no-untyped-def]
    yield
    assert all(getattr(F, name) is TORCH[name] for name in NAMES)


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _calls() -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """name: (as torch's users write it, what fastattn computes)."""
    q, k = _draw(2, 4, 33, 40), _draw(2, 2, 47, 40)
    mask = _draw(33, 47) > 0
    x, w, b = _draw(5, 7, 96), _draw(96), _draw(96)
    sdpa = fastattn.scaled_dot_product_attention
    return {
        "causal": (
            lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
            lambda: sdpa(q, q, q, is_causal=True),
        ),
        "keywords": (
            lambda: F.scaled_dot_product_attention(value=k, key=k, query=q, attn_mask=mask, scale=0.3, enable_gqa=True),
            lambda: sdpa(q, k, k, mask, scale=0.3, enable_gqa=True),
        ),
        "layer_norm": (lambda: F.layer_norm(x, (96,), w, b, 1e-3), lambda: fastattn.layer_norm(x, (96,), w, b, 1e-3)),
        "two dimensions": (
            lambda: F.layer_norm(input=x, normalized_shape=(7, 96)),
            lambda: fastattn.layer_norm(x, (7, 96)),
        ),
        "rms_norm": (lambda: F.rms_norm(x, (96,), weight=w), lambda: fastattn.rms_norm(x, (96,), w)),
        "rms_norm eps": (lambda: F.rms_norm(x, [96], None, 1e-2), lambda: fastattn.rms_norm(x, (96,), None, 1e-2)),
    }


@pytest.mark.parametrize("name", _calls())
def test_calls_are_answered(name: str) -> None:
    theirs, ours = _calls()[name]
    plain = theirs()
    with fastattn.patch():
        found = theirs()
    assert torch.equal(found, ours())
    torch.testing.assert_close(found, plain)
    assert torch.equal(theirs(), plain)


def test_modules_are_reached() -> None:
    """Code that looks the names up when it runs: torch's own modules, with gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x, memory = _draw(2, 9, 32), _draw(2, 11, 32)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = layer(leaf, memory)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])]

    plain = run()
    with fastattn.patch():
        explained = fastattn.explain(layer, x, memory)
        found = run()
    assert str(explained).startswith("attention: ")
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), "nothing of fastattn ran"


def test_nested_and_raising() -> None:
    x = _draw(3, 8)
    with fastattn.patch():
        inner = F.layer_norm
        assert inner is not TORCH["layer_norm"]
        with pytest.raises(KeyError), fastattn.patch():
            assert F.layer_norm is inner
            raise KeyError
        assert F.layer_norm is inner
        assert torch.equal(F.layer_norm(x, (8,)), fastattn.layer_norm(x, (8,)))

    @fastattn.patch()
    def decorated(depth: int) -> None:
        assert F.layer_norm is inner, "the same functions again, for graphs that were compiled with them"
        if depth:
            decorated(depth - 1)

    decorated(2)


def test_threads_keep_to_themselves() -> None:
    """A patch is the calling thread's; start() is everybody's."""
    _, ours = _calls()["causal"]
    theirs = _calls()["causal"][0]
    plain, fast = theirs(), ours()
    assert not torch.equal(plain, fast), "the two cannot be told apart"
    seen: dict[str, Tensor] = {}

    def elsewhere(name: str) -> None:
        thread = threading.Thread(target=lambda: seen.__setitem__(name, theirs()))
        thread.start()
        thread.join()

    with fastattn.patch():
        elsewhere("within")
        assert torch.equal(theirs(), fast)
    patching = fastattn.patch()
    patching.start()
    elsewhere("started")
    with pytest.raises(RuntimeError, match="already started"):
        patching.start()
    patching.stop()
    elsewhere("stopped")
    with pytest.raises(RuntimeError, match="not started"):
        patching.stop()
    assert torch.equal(seen["within"], plain)
    assert torch.equal(seen["started"], fast)
    assert torch.equal(seen["stopped"], plain)


def test_many_threads_at_once() -> None:
    x = _draw(64, 32)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(200):
            with fastattn.patch():
                if not torch.equal(F.layer_norm(x, (32,)), fastattn.layer_norm(x, (32,))):
                    wrong.append("patched")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torch_answers_what_is_not_ours() -> None:
    """Integers, errors in torch's words, tensor subclasses, modes, the meta device."""
    q = _draw(1, 2, 5, 8)
    with fastattn.patch():
        with pytest.raises(RuntimeError, match="not implemented"):
            F.layer_norm(torch.ones(3, 4, dtype=torch.int64), (4,))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(q, (9,))
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, q[..., :7], q)
        with pytest.raises(TypeError):
            F.layer_norm()
        assert F.scaled_dot_product_attention(q.to("meta"), q.to("meta"), q.to("meta")).device.type == "meta"


@pytest.mark.parametrize("bias, diagonal", [(causal_upper_left, 0), (causal_lower_right, 6)])
def test_alignments_as_masks(bias: Callable[[int, int], Tensor], diagonal: int) -> None:
    """torch.nn.attention.bias asks whether it is called from the F.scaled_dot_product_attention of the moment."""
    q, k = _draw(1, 2, 5, 8), _draw(1, 2, 11, 8)
    with fastattn.patch():
        found = F.scaled_dot_product_attention(q, k, k, bias(5, 11))
    visible = torch.ones(5, 11, dtype=torch.bool).tril(diagonal)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, k, visible))
    assert torch.equal(found, fastattn.scaled_dot_product_attention(q, k, k, bias(5, 11)))
    with pytest.raises(ValueError, match="attn_mask: 5 x 12"):
        fastattn.scaled_dot_product_attention(q, k, k, bias(5, 12))


def test_another_patch_on_top_stays() -> None:
    """Who replaced the name after us keeps it; ours below passes calls on."""
    x = _draw(3, 8)
    with fastattn.patch():
        below = F.layer_norm
        F.layer_norm = lambda *args, **kwargs: below(*args, **kwargs) + 1
    try:
        assert torch.equal(F.layer_norm(x, (8,)), TORCH["layer_norm"](x, (8,)) + 1)
    finally:
        F.layer_norm = TORCH["layer_norm"]


def test_compiled() -> None:
    """In one graph, within a patch; traced again when the names change."""
    x, w = _draw(6, 64), _draw(64)
    compiled = torch.compile(lambda x: F.layer_norm(x, (64,), w), fullgraph=True, backend="aot_eager")
    with fastattn.patch():
        assert torch.equal(compiled(x), fastattn.layer_norm(x, (64,), w))
    assert torch.equal(compiled(x), F.layer_norm(x, (64,), w))
