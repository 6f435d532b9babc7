"""The forward kernel with TMA descriptors, which the interpreter runs only when asked: results, order of tiles, what it leaves."""

import math

import pytest
import torch
import triton
import triton.language as tl
from test_triton_only import _compare_attention

import fastattn
from fastattn.kernels import attention_tma, configs
from fastattn.kernels.attention_score import Score, prepare
from fastattn.kernels.attention_tma import place_of_tile, section_lines


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, implementation: str) -> list[object]:
    """The TMA kernel wherever it takes the call; the configurations of its launches so far."""
    seen: list[object] = []
    launch = attention_tma.launch_forward

    def counted(*arguments: object) -> None:
        seen.append(arguments[-1])
        launch(*arguments)

    def chosen(head_dim: int, dtype: torch.dtype, extras: bool, windowed: bool, arch: configs.Arch) -> object:
        return configs.AttentionTma(64, 64, 32, 4, 1, not windowed)

    monkeypatch.setattr(configs, "attention_forward_sm90", chosen)
    monkeypatch.setattr(attention_tma, "launch_forward", counted)
    return seen


def _inputs(
    dtype: torch.dtype, rows: int, keys: int, dims: tuple[int, int], heads: tuple[int, int]
) -> list[torch.Tensor]:
    (query_heads, key_heads), (dim, dim_v) = heads, dims
    shapes = ((query_heads, rows, dim), (key_heads, keys, dim), (key_heads, keys, dim_v))
    return [torch.randn(2, *shape).to(dtype) for shape in shapes]


# Several blocks in both directions, neither length a multiple of one; gradients are the portable kernels', from this lse.
@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float16),
        ({"causal": True}, torch.bfloat16),
        ({"window_size": (40, 9), "softcap": 5.0}, torch.float16),
        ({"window_size": (-1, 70), "alibi_slopes": torch.tensor([0.3, 0.01])}, torch.bfloat16),
        ({"causal": True, "sinks": torch.tensor([-1.0, 2.0])}, torch.float16),
    ],
    ids=lambda value: "-".join(value) or "full" if isinstance(value, dict) else None,
)
def test_output_and_gradients(options: dict[str, object], dtype: torch.dtype, launches: list[object]) -> None:
    _compare_attention(_inputs(dtype, 150, 210, (72, 40), (2, 1)), dtype, "triton", **options)
    assert len(launches) == 1


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_head_dims(head_dim: int, launches: list[object]) -> None:
    _compare_attention(
        _inputs(torch.float16, 70, 100, (head_dim, head_dim), (2, 2)), torch.float16, "triton", causal=True
    )
    assert len(launches) == 1


def test_order_of_memory_is_free(launches: list[object]) -> None:
    packed = torch.randn(2, 70, 3, 2, 40, dtype=torch.float16)
    inputs = [packed[:, :, i, :, 8:32].transpose(1, 2) for i in range(3)]
    _compare_attention(inputs, torch.float16, "triton", causal=True)
    assert len(launches) == 1


def test_what_is_not_seen_cannot_reach_a_row(launches: list[object]) -> None:
    """NaN and infinity behind the diagonal; rows before the first key see nothing at all."""
    q, k, v = _inputs(torch.float16, 150, 100, (64, 64), (2, 1))
    clean, lse_clean = fastattn.attention(q, k, v, causal=True, return_lse=True, implementation="triton")
    assert (clean[:, :, :50] == 0).all() and (lse_clean[:, :, :50] == -math.inf).all()
    k[:, :, 90], v[:, :, 91], v[:, :, 95, 3] = math.nan, math.inf, math.nan
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, implementation="triton")
    assert torch.equal(out[:, :, :140], clean[:, :, :140]) and torch.equal(lse[:, :, :140], lse_clean[:, :, :140])
    assert not torch.isfinite(out[:, :, 145:]).any() and len(launches) == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x: x[..., 1:-7], "multiples of 16 bytes"),
        (lambda x: x[:, :1].expand(2, 2, 70, 64), "multiples of 16 bytes"),
        (lambda x: x[..., :60].contiguous(), "multiples of 16 bytes"),
    ],
    ids=["start", "expanded", "row"],
)
def test_what_tma_cannot_read_goes_to_the_portable_kernel(change, reason: str, launches: list[object]) -> None:  # type: ignore[no-untyped-def]
    inputs = [change(x) for x in _inputs(torch.float16, 70, 70, (64, 64), (2, 2))]
    prepared = prepare(*inputs, None, None, None, Score(1.0, 0.0, -1, -1, 0), 0.0, None, None, None)
    assert reason in str(attention_tma.why_not(*prepared))
    _compare_attention(inputs, torch.float16, "triton")
    assert not launches


def test_masks_and_dropout_go_to_the_portable_kernel(launches: list[object]) -> None:
    inputs = _inputs(torch.float16, 20, 20, (64, 64), (1, 1))
    fastattn.attention(*inputs, attn_mask=torch.ones(20, 20).bool().tril(), implementation="triton")
    fastattn.attention(*inputs, dropout_p=0.5, implementation="triton")
    fastattn.attention(inputs[0], *(x[:, :, :0] for x in inputs[1:]), implementation="triton")
    assert not launches


@triton.jit
def _schedule_kernel(result, blocks, lines, section):
    block, line = place_of_tile(tl.program_id(0), blocks, lines, section)
    tl.store(result + 2 * tl.program_id(0), block)
    tl.store(result + 2 * tl.program_id(0) + 1, line)


@pytest.mark.parametrize("blocks, lines, section", [(5, 7, 3), (3, 4, 4), (1, 9, 2), (4, 1, 1)])
def test_every_tile_once_and_the_longest_of_a_section_first(blocks: int, lines: int, section: int) -> None:
    result = torch.full((blocks * lines, 2), -1, dtype=torch.int32)
    _schedule_kernel[(blocks * lines,)](result, blocks, lines, section)
    order = [(block, line) for block, line in result.tolist()]
    assert sorted(order) == [(block, line) for block in range(blocks) for line in range(lines)]
    # Under a causal window row blocks see more keys the later they are.
    assert order == sorted(order, key=lambda place: (place[1] // section, -place[0], place[1]))


def test_sections_fit_the_cache_and_keep_groups_whole() -> None:
    def section(keys: int, group: int, lines: int) -> int:
        """Of lines whose keys and values have ``keys`` KiB."""
        k = torch.empty(1, 1, keys, 256, dtype=torch.float16)
        q = k[:, :, :1].expand(1, group, 1, 256)
        return section_lines(
            *prepare(q, k, k, None, None, None, Score(1.0, 0.0, -1, -1, 0), 0.0, None, None, None), lines
        )

    assert section(8 * 1024, 1, 64) == 4
    assert section(8 * 1024, 6, 64) == 24
    assert section(100 * 1024, 4, 64) == 4
    assert section(1, 1, 64) == 64


def test_only_tiles_with_a_flag_are_computed(launches: list[object]) -> None:
    q, k, v = _inputs(torch.float16, 150, 70, (64, 64), (2, 1))
    expected = fastattn.attention(q, k, v, causal=True, implementation="triton")
    prepared = prepare(q, k, v, None, None, None, Score(1 / 8, 0.0, -1, 0, 70 - 150), 0.0, None, None, None)
    out, lse = torch.full_like(q, 7.0), torch.full((2, 2, 150), 7.0)
    config = configs.AttentionTma(64, 64, 32, 4, 1, False)
    flags = torch.zeros(12, 2, dtype=torch.int32)
    section = section_lines(*prepared, 4)
    assert section == 4  # so that tile i is row block 2 - i // 4 of line i % 4
    flags[5, 0] = flags[2, 1] = 1
    attention_tma.launch_forward(*prepared, out, lse, config, flags)
    computed = (out.view(4, 150, 64) != 7.0).any(2)
    wanted = torch.zeros(4, 150, dtype=torch.bool)
    wanted[1, 64:128] = wanted[2, 128:] = True
    assert torch.equal(computed, wanted) and torch.equal(lse.view(4, 150) != 7.0, wanted)
    assert torch.equal(out.view(4, 150, 64)[wanted], expected.view(4, 150, 64)[wanted])
