"""How long-running core functions report progress without knowing about terminals.

Core functions take a ``Progress`` and default to ``SILENT``; ``console.Console.progress()`` returns one that draws
rate and ETA on a terminal.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One bar: work of a known size."""

    def advance(self, amount: int, label: str | None = None) -> None:
        """Report `amount` more units done; `label` replaces the text beside the bar (e.g. the tensor at hand)."""


class Progress(Protocol):
    """A place to report phases of work to."""

    def phase(self, label: str, total: int | None, unit: str = "B") -> AbstractContextManager[Task]:
        """Open a phase of `total` units (None when unknown); `unit` is "B" for bytes or a plural noun."""

    def note(self, message: str) -> None:
        """Say something once, in the flow of progress (which file was taken, what was skipped and why)."""


class _SilentTask:
    def advance(self, amount: int, label: str | None = None) -> None:
        pass


class _SilentProgress:
    def phase(self, label: str, total: int | None, unit: str = "B") -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())

    def note(self, message: str) -> None:
        pass


SILENT: Progress = _SilentProgress()
