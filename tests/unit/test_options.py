"""Numbers of tokens as people write them."""

from __future__ import annotations

import pytest
import typer

from gemma4cli.commands.options import parse_count


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("4096", 4096), ("32k", 32768), ("128K", 131072), ("1m", 1 << 20)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "1.5k", "4 k", "4g", "٣"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a number of tokens; write 4096, 32k or 128k"):
        parse_count(text)
