"""Tables and progress for the terminal: drawn by ``rich`` where it is installed, plain text otherwise."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

#: A job is silent for this long (seconds) before its progress bar appears.
QUIET_SECONDS = 2.0


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    left: int = 1,
    styles: Sequence[str] | None = None,
) -> None:
    """Print ``rows`` under ``columns``: the first ``left`` columns flush left, the others (figures) flush right.

    ``styles`` is a rich colour per row ("" for none); plain output ignores it, so the words alone must carry the
    meaning.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(columns, rows, title, left)
        return
    width = None if sys.stdout.isatty() else 1000  # nothing folds in a file or a pipe
    table = Table(title=title or None, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for index, row in enumerate(rows):
        style = styles[index] if styles else ""
        table.add_row(*(Text(cell) for cell in row), style=style or None)
    Console(width=width, highlight=False).print(table)


def _print_plain(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, left: int) -> None:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    if title:
        print(title)
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


class Progress:
    """A progress bar on stderr for a job of ``total`` steps; it shows itself after QUIET_SECONDS, then goes away.

    It is drawn only when ``step`` is called: a refreshing thread would disturb what is being timed.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = -1
        self.start = time.perf_counter()
        self.bar: Any = None
        self.task: Any = None
        self.width = 0

    def __enter__(self) -> Progress:
        return self

    def step(self, label: str) -> None:
        """The step called ``label`` begins; the one before it is done."""
        self.done += 1
        if not sys.stderr.isatty() or time.perf_counter() - self.start < QUIET_SECONDS:
            return
        if self.bar is None and not self._start_rich():
            line = f"{self.title} {self.done}/{self.total}  {label}"[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write("\r" + line.ljust(self.width))
            sys.stderr.flush()
            self.width = len(line)
            return
        self.bar.update(self.task, completed=self.done, description=f"{self.title}: {label}")
        self.bar.refresh()

    def _start_rich(self) -> bool:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            return False
        self.bar = RichProgress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=self.total)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.width:
            sys.stderr.write("\r" + " " * self.width + "\r")
