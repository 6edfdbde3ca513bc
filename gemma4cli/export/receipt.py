"""`receipt.json` of a bundle: what quantization and export cost it in quality, measured by `g4 bench --quality`.

Optional, and not listed in `g4.json`: a bundle is whole without it. It names the SHA-256 of the `g4.json` it was
measured with, which in turn names the hash of every other file, so a receipt that was copied to another export is found
out.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import MANIFEST_FILE, Bundle
from gemma4cli.files import read_json, sha256_file, write_json

RECEIPT_FILE = "receipt.json"
FORMAT = "g4-receipt"
VERSION = 1

_SECTIONS = ("environment", "text", "reference", "result", "floor")


@dataclass(frozen=True)
class Receipt:
    """A measured quality.

    text: what was read: `name`, `sha256`, `tokens`, `counted`. reference: the unquantized model it is compared with.
    result: `perplexity`, `reference_perplexity`, `kl` (`mean`, `median`, `p99`, `max`, in nats), `top1_agreement`.
    floor: the same numbers for what is not a loss: the unquantized model computed in another way.
    is_current: whether it belongs to this very export.
    """

    environment: Mapping[str, Any]
    text: Mapping[str, Any]
    reference: Mapping[str, Any]
    result: Mapping[str, Any]
    floor: Mapping[str, Any]
    is_current: bool


def write_receipt(bundle: Bundle, document: Mapping[str, Any]) -> Path:
    """Store the sections of a quality document beside the program; replaces an earlier receipt."""
    path = bundle.path / RECEIPT_FILE
    head = {"format": FORMAT, "version": VERSION, "bundle_sha256": sha256_file(bundle.path / MANIFEST_FILE)}
    write_json(path, {**head, **{name: document[name] for name in _SECTIONS}})
    return path


def read_receipt(folder: Path) -> Receipt | None:
    """Read a bundle's receipt; None when it has none.

    Raises: G4Error when there is one that is damaged or of another version.
    """
    path = folder / RECEIPT_FILE
    if not path.is_file():
        return None
    document = read_json(path)
    again = "Measure it again: g4 bench --quality --save-receipt"
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise G4Error(f"{path} is not a receipt.", hint=again)
    if document.get("version") != VERSION:
        raise G4Error(
            f"{path} has version {document.get('version')!r}; this g4 reads version {VERSION}.",
            hint=f"Use the g4 that wrote it. {again}",
        )
    if not all(isinstance(document.get(name), dict) for name in _SECTIONS):
        raise G4Error(f"{path} is damaged: a section is missing.", hint=again)
    is_current = document.get("bundle_sha256") == sha256_file(folder / MANIFEST_FILE)
    return Receipt(**{name: document[name] for name in _SECTIONS}, is_current=is_current)
