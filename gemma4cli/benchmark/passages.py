"""A text as passages to read from position 0, and which of their tokens count.

Where a text has turns of the model (`<|turn>model … <turn|>`), what the model would have said counts, the end of its
turn included, and not what others say: a chat model was trained on its own turns only. Of any other text all counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat

WINDOW = 512
_ROLE = "model"


@dataclass(frozen=True)
class Passage:
    """Token ids, beginning with BOS where the model has one; `counted` says which of them are to be predicted."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class Text:
    """A text that was read: its name, hash and passages."""

    name: str
    sha256: str
    passages: tuple[Passage, ...]

    @property
    def tokens(self) -> int:
        return sum(len(passage.ids) for passage in self.passages)

    @property
    def counted(self) -> int:
        return sum(sum(passage.counted) for passage in self.passages)


def read_text(path: Path, chat: Chat, *, limit: int | None = None, window: int = WINDOW) -> Text:
    """Split a file at every BOS it spells out, and into windows of at most `window` tokens.

    Args:
        limit: stop after this many tokens; whole passages only, except for the first.
    Raises: G4Error when the file is not UTF-8, or leaves nothing to predict.
    """
    data = path.read_bytes()
    try:
        ids = chat.tokenizer.encode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise G4Error(f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}.") from None
    counted = _model_turns(ids, chat)
    passages, taken = [], 0
    for passage in _passages(ids, counted, chat.bos_id, window):
        if limit is not None and taken + len(passage.ids) > limit:
            if not passages:
                passages.append(Passage(passage.ids[:limit], passage.counted[:limit]))
            break
        passages.append(passage)
        taken += len(passage.ids)
    text = Text(path.name, hashlib.sha256(data).hexdigest(), tuple(passages))
    if not text.counted:
        raise G4Error(f"{path} has nothing to predict in its first {text.tokens} tokens.", hint="Use a longer text.")
    return text


def _passages(ids: list[int], counted: list[bool], bos: int | None, window: int) -> list[Passage]:
    starts = [0, *(index for index, token in enumerate(ids) if token == bos and index)]
    first = [] if bos is None else [bos]
    passages = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        begin = start + (bos is not None and ids[start : start + 1] == [bos])
        room = window - len(first)
        for at in range(begin, end, room):
            piece = slice(at, min(at + room, end))
            flags = [False] * len(first) + counted[piece]
            # Nothing comes before the first token of a passage that could predict it.
            passages.append(Passage((*first, *ids[piece]), (False, *flags[1:])))
    return [passage for passage in passages if any(passage.counted)]


def _model_turns(ids: list[int], chat: Chat) -> list[bool]:
    """Mark the tokens of the model's turns; all tokens when the text has none."""
    names = (chat.tokens.get("sot_token", "<|turn>"), chat.tokens.get("eot_token", "<turn|>"))
    opening, closing = (chat.tokenizer.token_id(name) for name in names)
    if opening is None or closing is None or opening not in ids:
        return [True] * len(ids)
    flags, inside, role = [], False, None
    for token in ids:
        flags.append(inside)
        if token == opening:
            inside, role = False, ""
        elif token == closing:
            inside = False
        elif role is not None:
            piece = chat.tokenizer.piece(token)
            role += piece if isinstance(piece, str) else ""
            if "\n" in role:
                inside, role = role.strip() == _ROLE, None
    return flags
