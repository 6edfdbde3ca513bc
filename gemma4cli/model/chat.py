"""Conversations to token ids, and generated ids back to thinking and answer.

Everything comes from the model's folder: the template, BOS and stop ids, the markers of the thinking channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json
from gemma4cli.model.chat_template import render
from gemma4cli.model.settings import GenerationDefaults
from gemma4cli.model.tokenizer import Detokenizer, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# The names of Gemma 4's channel tokens, for folders whose tokenizer_config.json lacks the aliases (GGUF has none).
_CHANNEL_TOKENS = ("<|channel>", "<channel|>")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class ThinkingMarkers:
    """The ids that open and close the thinking channel."""

    open_id: int
    close_id: int


@dataclass(frozen=True)
class Chat:
    """A model's way of talking.

    Attributes:
        tokenizer: of the same folder.
        defaults: stop ids, BOS and sampling defaults from generation_config.json.
        template: Jinja source, or None for a base model.
        tokens: names of special tokens (`bos_token`, `eot_token`, …) that the template may use.
        markers: of the thinking channel; None when this model has none.
    """

    tokenizer: Tokenizer
    defaults: GenerationDefaults
    template: str | None
    tokens: dict[str, str]
    markers: ThinkingMarkers | None

    @classmethod
    def from_dir(cls, folder: Path) -> Chat:
        """Read what a model folder, checkpoint or bundle says about talking to it."""
        tokenizer = Tokenizer.from_dir(folder)
        config_file = folder / TOKENIZER_CONFIG_FILE
        config = read_json(config_file) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise G4Error(f"{config_file} is not a JSON object.", hint="The file is damaged; fetch it again.")
        tokens = _named_tokens(config)
        return cls(
            tokenizer=tokenizer,
            defaults=GenerationDefaults.from_dir(folder),
            template=_find_template(folder, config),
            tokens=tokens,
            markers=_find_markers(tokenizer, tokens),
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer."""
        return self.defaults.stop_ids

    @property
    def bos_id(self) -> int | None:
        """The id every prompt starts with: generation_config.json's, else that of the tokenizer's `bos_token`."""
        if self.defaults.bos_id is not None:
            return self.defaults.bos_id
        token = self.tokens.get("bos_token")
        return None if token is None else self.tokenizer.token_id(token)

    def prompt_ids(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """Return the ids of a conversation that the model is to continue, with exactly one BOS, in front.

        Control tokens spelled out in a message stay text: only the template writes control tokens.
        """
        if self.template is None:
            raise G4Error("This model has no chat template.", hint="Run with --raw to continue a text.")
        mark = _unused_character(messages)
        shielded = [{**m, "content": self._shield(m["content"], mark)} for m in messages]
        text = render(
            self.template,
            {**self.tokens, "messages": shielded, "add_generation_prompt": True, "enable_thinking": thinking},
        )
        return self._with_bos([i for part in text.split(mark) for i in self.tokenizer.encode(part)])

    def raw_ids(self, text: str) -> list[int]:
        """Return the ids of a text as it is, control tokens included, with exactly one BOS in front."""
        return self._with_bos(self.tokenizer.encode(text))

    def splitter(self, prompt_ids: Sequence[int]) -> ThinkingSplitter:
        """Return what separates thinking from answer in the continuation of this prompt."""
        return ThinkingSplitter(self.tokenizer, self.markers, prompt_ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.bos_id
        if bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        return [bos, *ids[start:]]

    def _shield(self, text: str, mark: str) -> str:
        """Break control-token names in a message with a mark at which the rendered text is cut before encoding."""
        for token in self._control_tokens():
            if token in text:
                text = text.replace(token, token[0] + mark + token[1:])
        return text

    def _control_tokens(self) -> list[str]:
        """Special tokens, and other added tokens that the template writes; longest first."""
        template = self.template or ""
        names = {t for t in self.tokenizer.added_tokens if t in self.tokenizer.special_tokens or t in template}
        return sorted((t for t in names if len(t) > 1), key=len, reverse=True)


@dataclass(frozen=True)
class Piece:
    """A piece of generated text and the channel it belongs to."""

    channel: Literal["thinking", "answer"]
    text: str


class ThinkingSplitter:
    """Turns generated ids into pieces of thinking and answer; the channel's markers and its name line are dropped."""

    def __init__(self, tokenizer: Tokenizer, markers: ThinkingMarkers | None, prompt_ids: Sequence[int] = ()) -> None:
        self._markers = markers
        self._stream: Detokenizer = tokenizer.stream()
        self._thinking = markers is not None and _ends_inside(prompt_ids, markers)
        # A template that opens the channel has also written its name line.
        self._header: str | None = None

    def push(self, token_id: int) -> list[Piece]:
        """Take one id and return the pieces that are now certain, none of them empty."""
        if self._markers is not None and token_id == self._markers.open_id:
            pieces = self.finish()
            self._thinking, self._header = True, ""
            return pieces
        if self._markers is not None and token_id == self._markers.close_id:
            pieces = self.finish()
            self._thinking = False
            return pieces
        return self._emit(self._stream.push(token_id))

    def finish(self) -> list[Piece]:
        """Return what is still held back: half a character, or a channel's name that no line end followed."""
        pieces = self._emit(self._stream.finish())
        self._header = None
        return pieces

    def _emit(self, text: str) -> list[Piece]:
        if self._header is not None:
            self._header += text
            _, line_end, text = self._header.partition("\n")
            if not line_end:
                return []
            self._header = None
        return [Piece("thinking" if self._thinking else "answer", text)] if text else []


def split_text(chat: Chat, prompt_ids: Sequence[int], ids: Iterable[int]) -> tuple[str, str]:
    """Return (thinking, answer) of a whole generation."""
    splitter = chat.splitter(prompt_ids)
    pieces = [piece for i in ids for piece in splitter.push(i)] + splitter.finish()
    text = {channel: "".join(p.text for p in pieces if p.channel == channel) for channel in ("thinking", "answer")}
    return text["thinking"], text["answer"]


def _ends_inside(ids: Sequence[int], markers: ThinkingMarkers) -> bool:
    for i in reversed(ids):
        if i in (markers.open_id, markers.close_id):
            return i == markers.open_id
    return False


def _unused_character(messages: Sequence[Message]) -> str:
    """Pick a Unicode noncharacter that no message contains."""
    text = "".join(message["content"] for message in messages)
    for candidate in _NONCHARACTERS:
        if candidate not in text:
            return candidate
    raise G4Error("The messages contain every one of Unicode's noncharacters U+FDD0 to U+FDEF.", hint="Remove them.")


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Collect `*_token` entries; each is a string, or an object with the string under `content`."""
    tokens = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
    return tokens


def _find_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the template: its own file first, then the older place inside tokenizer_config.json."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise G4Error(f"{path} is not UTF-8 text.", hint="The file is damaged; fetch it again.") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise G4Error(f"chat_template in {folder / TOKENIZER_CONFIG_FILE} is not a text.", hint="Fetch the file again.")
    return template


def _find_markers(tokenizer: Tokenizer, tokens: dict[str, str]) -> ThinkingMarkers | None:
    aliases = tokens.get("soc_token"), tokens.get("eoc_token")
    for opening, closing in (aliases, _CHANNEL_TOKENS):
        if opening is None or closing is None:
            continue
        open_id, close_id = tokenizer.added_tokens.get(opening), tokenizer.added_tokens.get(closing)
        if open_id is not None and close_id is not None:
            return ThinkingMarkers(open_id, close_id)
    return None
