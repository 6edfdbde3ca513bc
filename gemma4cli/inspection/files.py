"""Memory-mapped files, and places in them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.inspection.flatbuffer import Malformed


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file: the first one, and how many."""

    offset: int
    size: int


def map_file(path: Path) -> memoryview:
    """Map a whole file for reading; pages are read when touched, and a later write to the file shows through."""
    if not path.exists():
        raise G4Error(f"{path} does not exist.")
    if not path.is_file():
        raise G4Error(f"{path} is not a file.")
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turn ``Malformed`` into the sentence that names the file."""
    try:
        yield
    except Malformed as error:
        raise G4Error(
            f"{path} is damaged: {error}.", hint="Export the model again (g4 export), or copy the file again."
        ) from None


def segment_spans(segments: list[Span], base: int, file_bytes: int) -> list[Span]:
    """Place segments, given relative to `base`, in a file.

    Raises: Malformed when one does not lie in the file; that is how a file that was cut off is seen.
    """
    placed = [Span(base + segment.offset, segment.size) for segment in segments]
    for index, span in enumerate(placed):
        if span.offset + span.size > file_bytes:
            raise Malformed(
                f"segment {index} ends at byte {span.offset + span.size:,} of {file_bytes:,}, so the file was cut off"
            )
    return placed
