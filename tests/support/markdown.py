"""Shell blocks of a Markdown page, and the reason a page gives for not running one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

_BLOCK = re.compile(r"(?:^<!-- (?P<reason>[^>]*) -->\n)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One ```bash block; `reason` is the comment on the line above it, or None."""

    page: str
    line: int
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def shell_blocks(path: Path) -> list[Block]:
    """Return the ```bash blocks of a page, in order."""
    page = path.read_text(encoding="utf-8")
    return [
        Block(path.name, page.count("\n", 0, match.start("text")), match["text"], match["reason"])
        for match in _BLOCK.finditer(page)
    ]
