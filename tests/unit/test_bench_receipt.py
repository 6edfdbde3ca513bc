"""The receipt in a bundle: it does not break the bundle, and knows whether it belongs to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import MANIFEST_FILE, BundleManifest, MemoryRecord, open_bundle, write_manifest
from gemma4cli.export.contract import Contract
from gemma4cli.export.receipt import read_receipt, write_receipt

DOCUMENT = {name: {"of": name} for name in ("environment", "text", "reference", "result", "floor", "model")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.pte").write_bytes(b"program")
    contract = Contract(64, 8, 100, 4, 11, eos_ids=(1,), bos_id=2)
    memory = MemoryRecord(1000, 4096, 24)
    write_manifest(
        tmp_path, lambda files: BundleManifest({"g4": "0"}, {}, "cpu", ("cpu",), contract, {}, memory, {}, files)
    )
    return tmp_path


def test_a_receipt_comes_back_and_the_bundle_stays_whole(folder: Path) -> None:
    assert read_receipt(folder) is None
    path = write_receipt(open_bundle(folder), DOCUMENT)
    assert path == folder / "receipt.json"
    receipt = read_receipt(folder)
    assert receipt is not None and receipt.is_current
    assert (receipt.result, receipt.floor) == ({"of": "result"}, {"of": "floor"})
    assert "model" not in json.loads(path.read_text()), "its paths are this machine's"
    open_bundle(folder, verify=True)


def test_a_receipt_of_another_export_is_found_out(folder: Path) -> None:
    write_receipt(open_bundle(folder), DOCUMENT)
    manifest = folder / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"g4": "', '"g4": "9'))
    receipt = read_receipt(folder)
    assert receipt is not None and not receipt.is_current


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.clear(), "is not a receipt"),
        (lambda d: d.update(format="g4-bundle"), "is not a receipt"),
        (lambda d: d.update(version=2), "has version 2; this g4 reads version 1"),
        (lambda d: d.pop("floor"), "is damaged: a section is missing"),
        (lambda d: d.update(result=5), "is damaged: a section is missing"),
    ],
)
def test_a_damaged_receipt_is_one_sentence(folder: Path, change, message: str) -> None:
    path = write_receipt(open_bundle(folder), DOCUMENT)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(G4Error, match=message):
        read_receipt(folder)
