"""The one exception that means "the user can fix this".

Everything below the command line raises ``G4Error``; ``cli.main`` catches it once and prints one sentence and
one hint. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class G4Error(Exception):
    """A failure with a cause the user can act on.

    Args:
        message: one sentence saying what is wrong, naming the file, key or value.
        hint: what to do next, preferably a command; printed on its own line.
        exit_code: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
