"""Options that several commands share, each with one spelling and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_count(text: str) -> int:
    """Read a number of tokens as people write it: 4096, 32k, 128K, 1m (k = 1,024)."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in ("k", "m") else (text, "")
    if not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 4096, 32k or 128k")
    return int(number) * _UNITS[unit]


def parse_gibibytes(text: str) -> int:
    """Read a size of memory in GiB, as cards are named: 24, 24g, 31.5GB."""
    number = text.lower().removesuffix("b").removesuffix("gi").removesuffix("g")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise typer.BadParameter(f"{text!r} is not a size of memory; write 24 or 24g for 24 GiB")
    return int(size * (1 << 30))


JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result; no notes, no progress.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write.", show_default="in the workspace")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Write nothing: report files, bytes, peak memory, and whether it fits.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1.")]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        metavar="TOKENS",
        parser=parse_count,
        help="Context length in tokens, e.g. 4096 or 128k; an exported bundle has its own.",
        show_default="4096, or the model's if that is less",
    ),
]
CompileOption = Annotated[bool, typer.Option("--compile", help="Use torch.compile (checkpoints in PyTorch only).")]
