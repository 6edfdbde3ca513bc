"""What quality is judged by: the unquantized model that another one came from, and the text to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma4cli.benchmark.subject import Subject
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import ALWAYS_VERIFIED_BYTES
from gemma4cli.files import sha256_file
from gemma4cli.quant.manifest import MANIFEST_FILE
from gemma4cli.workspace import Workspace

TEXT_FILE = "eval.txt"


def find_reference(workspace: Workspace, subject: Subject, given: str | None, say: Callable[[str], None]) -> Path:
    """Find the unquantized model: the one given, else the last one pulled if `subject` was made from it.

    Raises: G4Error when there is none, when it is quantized itself, or when it is another model.
    """
    path = workspace.resolve("model", given, say)
    if path.is_file() or (path / MANIFEST_FILE).is_file():
        raise G4Error(
            f"{path} is quantized: it cannot say what quantization cost.", hint="Name the original: --reference MODEL"
        )
    if given is None and not _is_source(path, subject):
        raise G4Error(
            f"{subject.path} was not made from {path}, the last model pulled.",
            hint="Name the unquantized model it came from: --reference MODEL",
        )
    return path


def find_text(reference: Path, given: Path | None) -> Path:
    """Find the text: the one given, else the one that comes with the reference model."""
    if given is not None:
        if not given.is_file():
            raise G4Error(f"{given} is not a file.", hint="Check the path given to --on.")
        return given
    if not (reference / TEXT_FILE).is_file():
        raise G4Error(
            f"{reference} comes with no {TEXT_FILE} to judge quality on.",
            hint="Name a text that the model has not seen: --on FILE",
        )
    return reference / TEXT_FILE


def _is_source(path: Path, subject: Subject) -> bool:
    """Whether the weight files that a manifest names are these; a plain checkpoint is its own source."""
    if subject.source is None:
        return subject.path.resolve() == path.resolve()
    weights = {name: record for name, record in subject.source["files"].items() if name.endswith(".safetensors")}
    return bool(weights) and all(_matches(path / name, record) for name, record in weights.items())


def _matches(file: Path, record: Mapping[str, Any]) -> bool:
    """Compare size and hash; the hash of a large file only where the Hub's cache has it in the name of the blob."""
    if not file.is_file() or file.stat().st_size != record["bytes"]:
        return False
    if record["bytes"] < ALWAYS_VERIFIED_BYTES:
        return sha256_file(file) == record["sha256"]
    blob = file.resolve()
    return blob.parent.name != "blobs" or blob.name == record["sha256"]
