"""A bundle is whole, or refused with the file that is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.export import bundle as bundle_module
from gemma4cli.export.bundle import (
    BundleManifest,
    KVRecord,
    MemoryRecord,
    ReencodedRecord,
    describe,
    find_assets,
    open_bundle,
    write_manifest,
)
from gemma4cli.export.contract import Contract

CONTRACT = Contract(64, 8, 100, 4, 11, eos_ids=(1, 6), bos_id=2)


def manifest(files: dict[str, Any]) -> BundleManifest:
    return BundleManifest(
        created_with={"g4": "0", "torch": "2.13.0"},
        model={"source": {"name": "tiny"}, "recipe": None, "totals": None},
        backend="cpu",
        targets=("cpu",),
        contract=CONTRACT,
        kv={"full": KVRecord("float32", 1, 64, 4096)},
        memory=MemoryRecord(1000, 4096, 24),
        reencoded={"lm_head.weight": ReencodedRecord("int6 g16", "int8 per row", 0.0042)},
        files=files,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"program")
    (folder / "weights.ptd").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    write_manifest(folder, manifest)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / "g4.json").read_text())
    change(document)
    (folder / "g4.json").write_text(json.dumps(document))


def test_a_whole_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder, verify=True)
    assert bundle.contract == CONTRACT
    assert bundle.manifest == manifest(bundle.manifest.files)
    assert bundle.program_for("cpu") == folder / "model.pte"
    assert bundle.weights == [folder / "weights.ptd"]
    assert bundle.manifest.files["weights.ptd"].bytes == 1000


def test_description_names_what_people_ask_for(folder: Path) -> None:
    described = dict(describe(open_bundle(folder).manifest))
    assert described["backend"] == "cpu"
    assert described["context"] == "64 tokens, read in chunks of up to 8"
    assert described["full cache"] == "4.00 KiB float32"
    assert described["memory to run"] == "5.00 KiB"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "model.pte").unlink(), "model.pte is missing"),
        (lambda f: (f / "model.pte").write_bytes(b"progra"), "model.pte has 6 bytes instead of 7"),
        (lambda f: (f / "weights.ptd").write_bytes(bytes(999) + b"x"), "weights.ptd is damaged: its SHA-256"),
        (lambda f: (f / "g4.json").unlink(), "is not a bundle: it has no g4.json"),
        (lambda f: (f / "g4.json").write_text("{"), "g4.json is not valid JSON"),
        (lambda f: edit(f, lambda d: d.update(format="g4-checkpoint")), "has format 'g4-checkpoint'; a bundle's"),
        (lambda f: (f / "g4.json").write_text("[]"), "has format None"),
        (lambda f: edit(f, lambda d: d.update(version=2)), "has version 2; this g4 reads version 1"),
        (lambda f: edit(f, lambda d: d.pop("kv")), "g4.json is damaged: 'kv'"),
        (lambda f: edit(f, lambda d: d["memory"].update(extra=1)), "g4.json is damaged: "),
        (lambda f: edit(f, lambda d: d["contract"].update(version=9)), "follows method contract 9"),
        (lambda f: edit(f, lambda d: d["files"].pop("model.pte")), "lists no model.pte"),
        (lambda f: edit(f, lambda d: d["files"].update({"../x": d["files"]["model.pte"]})), "lists '../x', which is"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], Any], sentence: str) -> None:
    damage(folder)
    with pytest.raises(G4Error, match=re.escape(sentence)):
        open_bundle(folder)


def test_large_files_are_hashed_only_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "ALWAYS_VERIFIED_BYTES", 100)
    (folder / "weights.ptd").write_bytes(bytes(999) + b"x")
    open_bundle(folder)
    with pytest.raises(G4Error, match=r"weights\.ptd is damaged"):
        open_bundle(folder, verify=True)


def test_what_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(G4Error, match="does not exist"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(G4Error, match="is a file; a bundle is a folder"):
        open_bundle(tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(G4Error, match="is not a bundle") as refused:
        open_bundle(tmp_path)
    assert refused.value.hint == "Export it first: g4 export"


def test_assets_must_be_there(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(G4Error, match=r"has no generation_config\.json"):
        find_assets(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    names = [path.name for path in find_assets(tmp_path)]
    assert names == ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
