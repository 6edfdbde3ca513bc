"""GGUF's vocabulary -> `tokenizer.json` and `tokenizer_config.json`.

A GGUF file has tokens, their types and the merges, but not the pipeline around them; llama.cpp spells that out in code
for `tokenizer.ggml.model = "gemma4"`. The pipeline here is the one of Gemma's own tokenizer.json:

    spaces become ▁, nothing is split (each span between control tokens is one BPE word), BPE with byte fallback
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gemma4cli.errors import G4Error
from gemma4cli.quant.gguf.reader import GGUF, Value

_MODEL = "gemma4"
_PREFIX = "tokenizer.ggml."
_DAMAGED = "The tokenizer in this file is damaged; fetch the file again."
_NAMED_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_REQUIRED_NAMES = ("bos", "eos", "unk")
# Files type some control tokens as ordinary text (<eos> above all), or as text to be shown (<|channel>).
_ALWAYS_CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<turn|>", "<|tool_response>")
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^ ]*>|<[^ ]*\|>")
# Beside the standard names, the ones Gemma 4's tokenizer_config.json gives its control tokens.
_CONFIG_NAMES = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of the metadata, checked.

    `named` has the ids of bos, eos, … that the file gives; `useless_merges` counts pairs that make no token and are
    left out, because they can never be applied.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    useless_merges: int
    ids: dict[str, int]
    named: dict[str, int]

    @property
    def added_tokens(self) -> list[tuple[str, bool]]:
        """(text, special) of the tokens that are matched in raw text before BPE, by id."""
        named = set(self.named.values())
        added = []
        for index, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            control = kind == TokenType.CONTROL or index in named or text in _ALWAYS_CONTROL
            if control or kind == TokenType.USER_DEFINED:
                added.append((text, control or _LOOKS_LIKE_CONTROL.fullmatch(text) is not None))
        return added


def read_vocabulary(gguf: GGUF) -> Vocabulary:
    """Check and return the vocabulary.

    Raises: G4Error naming the key that is missing, wrong or contradicts another.
    """
    keys = _Keys(gguf)
    if keys.get("model") != _MODEL:
        raise keys.fail("model", f"is {keys.get('model')!r}; g4 rebuilds {_MODEL!r}, Gemma 4's own")
    if keys.optional("add_space_prefix") not in (None, False):
        raise keys.fail("add_space_prefix", "is set, which Gemma 4's tokenizer does not do")
    tokens, types = keys.listed("tokens", str), keys.listed("token_type", int)
    if len(types) != len(tokens):
        raise keys.fail("token_type", f"has {len(types)} entries, but there are {len(tokens)} tokens")
    ids = {text: index for index, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        index = next(index for index, text in enumerate(tokens) if ids[text] != index)
        raise keys.fail("tokens", f"has token {tokens[index]!r} twice, at {index} and {ids[tokens[index]]}")
    named = {}
    for name, key in _NAMED_KEYS.items():
        if name in _REQUIRED_NAMES or keys.optional(key) is not None:
            named[name] = keys.token_id(key, len(tokens))
    merges, useless_merges = _merges(keys, ids)
    return Vocabulary(tokens, types, merges, useless_merges, ids, named)


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Assemble the tokenizer; ids are exactly the file's."""
    byte_tokens = [f"<0x{value:02X}>" in vocabulary.ids for value in range(256)]
    if any(byte_tokens) and not all(byte_tokens):
        raise G4Error(f"tokenizer.ggml.tokens lacks the byte token <0x{byte_tokens.index(False):02X}>.", hint=_DAMAGED)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=vocabulary.merges,
            unk_token=vocabulary.tokens[vocabulary.named["unk"]],
            fuse_unk=True,
            byte_fallback=all(byte_tokens),
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [AddedToken(text, normalized=False, special=special) for text, special in vocabulary.added_tokens]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return `tokenizer_config.json`. BOS is never added by the tokenizer: the chat template spells it."""
    document: dict[str, Any] = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False}
    for name in ("bos", "eos", "unk", "pad", "mask"):
        if name in vocabulary.named:
            document[f"{name}_token"] = vocabulary.tokens[vocabulary.named[name]]
    document |= {name: text for name, text in _CONFIG_NAMES.items() if text in vocabulary.ids}
    return {**document, "clean_up_tokenization_spaces": False, "padding_side": "left"}


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """Return the contents of `tokenizer.json`."""
    return (build_tokenizer(vocabulary).to_str(pretty=True) + "\n").encode()


def _merges(keys: _Keys, ids: dict[str, int]) -> tuple[list[tuple[str, str]], int]:
    """Split "left right" pairs of tokens; return those that make a token, and how many do not."""
    merges, useless = [], 0
    for index, text in enumerate(keys.listed("merges", str)):
        left, _, right = text.partition(" ")
        if left not in ids or right not in ids:
            raise keys.fail("merges", f"[{index}] is {text!r}, which are not two tokens")
        if left + right in ids:
            merges.append((left, right))
        else:
            useless += 1
    return merges, useless


class _Keys:
    """The `tokenizer.ggml.*` keys of a file."""

    def __init__(self, gguf: GGUF) -> None:
        self._path = gguf.paths[0]
        self._metadata = gguf.metadata

    def fail(self, key: str, what: str) -> G4Error:
        return G4Error(f"{self._path}: {_PREFIX}{key} {what}.", hint=_DAMAGED)

    def optional(self, key: str) -> Value | None:
        return self._metadata.get(_PREFIX + key)

    def get(self, key: str) -> Value:
        if _PREFIX + key not in self._metadata:
            raise self.fail(key, "is missing")
        return self._metadata[_PREFIX + key]

    def listed(self, key: str, kind: type) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self.fail(key, "is not a list of " + ("texts" if kind is str else "whole numbers"))
        return values

    def token_id(self, key: str, count: int) -> int:
        value = self.get(key)
        if type(value) is not int or not 0 <= value < count:
            raise self.fail(key, f"is {value!r}, which is no token of the vocabulary of {count}")
        return value
