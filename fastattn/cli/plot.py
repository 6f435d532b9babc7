"""Rows as a PNG: the speed table as ratio bars, one line per shape and dtype, and growth with the sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.cli import cases

if TYPE_CHECKING:
    from fastattn.cli.rows import Row

#: Colours that stay apart in greyscale and for the colour-blind (Okabe-Ito), by what stands before the colon of a
#: peer's name.
COLOURS = {"sdpa": "#0072B2", "eager": "#E69F00", "compile": "#009E73"}
BAR_INCHES = 0.17
Line = tuple[str, str]  # (operation, what the line says)


def plot(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw ``rows`` (fastattn.cli.rows) to ``path``; ImportError without matplotlib, ValueError without any figures.

    Two panels (forward, forward+backward) share the lines; a bar runs from 1 (as fast as the peer) to the ratio, on a
    log scale.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'fastattn[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    shown = [row for row in rows if row.ratio is not None]
    if not shown:
        raise ValueError("no row has figures to plot")
    lines = _lines(shown)
    directions = list(dict.fromkeys(row.direction for row in shown))
    stems = [stem for stem in COLOURS if any(row.peer.startswith(stem) for row in shown)]
    bars = {
        line: [stem for stem in stems if any(_line(row) == line and _stem(row) == stem for row in shown)]
        for line in lines
    }
    places, height = _places(bars)
    figure, axes = pyplot.subplots(
        1,
        len(directions),
        figsize=(6.0 + 4.0 * len(directions), 1.4 + height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        _panel(axis, [row for row in shown if row.direction == direction], places, bars)
        axis.set_title(direction)
    axes[0][0].set_yticks([places[line] for line in lines], [text for _, text in lines], fontsize=8)
    axes[0][0].set_ylim(height, 0)
    first = shown[0]
    figure.suptitle(f"fastattn's speed over PyTorch's (1 = equal, right of it fastattn is faster)\n{first.device}, "
                    f"{first.threads} threads, torch {first.torch}", fontsize=10)  # fmt: skip
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[stem]) for stem in stems]
    figure.legend(
        handles, [_legend(stem, shown) for stem in stems], loc="outside lower center", ncols=len(stems), fontsize=9
    )
    return _write(figure, path)


def plot_scaling(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw the rows of ``--scaling``: time and memory of a call against N, beside lines that grow as N² and as N.

    The lines pass through fastattn's last point. Errors as ``plot``.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'fastattn[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    shown = [row for row in rows if row.median and row.peer_median and row.memory is not None]
    if not shown:
        raise ValueError("no row has figures to plot")
    lengths = [row.shape[2] for row in shown]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    panels = (
        ("time of a call (s)", [row.median or 0.0 for row in shown], [row.peer_median or 0.0 for row in shown], 2),
        ("memory that a call adds (MiB)", _mebibytes(row.memory for row in shown),
         _mebibytes(row.peer_memory for row in shown), 1),
    )  # fmt: skip
    for axis, (title, ours, theirs, power) in zip(axes, panels, strict=True):
        growth = [ours[-1] * (length / lengths[-1]) ** power for length in lengths]
        axis.plot(lengths, growth, color="grey", linestyle="--", linewidth=1, label="N²" if power == 2 else "N")
        axis.plot(
            lengths, theirs, color=COLOURS["sdpa"], marker="s", markersize=4, label="F.scaled_dot_product_attention"
        )
        axis.plot(lengths, ours, color=COLOURS["compile"], marker="o", markersize=4, label="fastattn.attention")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
        axis.set_xlabel("N")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    first = shown[0]
    figure.suptitle(f"attention forward, {first.dtype}, (B, H, N, D) = (1, 1, N, {first.shape[-1]})\n{first.device}, "
                    f"{first.threads} threads, torch {first.torch}", fontsize=10)  # fmt: skip
    return _write(figure, path)


def _mebibytes(sizes: Iterable[int | None]) -> list[float]:
    """On a logarithmic axis: what is below one page counts as one."""
    return [max(size or 0, 4096) / 2**20 for size in sizes]


def _write(figure: Any, path: str | Path) -> Path:
    import matplotlib.pyplot as pyplot

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _line(row: Row) -> Line:
    return row.op, f"{cases.title(row.op, row.case)}  {'x'.join(map(str, row.shape))}  {row.dtype}"


def _lines(rows: Sequence[Row]) -> list[Line]:
    """One entry per line of the plot, operations together, in order of appearance."""
    found = list(dict.fromkeys(map(_line, rows)))
    ops = list(dict.fromkeys(op for op, _ in found))
    return sorted(found, key=lambda line: ops.index(line[0]))


def _stem(row: Row) -> str:
    return row.peer.partition(":")[0]


def _places(bars: dict[Line, list[str]]) -> tuple[dict[Line, float], float]:
    """Centre of each line in inches from the top, with a gap between operations, and the height of all."""
    places: dict[Line, float] = {}
    at = 0.1
    before = next(iter(bars))[0]
    for line, stems in bars.items():
        step = BAR_INCHES * len(stems) + 0.1
        at += 0.15 if line[0] != before else 0.0
        before = line[0]
        places[line] = at + step / 2
        at += step
    return places, at + 0.1


def _panel(axis: Any, rows: Sequence[Row], places: dict[Line, float], bars: dict[Line, list[str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for row in rows:
        ratio = row.ratio or 1.0
        stem, stems = _stem(row), bars[_line(row)]
        middle = places[_line(row)] + (stems.index(stem) - (len(stems) - 1) / 2) * BAR_INCHES
        axis.barh(middle, ratio - 1, left=1, height=0.85 * BAR_INCHES, color=COLOURS[stem])
        axis.annotate(
            f"{ratio:.2f}", (ratio, middle), xytext=(3 if ratio >= 1 else -3, 0), textcoords="offset points",
            ha="left" if ratio >= 1 else "right", va="center", fontsize=7,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    ratios = [row.ratio or 1.0 for row in rows]
    # Room for the figures at the bars' ends.
    axis.set_xlim(min(0.7, min(ratios, default=1) / 1.4), max(2.0, max(ratios, default=1) * 1.6))
    axis.xaxis.set_major_locator(LogLocator(base=2))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.axvspan(axis.get_xlim()[0], 1, color="#D55E00", alpha=0.08, linewidth=0)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="y", length=0)
    axis.set_axisbelow(True)


def _legend(stem: str, rows: Sequence[Row]) -> str:
    backends = sorted({row.peer.partition(":")[2] for row in rows if row.peer.startswith(stem)} - {""})
    words = {"sdpa": "F.scaled_dot_product_attention", "eager": "torch eager", "compile": "torch.compile"}[stem]
    return f"against {words}" + (f" ({', '.join(backends)})" if backends else "")
