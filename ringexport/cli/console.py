"""The terminal: results go to stdout, everything else to stderr; bars only where someone looks."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.progress
from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ringexport.progress import NoProgress, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BarProgress", "LineProgress", "Terminal", "configure_logging", "format_bytes"]

_PIPE_COLUMNS = 160
_HEARTBEAT_SECONDS = 30.0
_BAR_COLUMNS = 14
_COLUMNS_BESIDE_NAME = 50  # spinner, bar, percent, "1234.5/1234.5 MB", time left, and spaces
_GOOD, _BAD = "green", "red"


class _Console(Console):
    """A console that leaves a closed pipe to `ringexport.cli.main`, as every other writer does."""

    def on_broken_pipe(self) -> None:
        """Raise the error again; rich would end the process with exit code 1."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Terminal:
    """Where a command writes to.

    Args:
        color: False for none at all.
        quiet: drop progress and summaries.
    """

    def __init__(self, *, color: bool = True, quiet: bool = False) -> None:
        self._quiet = quiet
        self._out = _console(sys.stdout, color=color)
        self._err = _console(sys.stderr, color=color)

    def say(self, text: str, *, style: str | None = None) -> None:
        """Write a line for people to stderr, unless quiet."""
        if not self._quiet:
            self._err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def show_prompt(self, text: str) -> None:
        """Write the beginning of a text dimmed, for people who see its continuation follow."""
        if not self._quiet and self._err.is_terminal and self._out.is_terminal:
            self._err.print(
                text, style="dim", end="", markup=False, highlight=False, soft_wrap=True
            )

    def result(self, text: str) -> None:
        """Write a line of the result to stdout."""
        self._out.print(text, markup=False, highlight=False, soft_wrap=True)

    def facts(self, facts: dict[str, str]) -> None:
        """Write names and values to stdout, one pair a line, values aligned."""
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.result(f"{name:<{width}}  {value}")

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        title: str | None = None,
        right: Sequence[int] = (),
        whole: Sequence[int] = (0,),
    ) -> None:
        """Write a table to stdout.

        Args:
            columns: headings.
            rows: texts; "yes" and "ok" are shown in green, "no" and "FAIL" in red.
            title: a line above it.
            right: columns that are flush right.
            whole: columns that stay on one line where others have to be broken.
        """
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            flush: JustifyMethod = "right" if index in right else "left"
            table.add_column(name, justify=flush, overflow="fold", no_wrap=index in whole)
        for row in rows:
            table.add_row(*(_verdict(cell) for cell in row))
        if title:
            self._out.print(f"\n{title}", style="bold", markup=False, highlight=False)
        self._out.print(table, highlight=False)

    @contextmanager
    def progress(self, *, keep_lines: bool = True) -> "Iterator[Progress]":
        """Yield a `Progress` that suits the terminal and clean up after it.

        Args:
            keep_lines: leave a line for each finished stage; without it, bars come and go on a
                terminal and nothing is written elsewhere.
        """
        if self._quiet or not (keep_lines or self._err.is_terminal):
            yield NoProgress()
        elif self._err.is_terminal:
            bar = BarProgress(self._err, keep_lines=keep_lines)
            try:
                yield bar
            finally:
                bar.close()
        else:
            yield LineProgress(self._err)


class BarProgress:
    """A bar for the open stage, and a line for each finished one if they are to be kept."""

    def __init__(self, console: Console, *, keep_lines: bool = True) -> None:
        self._console = console
        self._keep_lines = keep_lines
        self._bar: rich.progress.Progress | None = None
        self._stage = ""
        self._start = 0.0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """Open a stage and show its bar."""
        self.finish()
        self._stage, self._start = stage, time.perf_counter()
        amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns: list[rich.progress.ProgressColumn] = [
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
        ]
        if total is None:
            columns.append(TimeElapsedColumn())
        else:
            columns += [BarColumn(_BAR_COLUMNS), TaskProgressColumn(), amount]
            columns.append(TimeRemainingColumn())
        self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
        room = max(8, self._console.width - _COLUMNS_BESIDE_NAME)
        name = stage if len(stage) <= room else stage[: room - 1] + "…"
        self._bar.add_task(name, total=total)
        self._bar.start()

    def advance(self, amount: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        self._console.print(f"  note: {message}", markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Replace the bar by a line with the time it took."""
        if self._bar is None:
            return
        self.close()
        seconds = time.perf_counter() - self._start
        if self._keep_lines:
            self._console.print(
                f"[green]✓[/green] {self._stage} [dim]{seconds:.1f} s[/dim]", highlight=False
            )

    def close(self) -> None:
        """Take the bar away without a word, as after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineProgress:
    """One line per finished stage, and a sign of life every half minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._start = self._beat = 0.0
        self._done, self._total, self._unit = 0, 0, ""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """Open a stage."""
        self.finish()
        self._stage, self._total, self._unit, self._done = stage, total or 0, unit, 0
        self._start = self._beat = time.perf_counter()

    def advance(self, amount: int = 1) -> None:
        """Count, and write a line if nothing was written for long."""
        self._done += amount
        now = time.perf_counter()
        if now - self._beat > _HEARTBEAT_SECONDS and self._total:
            self._beat = now
            self._print(f"{self._stage}: {100 * self._done // self._total}% …")

    def note(self, message: str) -> None:
        """Write a line."""
        self._print(f"note: {message}")

    def finish(self) -> None:
        """Write the line of the stage."""
        if self._stage is None:
            return
        seconds = time.perf_counter() - self._start
        self._print(f"{self._stage}: {self._amount()}{seconds:.1f} s")
        self._stage = None

    def _amount(self) -> str:
        if not self._done:
            return ""
        if self._unit == "bytes":
            return f"{format_bytes(self._done)} in "
        return f"{self._done:,} {self._unit} in "

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def configure_logging() -> Callable[[], None]:
    """Show the log messages of ringexport on stderr; returns what ends that."""
    log = logging.getLogger("ringexport")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)

    def undo() -> None:
        log.removeHandler(handler)
        log.setLevel(level)

    return undo


def format_bytes(count: int) -> str:
    """Return a size for people, in powers of ten as disks are sold."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _console(stream: object, *, color: bool) -> Console:
    terminal = getattr(stream, "isatty", lambda: False)()
    return _Console(
        file=stream,  # type: ignore[arg-type]  # sys.stdout or sys.stderr
        no_color=not color,
        width=None if terminal else _PIPE_COLUMNS,
        emoji=False,
    )


def _verdict(cell: str) -> str:
    style = {"ok": _GOOD, "yes": _GOOD, "no": _BAD, "FAIL": _BAD}.get(cell)
    escaped = cell.replace("[", r"\[")
    return f"[{style}]{escaped}[/{style}]" if style else escaped
