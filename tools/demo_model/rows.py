"""Training rows: chats as token ids with a weight per predicted token, several short chats to a row or one long one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from tools.demo_model import chats
from tools.demo_model.chats import Chat
from tools.demo_model.tasks import Exchange

_PIECE = re.compile(r"<\|?[a-z_]+\|?>|\n+| ?[^ \n<]+|.")
_TURN_MARKS = 9  # tokens around one question and answer in history, a low estimate


class Encoder:
    """Encode text piece by piece with a memory: the ids of the whole, many times faster.

    Right because no merge of this tokenizer joins two words, and special tokens and newline runs stand alone.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            found = self._known.get(piece)
            if found is None:
                found = self._tokenizer.encode(piece, add_special_tokens=False).ids
                self._known[piece] = found
            ids += found
        return ids

    def length(self, exchange: Exchange) -> int:
        return len(self(exchange.question)) + len(self(exchange.answer)) + _TURN_MARKS


def encode_chat(chat: Chat, encode: Encoder) -> tuple[list[int], list[float]]:
    """Ids and, per id, its weight as a prediction target: 0 for what is given, 1/sqrt(n) in a target of n tokens."""
    ids: list[int] = []
    weights: list[float] = []
    for text, trained in chat.segments():
        piece = encode(text)
        ids += piece
        weights += [len(piece) ** -0.5 if trained else 0.0] * len(piece)
    return ids, weights


def packed_rows(rng: random.Random, encode: Encoder, length: int) -> Iterator[tuple[list[int], list[float], list[int]]]:
    """Rows of short chats; `documents` numbers the chats of a row, so that none looks into another."""
    ids: list[int] = []
    weights: list[float] = []
    documents: list[int] = []
    number = 0
    while True:
        more, more_weights = encode_chat(chats.short_chat(rng), encode)
        if len(more) > length:
            continue
        if len(ids) + len(more) > length:
            pad = length - len(ids)
            yield ids + [0] * pad, weights + [0.0] * pad, documents + [number] * pad
            ids, weights, documents, number = [], [], [], 0
        ids, weights, documents = ids + more, weights + more_weights, documents + [number] * len(more)
        number += 1


def long_rows(rng: random.Random, encode: Encoder, length: int) -> Iterator[tuple[list[int], list[float], list[int]]]:
    """Rows of one chat each, between half and the whole of `length` tokens."""
    while True:
        turns = chats.recall_long(rng, rng.randrange(length // 2, length), encode.length)
        ids, weights = encode_chat(Chat(turns), encode)
        ids, weights = ids[:length], weights[:length]
        pad = length - len(ids)
        yield ids + [0] * pad, weights + [0.0] * pad, [0] * length


def batches(
    seed: int, tokenizer: Tokenizer, length: int, size: int, packed: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless batches (ids int16, weights float32, documents int16), each [size, length]."""
    rng, encode = random.Random(seed), Encoder(tokenizer)
    rows = (packed_rows if packed else long_rows)(rng, encode, length)
    while True:
        ids, weights, documents = zip(*(next(rows) for _ in range(size)), strict=True)
        yield np.array(ids, np.int16), np.array(weights, np.float32), np.array(documents, np.int16)
