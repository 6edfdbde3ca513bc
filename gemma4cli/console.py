"""The one place that prints: data on stdout, everything else on stderr.

Three modes. `human`: tables and text on stdout; notes, warnings, progress on stderr. `json`: exactly one document on
stdout (`Console.result`, or the error). `quiet`: the one line a script needs on stdout, warnings and errors on stderr.
rich is imported only when a table or a progress bar is really drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.progress import SILENT, Progress, Task

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

Mode = Literal["human", "json", "quiet"]

_PIPE_WIDTH = 500  # a table in a file or pipe is as wide as its content, for grep and less -S
_PLAIN_PERIOD_S = 30.0
_WORTH_TELLING_S = 1.0


class Console:
    """What a command may say and where it goes; one per process (see `active`)."""

    def __init__(self, mode: Mode = "human", stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.mode: Mode = mode
        self._stdout = stdout
        self._stderr = stderr
        self._bars: RichProgress | None = None
        self.answered = False

    # The streams are looked up when used: tests and the shell replace sys.stdout after import.
    @property
    def stdout(self) -> TextIO:
        return self._stdout or sys.stdout

    @property
    def stderr(self) -> TextIO:
        return self._stderr or sys.stderr

    def result(self, document: Any, render: Callable[[], None] | None = None, *, essence: str | None = None) -> None:
        """Give the command's result, once.

        Args:
            document: what --json prints; dataclasses and paths are the caller's to convert.
            render: draws the result for people, through `line` and `table`.
            essence: the one line --quiet prints, e.g. the path that was written.
        """
        if self.mode == "json":
            self.document(document)
        elif self.mode == "quiet":
            if essence is not None:
                self.line(essence)
        elif render is not None:
            render()

    def document(self, document: Any) -> None:
        """Print the JSON document; a second one in the same process is a bug."""
        assert not self.answered, "--json promises exactly one document"
        self.answered = True
        self.line(json.dumps(document, indent=2, ensure_ascii=False))

    def line(self, text: str = "") -> None:
        """Print one line of data on stdout."""
        self.stdout.write(text + "\n")
        self.stdout.flush()

    def write(self, text: str) -> None:
        """Stream a piece of data to stdout, visible at once."""
        self.stdout.write(text)
        self.stdout.flush()

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, align: str = "", title: str | None = None
    ) -> None:
        """Draw a table on stdout. `align` has one letter per column, l or r; missing letters mean l."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, column in enumerate(columns):
            right = align[index : index + 1] == "r"
            table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in rows:
            table.add_row(*("" if cell is None else str(cell) for cell in row))
        rich = self._rich(self.stdout)
        with rich.capture() as drawn:
            rich.print(table)
        self.stdout.write("\n".join(line.rstrip() for line in drawn.get().splitlines()) + "\n")
        self.stdout.flush()

    def note(self, message: str) -> None:
        """Say what is being done, on stderr; silent with --quiet."""
        if self.mode != "quiet":
            self._say(message)

    def warn(self, message: str) -> None:
        """Say what the user should know although the command goes on."""
        self._say(f"warning: {message}")

    def report(self, message: str) -> None:
        """Say what the user asked for explicitly (--stats), on stderr in every mode."""
        self._say(message)

    def allows_style(self, stream: TextIO) -> bool:
        """Whether escape codes may go to a stream: a capable terminal, and no NO_COLOR."""
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def next(self, command: str) -> None:
        """Name the command that usually follows."""
        if self.mode == "human":
            self._say(f"Next: {command}")

    def error(self, error: G4Error) -> None:
        """Print a failure: sentence and hint on stderr, and the JSON document in --json mode."""
        self._say(f"error: {error.message}")
        if error.hint:
            self._say(f"hint: {error.hint}")
        if self.mode == "json" and not self.answered:
            self.document({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})

    def progress(self) -> Progress:
        """Return what core functions report to: bars on a terminal, sparse lines in a log, nothing with --quiet."""
        if self.mode == "quiet":
            return SILENT
        return _BarProgress(self) if self.stderr.isatty() else _LineProgress(self)

    def _say(self, message: str) -> None:
        if self._bars is not None:
            self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stderr.write(message + "\n")
            self.stderr.flush()

    def _rich(self, stream: TextIO) -> RichConsole:
        from rich.console import Console as RichConsole

        width = None if stream.isatty() else _PIPE_WIDTH
        return RichConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)

    @contextlib.contextmanager
    def _live_bars(self) -> Iterator[RichProgress]:
        """The shared live display: the first phase opens it, nested phases join it."""
        if self._bars is not None:
            yield self._bars
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[done]}", markup=False, justify="right"),
            TimeRemainingColumn(compact=True),
            console=self._rich(self.stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with self._bars:
                yield self._bars
        finally:
            self._bars = None


@dataclass
class _Meter:
    """Counts a phase's work; knows how to say amount, rate and remaining time."""

    label: str
    total: int | None
    unit: str
    done: int = 0
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def amount(self, count: float) -> str:
        return format_bytes(count) if self.unit == "B" else f"{count:,.0f} {self.unit}"

    def rate(self) -> str:
        per_second = self.done / max(self.elapsed_s, 1e-9)
        return f"{format_bytes(per_second)}/s" if self.unit == "B" else f"{per_second:,.1f}/s"

    def so_far(self) -> str:
        if self.total is None:
            return f"{self.amount(self.done)} {self.rate()}"
        done = format_bytes(self.done) if self.unit == "B" else f"{self.done:,}"
        return f"{done}/{self.amount(self.total)} {self.rate()}"

    def remaining(self) -> str:
        if not self.total or not self.done:
            return "ETA unknown"
        return f"ETA {format_duration(self.elapsed_s * (self.total - self.done) / self.done)}"

    def summary(self) -> str:
        return f"{self.label}: {self.amount(self.done)} in {format_duration(self.elapsed_s)} ({self.rate()})"


class _BarProgress:
    """Bars with rate and ETA, drawn by rich on stderr; a finished phase leaves one line behind."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, label: str, total: int | None, unit: str = "B") -> AbstractContextManager[Task]:
        return self._phase(_Meter(label, total, unit))

    @contextlib.contextmanager
    def _phase(self, meter: _Meter) -> Iterator[Task]:
        with self._console._live_bars() as bars:
            bar = bars.add_task(meter.label, total=meter.total, done="")

            class BarTask:
                def advance(self, amount: int, label: str | None = None) -> None:
                    meter.done += amount
                    description = meter.label if label is None else f"{meter.label} {label}"
                    bars.update(bar, completed=meter.done, description=description[-44:], done=meter.so_far())

            yield BarTask()
            bars.remove_task(bar)
            if meter.elapsed_s >= _WORTH_TELLING_S:
                self._console.note(meter.summary())

    def note(self, message: str) -> None:
        self._console.note(message)


class _LineProgress:
    """For logs and pipes: a line per phase that took a second or more, and one every half minute meanwhile."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, label: str, total: int | None, unit: str = "B") -> AbstractContextManager[Task]:
        return self._phase(_Meter(label, total, unit))

    @contextlib.contextmanager
    def _phase(self, meter: _Meter) -> Iterator[Task]:
        console = self._console

        class LineTask:
            told = 0.0

            def advance(self, amount: int, label: str | None = None) -> None:
                meter.done += amount
                if meter.elapsed_s - self.told >= _PLAIN_PERIOD_S:
                    self.told = meter.elapsed_s
                    console.note(f"{meter.label}: {meter.so_far()}, {meter.remaining()}")

        yield LineTask()
        if meter.elapsed_s >= _WORTH_TELLING_S:
            console.note(meter.summary())

    def note(self, message: str) -> None:
        self._console.note(message)


def format_duration(seconds: float) -> str:
    """Render a duration with the precision people use: 0.42 s, 12.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


_active: Console | None = None


def open_console(*, json: bool = False, quiet: bool = False) -> Console:
    """Make the process's console from a command's flags; the error boundary prints through the same one."""
    global _active
    if json and quiet:
        raise G4Error(
            "--json and --quiet exclude each other.",
            hint="--json is already silent apart from its document.",
            exit_code=2,
        )
    _active = Console("json" if json else "quiet" if quiet else "human")
    return _active


def active_console() -> Console | None:
    """Return the console a command opened, or None when the command line did not get that far."""
    return _active


def reset_console() -> None:
    """Forget the process's console, at the start of every command line."""
    global _active
    _active = None
