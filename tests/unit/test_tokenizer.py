"""Text and ids: streamed text adds up, never ends inside a character, and damaged files are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from gemma4cli.errors import G4Error
from gemma4cli.model.tokenizer import Tokenizer
from tests.support.chat_fixture import DEMO

TOKENIZER = Tokenizer.from_dir(DEMO)
LIBRARY = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
# "▁" is how the vocabulary writes a space, so a text that contains it cannot come back as it was.
ANY_TEXT = st.text().map(lambda text: text.replace("▁", ""))
Change = Callable[[dict[str, object]], object]
BYTES = st.binary(max_size=12)


def byte_ids(data: bytes) -> list[int]:
    ids = [TOKENIZER.token_id(f"<0x{byte:02X}>") for byte in data]
    assert None not in ids
    return ids  # type: ignore[return-value]


@given(ANY_TEXT)
def test_text_survives_the_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == LIBRARY.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special=False) == LIBRARY.decode(ids, skip_special_tokens=False)


@given(ANY_TEXT)
def test_streamed_pieces_add_up_and_hold_whole_characters(text: str) -> None:
    stream = TOKENIZER.stream(skip_special=False)
    pieces = [stream.push(i) for i in TOKENIZER.encode(text)]
    assert stream.finish() == "", "valid text leaves nothing behind"
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces) or "�" in text
    for piece in pieces:
        piece.encode("utf-8")


@given(st.lists(st.one_of(BYTES, st.sampled_from([" the", "Paris", "<eos>"])), max_size=8))
@example([b"\xc2", "<eos>", b"\x80"])
def test_any_bytes_decode_as_python_decodes_them(parts: list[bytes | str]) -> None:
    """Runs of bytes between ordinary tokens: each run alone, as UTF-8 with U+FFFD for what is not."""
    ids: list[int] = []
    expected = ""
    run = b""
    for part in parts:
        if isinstance(part, bytes):
            ids += byte_ids(part)
            run += part
        else:
            ids += TOKENIZER.encode(part)
            if part != "<eos>":
                expected += run.decode("utf-8", "replace") + part
                run = b""
    expected += run.decode("utf-8", "replace")
    assert TOKENIZER.decode(ids) == expected


def test_an_emoji_of_many_bytes_appears_when_it_is_whole() -> None:
    stream = TOKENIZER.stream()
    assert [stream.push(i) for i in byte_ids("🚀".encode())] == ["", "", "", "🚀"]


def test_half_a_character_is_replaced_only_when_its_rest_cannot_come() -> None:
    stream = TOKENIZER.stream()
    first, second, third = byte_ids("€".encode())
    assert stream.push(first) + stream.push(second) == ""
    assert stream.push(TOKENIZER.encode("a")[0]) == "�a"
    assert stream.push(first) + stream.push(second) == ""
    assert stream.finish() == "�"
    assert [stream.push(i) for i in (first, second, third)] == ["", "", "€"]


def test_special_tokens_are_silent_unless_wanted() -> None:
    eos = TOKENIZER.token_id("<eos>")
    assert eos is not None
    assert TOKENIZER.decode([eos]) == ""
    assert TOKENIZER.decode([eos], skip_special=False) == "<eos>"


def test_an_id_without_a_token_is_shown_as_unknown() -> None:
    assert TOKENIZER.decode([TOKENIZER.size + 5]) == "�"


@dataclass(frozen=True)
class Config:
    vocab_size: int


def test_the_vocabulary_must_hold_every_id() -> None:
    TOKENIZER.check_vocabulary(Config(TOKENIZER.size))
    TOKENIZER.check_vocabulary(Config(TOKENIZER.size + 64))
    with pytest.raises(G4Error, match=f"token ids up to {TOKENIZER.size - 1}, but the model's vocabulary has"):
        TOKENIZER.check_vocabulary(Config(TOKENIZER.size - 1))


def write(folder: Path, change: Change) -> Path:
    document = json.loads((DEMO / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(change(document)))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "has no tokenizer model"),
        (lambda d: {**d, "model": None}, "has no tokenizer model"),
        (lambda d: {**d, "model": {"type": "BPE", "vocab": 3}}, "is damaged"),
        (lambda d: {**d, "decoder": {"type": "ByteLevel"}}, "decodes with 'ByteLevel'"),
        (
            lambda d: {**d, "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip"}]}},
            "decodes with 'Strip'",
        ),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(G4Error, match=message) as caught:
        Tokenizer.from_dir(write(tmp_path, change))
    assert "tokenizer.json" in str(caught.value)


def test_a_missing_and_a_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(G4Error, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(G4Error, match="is not valid JSON"):
        Tokenizer.from_dir(tmp_path)
