"""Whatever there is to look into: a bundle, a lone program with or without its data files, or a data file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import ALWAYS_VERIFIED_BYTES, MANIFEST_FILE, BundleManifest, open_bundle
from gemma4cli.files import sha256_file
from gemma4cli.inspection.delegates import Blob, read_blob
from gemma4cli.inspection.files import Span, map_file, naming
from gemma4cli.inspection.library import Library, read_library
from gemma4cli.inspection.program import IDENTIFIER as PROGRAM_IDENTIFIER
from gemma4cli.inspection.program import Delegate, Program, read_program
from gemma4cli.inspection.ptd import IDENTIFIER as DATA_IDENTIFIER
from gemma4cli.inspection.ptd import DataFile, read_data_file
from gemma4cli.kernels.targets import TARGETS
from gemma4cli.progress import SILENT, Progress


@dataclass(frozen=True)
class DelegatePart:
    """A delegate with what its blob says; `library` is the code that a CUDA delegate runs, when it is there."""

    method: str
    number: int
    delegate: Delegate
    blob: Blob
    library: Library | None
    library_bytes: int


@dataclass(frozen=True)
class Artifact:
    """Files that belong together.

    Attributes:
        program: of a bundle that has one for each of several GPU architectures, that of `target`.
        hashed: files whose SHA-256 was compared with the manifest's just now.
    """

    path: Path
    manifest: BundleManifest | None
    program: Program | None
    data_files: tuple[DataFile, ...]
    target: str | None = None
    hashed: tuple[str, ...] = ()
    _blobs: dict[tuple[str, Span], Blob] = field(default_factory=dict)
    _libraries: dict[tuple[Path, Span], Library] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "bundle" if self.manifest else "program" if self.program else "data file"

    @property
    def nbytes(self) -> int:
        if self.manifest:
            return sum(record.bytes for record in self.manifest.files.values())
        return sum(file.nbytes for file in (self.program, *self.data_files) if file)

    def find(self, key: str) -> tuple[Program | DataFile, Span] | None:
        """Find named data: in the program, else in a data file."""
        if self.program and key in self.program.named_data:
            return self.program, self.program.named_data[key]
        for file in self.data_files:
            if key in file.entries:
                return file, file.entries[key].span
        return None

    @cached_property
    def delegates(self) -> tuple[DelegatePart, ...]:
        """Every delegate of every method, its blob and library read."""
        if self.program is None:
            return ()
        parts = []
        with naming(self.program.path):
            for method in self.program.methods:
                for number, delegate in enumerate(method.delegates):
                    blob = self._blob(delegate)
                    library, size = self._library(blob.library)
                    parts.append(DelegatePart(method.name, number, delegate, blob, library, size))
        return tuple(parts)

    def _blob(self, delegate: Delegate) -> Blob:
        """Read a blob once, however many delegates share it."""
        place = (delegate.backend, delegate.blob)
        if place not in self._blobs:
            self._blobs[place] = read_blob(delegate.backend, self.program.read(delegate.blob))
        return self._blobs[place]

    def _library(self, key: str | None) -> tuple[Library | None, int]:
        found = self.find(key) if key else None
        if found is None:
            return None, 0
        file, span = found
        place = (file.path, span)
        if place not in self._libraries:
            self._libraries[place] = read_library(file.read(span))
        return self._libraries[place], span.size

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Constant methods with their values."""
        if self.program is None:
            return {}
        with naming(self.program.path):
            return {m.name: self.program.constant_value(m) for m in self.program.methods if m.is_constant}


def open_artifact(
    paths: Sequence[Path],
    *,
    target: str | None = None,
    capability: tuple[int, int] | None = None,
    verify: bool = False,
    progress: Progress = SILENT,
) -> Artifact:
    """Open a bundle's folder, or a `.pte` followed by any number of `.ptd` files, or one `.ptd` file.

    A bundle is checked as whoever runs it does: every size, and the SHA-256 of files below 256 MiB, or of all with
    `verify`. Weights are mapped and stay on the disk.

    Args:
        target: which of a bundle's programs; by default the first.
        capability: prefer the program for a GPU of this compute capability.

    Raises: G4Error naming the file and what is wrong.
    """
    first, rest = paths[0], paths[1:]
    if first.is_dir():
        if rest:
            raise G4Error(f"{first} is a bundle and brings its data files along.", hint="Name it alone.", exit_code=2)
        return _open_bundle(first, target, capability, verify, progress)
    for option, given in (("--verify", verify), ("--target", target)):
        if given:
            raise G4Error(f"{first} is not a bundle: it has no manifest.", hint=f"Leave {option} away.", exit_code=2)
    start = bytes(map_file(first)[4:8])
    if start == DATA_IDENTIFIER:
        return Artifact(first, None, None, tuple(read_data_file(path) for path in paths))
    if start != PROGRAM_IDENTIFIER and first.name == MANIFEST_FILE:
        raise G4Error(f"{first} is the manifest of a bundle.", hint=f"Name the folder: {first.parent}")
    return Artifact(first, None, read_program(first), tuple(read_data_file(path) for path in rest))


def _open_bundle(
    folder: Path, target: str | None, capability: tuple[int, int] | None, verify: bool, progress: Progress
) -> Artifact:
    bundle = open_bundle(folder, verify=verify, progress=progress)
    files, targets = bundle.manifest.files, bundle.manifest.targets
    if target is not None and target not in targets:
        raise G4Error(f"{folder} has no program for {target}.", hint=f"It is for {', '.join(targets)}.")
    chosen = target or _target_for(targets, capability)
    hashed = tuple(name for name, record in files.items() if verify or record.bytes < ALWAYS_VERIFIED_BYTES)
    data = tuple(read_data_file(path) for path in bundle.weights)
    return Artifact(folder, bundle.manifest, read_program(bundle.program_for(chosen)), data, chosen, hashed)


def _target_for(targets: Sequence[str], capability: tuple[int, int] | None) -> str:
    """Return the target whose code a GPU executes, the newest if several do; the first one if none does."""
    known = [TARGETS[name] for name in targets if name in TARGETS]
    fitting = [t for t in known if capability and t.capability[0] == capability[0] and t.capability <= capability]
    return max(fitting, key=lambda t: t.capability).name if fitting else targets[0]


def file_hashes(artifact: Artifact, progress: Progress = SILENT) -> dict[str, str]:
    """SHA-256 by file name: the manifest's record for a bundle, else of the files as they are."""
    if artifact.manifest:
        return {name: record.sha256 or "" for name, record in artifact.manifest.files.items()}
    files = [file for file in (artifact.program, *artifact.data_files) if file]
    return {file.path.name: sha256_file(file.path, progress) for file in files}
