"""The Hugging Face cache of one repository, in its documented layout, so that every other tool finds what we fetched.

models--owner--repo/
    blobs/<etag>                     the bytes, once
    blobs/<etag>.g4-partial          a download in progress
    blobs/<etag>.g4-ledger           how much of each part of it has arrived
    snapshots/<commit>/<file>        link to the blob
    refs/<revision>                  the commit a branch or tag stood for
"""

from __future__ import annotations

import os
import re
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock

from gemma4cli.hub.client import RemoteFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_POLITE_WAIT_S = 0.5


class RepoCache:
    """One repository's folder in the cache. Nothing is created before something is written."""

    def __init__(self, repo: str, cache_dir: Path | None = None) -> None:
        self.root = Path(cache_dir or constants.HF_HUB_CACHE)
        self._folder = self.root / repo_folder_name(repo_id=repo, repo_type="model")

    def blob(self, file: RemoteFile) -> Path:
        return self._folder / "blobs" / file.etag

    def snapshot(self, commit: str) -> Path:
        return self._folder / "snapshots" / commit

    def holds(self, file: RemoteFile, commit: str) -> bool:
        """Whether a file is here in full; one of another size was damaged after it was fetched."""
        places = (self.blob(file), self.snapshot(commit) / file.name)
        return any(place.is_file() and place.stat().st_size == file.size for place in places)

    def commit_of(self, revision: str) -> str | None:
        """Return the commit that a revision stood for when it was last fetched."""
        if _COMMIT.fullmatch(revision):
            return revision
        ref = self._folder / "refs" / revision
        return ref.read_text().strip() if ref.is_file() else None

    def files_of(self, commit: str) -> dict[str, Path]:
        """Return the files of a snapshot that are really here, by name in the repository."""
        snapshot = self.snapshot(commit)
        return {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}

    def link(self, file: RemoteFile, commit: str) -> Path:
        """Make the snapshot's entry for a blob: a relative link, or the file itself where there are no links."""
        pointer = self.snapshot(commit) / file.name
        blob = self.blob(file)
        if pointer.is_file() and pointer.stat().st_size == file.size:
            return pointer
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        if constants.HF_HUB_DISABLE_SYMLINKS or not _symlink(os.path.relpath(blob, pointer.parent), pointer):
            os.replace(blob, pointer)
        return pointer

    def remember_revision(self, revision: str, commit: str) -> None:
        """Record which commit a branch or tag stands for."""
        ref = self._folder / "refs" / revision
        if revision == commit or (ref.is_file() and ref.read_text() == commit):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(commit)
        os.replace(temporary, ref)

    def forget(self, file: RemoteFile, commit: str) -> None:
        """Remove a file, so that it is fetched again."""
        for path in (self.snapshot(commit) / file.name, self.blob(file)):
            path.unlink(missing_ok=True)

    @contextmanager
    def only_us(self, file: RemoteFile, say: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes, huggingface_hub's own among them, from fetching the same blob meanwhile."""
        path = self.root / ".locks" / self._folder.name / f"{file.etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(WeakFileLock(path, timeout=_POLITE_WAIT_S))
            except Timeout:
                say(f"Another process is fetching {file.name}; waiting for it.")
                held.enter_context(WeakFileLock(path))
            yield

    def partial(self, file: RemoteFile, part_bytes: int) -> Partial:
        """Open what has arrived of a file so far, or start it; the caller holds `only_us`."""
        blob = self.blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        return Partial(blob, file.size, part_bytes)

    def missing_bytes(self, file: RemoteFile, commit: str) -> int:
        """How much of a file a pull has still to fetch."""
        if self.holds(file, commit):
            return 0
        ledger = self.blob(file).with_name(f"{file.etag}.g4-ledger")
        return max(file.size - sum(_read_ledger(ledger)[1]), 0)


def _symlink(target: str, link: Path) -> bool:
    try:
        link.symlink_to(target)
    except OSError:
        return False
    return True


def _read_ledger(path: Path) -> tuple[int, list[int]]:
    """Return (bytes per part, bytes received of each part); (0, []) when there is none or it is damaged."""
    data = path.read_bytes() if path.is_file() else b""
    if len(data) < 8 or len(data) % 8:
        return 0, []
    part_bytes, *received = struct.unpack(f"<{len(data) // 8}Q", data)
    return (part_bytes, received) if all(count <= part_bytes for count in received) else (0, [])


class Partial:
    """A file that arrives in parts, in any order, and outlives the process that fetches it.

    Beside the bytes lies a ledger of little-endian uint64: bytes per part, then the bytes received of each part. It is
    written after the bytes it counts, so a kill leaves a ledger that promises no more than there is. (A power cut may;
    the hash at the end catches that.)
    """

    def __init__(self, blob: Path, size: int, part_bytes: int) -> None:
        self._blob = blob
        self._path = blob.with_name(f"{blob.name}.g4-partial")
        self._ledger_path = blob.with_name(f"{blob.name}.g4-ledger")
        self.size = size
        count = max(-(-size // part_bytes), 1)
        known_part_bytes, received = _read_ledger(self._ledger_path)
        whole = known_part_bytes == part_bytes and len(received) == count and self._path.is_file()
        if not whole:
            self.discard()
            received = [0] * count
        self.part_bytes = part_bytes
        self.received = received
        self._data = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._ledger = os.open(self._ledger_path, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._ledger, struct.pack(f"<{count + 1}Q", part_bytes, *received), 0)

    def extent(self, part: int) -> tuple[int, int]:
        """Return where a part starts and ends in the file."""
        return part * self.part_bytes, min((part + 1) * self.part_bytes, self.size)

    def is_complete(self, part: int) -> bool:
        start, end = self.extent(part)
        return self.received[part] >= end - start

    def write(self, part: int, data: bytes) -> None:
        """Append `data` to what has arrived of a part."""
        start, _ = self.extent(part)
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._data, rest, start + self.received[part])
            rest = rest[written:]
            self.received[part] += written
            os.pwrite(self._ledger, struct.pack("<Q", self.received[part]), 8 * (part + 1))

    def read(self, position: int, length: int) -> bytes:
        return os.pread(self._data, length, position)

    def close(self) -> None:
        os.close(self._data)
        os.close(self._ledger)

    def finish(self) -> None:
        """Turn the complete, verified file into the blob."""
        os.fsync(self._data)
        os.replace(self._path, self._blob)
        self._ledger_path.unlink()

    def discard(self) -> None:
        """Forget everything that has arrived."""
        self._path.unlink(missing_ok=True)
        self._ledger_path.unlink(missing_ok=True)
