"""The one table of short names `g4 pull` knows.

Sizes are for `g4 pull --list`, which asks no server; a real pull reads them from the repository. Decimal bytes, as the
repositories state them. `exact` tells a published size from one computed by tensor count and type.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

Format = Literal["safetensors", "torchao", "gguf"]

DEFAULT_NAME = "31b"
DEMO_NAME = "demo"

# 30.70e9 parameters: int4 in groups of 32 with bfloat16 scale and uint8 zero point (4.75 bits), embedding in int8.
_RUN_BYTES_31B = 18_800_000_000


@dataclass(frozen=True)
class Variant:
    """One thing a short name can mean.

    Attributes:
        selector: the quantization in a repository of many GGUF files; None when there is nothing to choose.
        download_bytes: what a pull fetches; None when it is measured instead (the packaged demo model).
        run_bytes: weights in memory when run at g4's default precision.
        exact: whether `download_bytes` is a published size.
        source: where the numbers come from.
    """

    selector: str | None
    download_bytes: int | None
    run_bytes: int
    exact: bool
    source: str


@dataclass(frozen=True)
class Entry:
    """A short name.

    Attributes:
        repo: None for the model that comes with g4.
        variants: the first one is the default.
        lender: a repository of the same model, for the chat template and generation settings that `repo` lacks.
    """

    name: str
    repo: str | None
    format: Format
    about: str
    variants: tuple[Variant, ...]
    lender: str | None = None


CATALOG: tuple[Entry, ...] = (
    Entry(
        DEMO_NAME,
        None,
        "safetensors",
        "tiny model that comes with g4, for trying every command",
        (Variant(None, None, 11_000_000, False, "the installed package"),),
    ),
    Entry(
        "31b",
        "google/gemma-4-31B-it",
        "safetensors",
        "Gemma 4 31B-IT, bfloat16",
        (Variant(None, 62_500_000_000, _RUN_BYTES_31B, False, "30.70e9 text parameters and the vision tower"),),
    ),
    Entry(
        "31b-gguf",
        "unsloth/gemma-4-31B-it-GGUF",
        "gguf",
        "Gemma 4 31B-IT, quantized by llama.cpp",
        (
            Variant("Q4_K_M", 18_687_000_000, 18_687_000_000, False, "355 tensors Q4_K, 56 Q6_K; cards say 18.7e9"),
            Variant("Q4_0", 17_651_000_000, 17_651_000_000, False, "410 tensors Q4_0, embedding Q6_K"),
            Variant("UD-Q4_K_XL", 18_800_000_000, 18_800_000_000, False, "published, rounded"),
            Variant("Q6_K", 25_201_483_424, 25_201_483_424, True, "published"),
            Variant("Q8_0", 32_620_000_000, 32_620_000_000, False, "411 tensors Q8_0"),
        ),
    ),
    Entry(
        "31b-qat",
        "google/gemma-4-31B-it-qat-q4_0-gguf",
        "gguf",
        "Gemma 4 31B-IT, trained for Q4_0 by Google",
        (Variant(None, 17_651_001_568, 17_651_001_568, True, "published"),),
    ),
    Entry(
        "31b-int4",
        "SocialLocalMobile/gemma-4-31B-it-HQQ-INT4",
        "torchao",
        "Gemma 4 31B-IT, int4 by HQQ, ready to export",
        (Variant(None, 21_000_000_000, 21_000_000_000, False, "published, rounded"),),
        lender="google/gemma-4-31B-it",
    ),
)


def find(name: str) -> Entry | None:
    """Return the entry of a short name, whatever its case."""
    return next((entry for entry in CATALOG if entry.name == name.lower()), None)


def lender_of(repo: str) -> str | None:
    """Return the repository that lends `repo` its missing chat template and settings."""
    return next((entry.lender for entry in CATALOG if entry.repo == repo), None)


def suggest(name: str) -> str | None:
    """Return the short name that `name` was probably meant to be."""
    close = difflib.get_close_matches(name.lower(), [entry.name for entry in CATALOG], n=1, cutoff=0.5)
    return close[0] if close else None
