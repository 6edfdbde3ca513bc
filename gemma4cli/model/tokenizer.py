"""Text to token ids and back, from the model's own tokenizer.json.

Encoding is the `tokenizers` library's. Decoding is per token, so that a stream of ids becomes a stream of text:
byte-fallback tokens (`<0xE2>`) are collected until they make a whole character, and bytes that cannot become one are
shown as U+FFFD as soon as that is certain. `decode` is the same walk, so streamed pieces always add up to it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Decoders that treat each token alone; with any other (one that strips the first space, say) text per token is wrong.
_CONTEXT_FREE_DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse"}


class HasVocabulary(Protocol):
    """What `check_vocabulary` needs of a model's config."""

    @property
    def vocab_size(self) -> int: ...


class Tokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, backend: tokenizers.Tokenizer, description: dict[str, Any], source: Path) -> None:
        """Wrap a loaded tokenizer; `description` is its parsed JSON, `source` the file that messages name."""
        self._backend = backend
        self._source = source
        added = description.get("added_tokens", [])
        self.added_tokens: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.special_tokens: dict[str, int] = {token["content"]: token["id"] for token in added if token.get("special")}
        self._special_ids = frozenset(self.special_tokens.values())
        self._byte_fallback = bool(description["model"].get("byte_fallback"))

    @classmethod
    def from_dir(cls, folder: Path) -> Tokenizer:
        """Load `tokenizer.json` of a model folder, checkpoint or bundle."""
        import tokenizers

        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise G4Error(
                f"{folder} has no {TOKENIZER_FILE}.",
                hint="Copy it from the model's repository, or pull the model again.",
            )
        description = read_json(path)
        damaged = f"{path} is damaged"
        if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
            raise G4Error(f"{damaged}: it has no tokenizer model.", hint="Fetch the file again.")
        _require_context_free(description.get("decoder"), path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise G4Error(f"{damaged}: {error}.", hint="Fetch the file again.") from None
        return cls(backend, description, path)

    @cached_property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_vocabulary(self, config: HasVocabulary) -> None:
        """Refuse a tokenizer whose ids do not fit the model's embedding (a smaller one is padding, and fine)."""
        if self.size > config.vocab_size:
            raise G4Error(
                f"{self._source} has token ids up to {self.size - 1}, but the model's vocabulary has "
                f"{config.vocab_size} entries: they do not belong together.",
                hint="Use the tokenizer.json of this very model.",
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; names of control tokens in it become those tokens. Adds no BOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int | None:
        """Return the id of exactly this token, or None."""
        return self._backend.token_to_id(token)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*(stream.push(i) for i in ids), stream.finish()])

    def stream(self, *, skip_special: bool = True) -> Detokenizer:
        """Return a fresh incremental decoder."""
        return Detokenizer(self, skip_special=skip_special)

    def piece(self, token_id: int, *, skip_special: bool = True) -> str | bytes:
        """Return what one token contributes: text, or a single byte of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return REPLACEMENT  # an embedding row without a token, in a padded vocabulary
        if token_id in self._special_ids:
            return "" if skip_special else token
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self._backend.decode([token_id], skip_special_tokens=False)


class Detokenizer:
    """Turns a stream of ids into a stream of text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is now certain; often, but not always, that token's own text."""
        piece = self._tokenizer.piece(token_id, skip_special=self._skip_special)
        if isinstance(piece, bytes):
            return self._bytes.decode(piece)
        # A token that is skipped ends no character: `tokenizers` takes those out before it joins bytes.
        return self.finish() + piece if piece else ""

    def finish(self) -> str:
        """Return what is left of an unfinished character, as U+FFFD; the stream can go on afterwards."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest


def _require_context_free(decoder: dict[str, Any] | None, path: Path) -> None:
    parts = [decoder] if decoder else []
    while parts:
        part = parts.pop()
        kind = part.get("type")
        if kind not in _CONTEXT_FREE_DECODERS:
            raise G4Error(
                f"{path} decodes with {kind!r}, which Gemma's tokenizer does not use.",
                hint="g4 runs Gemma 4 models only; use this model's own tokenizer.json.",
            )
        parts.extend(part.get("decoders", []))
