"""`g4 export`: what it refuses, and what it says beforehand. Whole exports are in tests/pipeline/test_export_cpu.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.tiny import write_checkpoint

G4 = Callable[..., Any]
SMALL = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", **SMALL)


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    quantize_checkpoint(model, tmp_path / "quantized", load_recipe("default"))
    return tmp_path / "quantized"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence", "hint"),
    [
        (["--backend", "cuda-13"], 2, "cannot export for the backend 'cuda-13'", "Available: cpu"),
        (["--ctx", "8k"], 1, "A context of 8,192 tokens is outside 2 to 4,096", "Use --ctx 4096 or less."),
        (["--ctx", "1"], 1, "A context of 1 tokens is outside 2 to 4,096", "Use --ctx"),
        (["--chunk", "1"], 1, "Prefill chunks of 1 tokens are outside 2 to the context of 4,096", "--chunk"),
        (["--ctx", "64", "--chunk", "65"], 1, "Prefill chunks of 65 tokens are outside 2 to the context of 64", ""),
        (["--ctx", "many"], 2, "'many' is not a number of tokens", ""),
        (["--recipe", "default"], 1, "is quantized already.", "Leave --recipe away"),
        (["--recipe", "no-such"], 1, "no-such", ""),
    ],
)
def test_refusals(g4: G4, checkpoint: Path, arguments: list[str], code: int, sentence: str, hint: str) -> None:
    outcome = g4("export", checkpoint, *arguments)
    assert outcome.code == code
    assert sentence in outcome.err
    assert hint in outcome.err
    assert outcome.out == ""


def test_existing_outputs_are_kept(g4: G4, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    outcome = g4("export", checkpoint, "--output", tmp_path / "bundle")
    assert (outcome.code, "already exists" in outcome.err) == (1, True)
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_bundle_never_replaces_its_model(g4: G4, checkpoint: Path) -> None:
    outcome = g4("export", checkpoint, "--output", checkpoint, "--force")
    assert outcome.code == 1
    assert "would replace the model that is being exported" in outcome.err
    assert (checkpoint / "config.json").exists()


def test_a_model_without_its_own_files_is_refused(g4: G4, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    outcome = g4("export", model, "--recipe", "none")
    assert (outcome.code, "has no tokenizer.json" in outcome.err) == (1, True)


def test_nothing_to_export(g4: G4, tmp_path: Path) -> None:
    assert "No checkpoint was given, and none has been pulled or quantized yet" in g4("export").err
    assert "does not exist" in g4("export", tmp_path / "missing", "--recipe", "none").err


def test_too_little_disk_is_said_first(g4: G4, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = g4("export", checkpoint, "--output", checkpoint.parent / "bundle")
    assert outcome.code == 1
    assert "Exporting quantized needs" in outcome.err
    assert not (checkpoint.parent / "bundle").exists()


@pytest.mark.parametrize("recipe", [None, "none", "sensitive"])
def test_dry_run_writes_nothing(g4: G4, model: Path, workspace_root: Path, recipe: str | None) -> None:
    arguments = [] if recipe is None else ["--recipe", recipe]
    outcome = g4("export", model, "--ctx", "64", "--chunk", "8", "--dry-run", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["fits"] is True
    assert document["total_bytes"] == sum(document["files"].values())
    assert (document["context_length"], document["prefill_chunk"]) == (64, 8)
    assert (document["checkpoint_first_bytes"] > 0) == (recipe != "none")
    assert not workspace_root.exists()


def test_dry_run_for_people(g4: G4, checkpoint: Path) -> None:
    outcome = g4("export", checkpoint, "--dry-run", "--ctx", "2k")
    assert outcome.out.splitlines()[-1] == "fits"
    assert "quantized-cpu-2k" in outcome.out
    assert "weights.ptd" in outcome.out
    assert g4("export", checkpoint, "--dry-run", "--quiet").out == "fits\n"


def test_a_checkpoint_of_another_model_is_not_taken(g4: G4, model: Path, workspace_root: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other" / "tiny", seed=1, **SMALL)
    (workspace_root / "checkpoints").mkdir(parents=True)
    quantize_checkpoint(other, workspace_root / "checkpoints" / "tiny-default", load_recipe("default"))
    outcome = g4("export", model)
    assert outcome.code == 1
    assert "was not made from" in outcome.err
