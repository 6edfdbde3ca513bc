"""How to sample and when to stop: a request's settings, and a model's own defaults from `generation_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json

SEED_LIMIT = 1 << 63


def _require(good: bool, name: str, value: Any, allowed: str) -> None:
    if not good:
        raise G4Error(f"{name} is {value!r}; it must be {allowed}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of one generation; the defaults of the filters switch them off.

    temperature: 0 is greedy (the filters and the seed then have no effect).
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities reach top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as probable as the most probable; 0 keeps all.
    seed: 0 ... 2**63 - 1; the same seed gives the same noise on every backend.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature,
                 "0 (greedy) or more")  # fmt: skip
        _require(_is_whole(self.top_k) and 0 <= self.top_k < 1 << 31, "top_k", self.top_k, "0 (off) or more")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(_is_number(self.min_p) and 0 <= self.min_p < 1, "min_p", self.min_p, "from 0 (off) to below 1")
        _require(_is_whole(self.seed) and 0 <= self.seed < SEED_LIMIT, "seed", self.seed, "from 0 to 2^63 - 1")


GREEDY = SamplingSettings(temperature=0.0)


@dataclass(frozen=True)
class GenerationDefaults:
    """What the model's author recommends. `bos_id` is None when the model has none."""

    stop_ids: tuple[int, ...]
    bos_id: int | None
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def from_dir(cls, path: Path) -> GenerationDefaults:
        """Read `generation_config.json` of a checkpoint or bundle folder.

        Raises: G4Error naming the file when it is missing, damaged, or names no stop id.
        """
        file = path / "generation_config.json"
        document = read_json(file)
        if not isinstance(document, dict):
            raise G4Error(f"{file} must hold a JSON object.")
        try:
            return cls.from_json(document)
        except G4Error as error:
            raise G4Error(f"{file}: {error.message}", hint=error.hint) from None

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> GenerationDefaults:
        """Read the parsed file. Greedy when `do_sample` is false, or absent together with every sampling key.

        A sampling key that is absent means that its filter is off (temperature 1).
        """
        sampling = ("temperature", "top_k", "top_p")
        do_sample = document.get("do_sample", any(document.get(key) is not None for key in sampling))
        _require(isinstance(do_sample, bool), "do_sample", do_sample, "true or false")
        settings = SamplingSettings(
            temperature=_given(document, "temperature", 1.0) if do_sample else 0.0,
            top_k=_given(document, "top_k", 0),
            top_p=_given(document, "top_p", 1.0),
        )
        bos_id = document.get("bos_token_id")
        _require(bos_id is None or _is_id(bos_id), "bos_token_id", bos_id, "a token id")
        return cls(_stop_ids(document), bos_id, settings.temperature, settings.top_k, settings.top_p)

    def sampling(self, **changes: Any) -> SamplingSettings:
        """Return the model's settings with `changes` (fields of SamplingSettings) made to them."""
        return SamplingSettings(
            **{"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, **changes}
        )


def _stop_ids(document: dict[str, Any]) -> tuple[int, ...]:
    ids = document.get("eos_token_id")
    ids = [ids] if _is_id(ids) else ids
    _require(isinstance(ids, list) and bool(ids) and all(_is_id(i) for i in ids), "eos_token_id",
             document.get("eos_token_id"), "a token id or a list of them")  # fmt: skip
    return tuple(dict.fromkeys(ids))


def _given(document: dict[str, Any], key: str, off: float) -> Any:
    return off if document.get(key) is None else document[key]
