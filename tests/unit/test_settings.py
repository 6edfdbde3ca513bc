"""Sampling settings are validated, and a model's defaults come from its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.model.settings import GREEDY, GenerationDefaults, SamplingSettings

GEMMA = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "temperature": 1.0,
         "top_k": 64, "top_p": 0.95, "transformers_version": "5.5.0"}  # fmt: skip


def test_gemmas_defaults() -> None:
    defaults = GenerationDefaults.from_json(GEMMA)
    assert defaults == GenerationDefaults((1, 106, 50), 2, 1.0, 64, 0.95)
    assert defaults.sampling() == SamplingSettings(1.0, 64, 0.95, 0.0, 0)
    assert defaults.sampling(temperature=0.5, min_p=0.1, seed=7) == SamplingSettings(0.5, 64, 0.95, 0.1, 7)


@pytest.mark.parametrize(
    ("document", "temperature", "top_k", "top_p"),
    [
        ({"do_sample": False, "temperature": 1.0, "top_k": 64}, 0.0, 64, 1.0),
        ({}, 0.0, 0, 1.0),
        ({"temperature": 0.7}, 0.7, 0, 1.0),
        ({"do_sample": True}, 1.0, 0, 1.0),
        ({"do_sample": True, "top_k": None, "temperature": None}, 1.0, 0, 1.0),
    ],
)
def test_absent_keys(document: dict[str, Any], temperature: float, top_k: int, top_p: float) -> None:
    defaults = GenerationDefaults.from_json({"eos_token_id": 1} | document)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (temperature, top_k, top_p)
    assert defaults.stop_ids == (1,)
    assert defaults.bos_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": None}, "eos_token_id is None; it must be a token id or a list"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id is \[1, -1\]"),
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>'"),
        ({"bos_token_id": "2"}, "bos_token_id is '2'; it must be a token id"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 6.4}, "top_k is 6.4"),
    ],
)
def test_bad_defaults_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(G4Error, match=message):
        GenerationDefaults.from_json(GEMMA | change)


def test_stop_ids_are_unique_and_keep_their_order() -> None:
    assert GenerationDefaults.from_json(GEMMA | {"eos_token_id": [106, 1, 106]}).stop_ids == (106, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": -1}, r"top_k is -1; it must be 0 \(off\) or more"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be above 0 and at most 1 \(off\)"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": 1.0}, r"min_p is 1.0; it must be from 0 \(off\) to below 1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"seed": -1}, r"seed is -1; it must be from 0 to 2\^63 - 1"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(G4Error, match=message):
        SamplingSettings(**{"temperature": 1.0, **settings})


def test_limits_are_allowed() -> None:
    SamplingSettings(temperature=0, top_k=0, top_p=1, min_p=0, seed=(1 << 63) - 1)
    assert GREEDY.temperature == 0


def test_from_dir_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    with pytest.raises(G4Error, match=f"{file} does not exist"):
        GenerationDefaults.from_dir(tmp_path)
    file.write_text("[]")
    with pytest.raises(G4Error, match=f"{file} must hold a JSON object"):
        GenerationDefaults.from_dir(tmp_path)
    file.write_text(json.dumps(GEMMA | {"top_p": 2}))
    with pytest.raises(G4Error, match=f"{file}: top_p is 2"):
        GenerationDefaults.from_dir(tmp_path)
    file.write_text(json.dumps(GEMMA))
    assert GenerationDefaults.from_dir(tmp_path).top_k == 64
