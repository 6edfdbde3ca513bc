"""Files that are whole or absent: atomic outputs, hashes, free space, strict JSON."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.progress import SILENT, Progress

_HASH_CHUNK_BYTES = 8 << 20


def sha256_file(path: Path, progress: Progress = SILENT) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    for chunk in _chunks(path, progress):
        digest.update(chunk)
    return digest.hexdigest()


def crc32_file(path: Path, progress: Progress = SILENT) -> str:
    """Return the CRC-32 of a file as 8 hex digits: finds damage as well, at several times the speed."""
    value = 0
    for chunk in _chunks(path, progress):
        value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _chunks(path: Path, progress: Progress) -> Iterator[memoryview]:
    """Yield a file piece by piece; a piece is valid until the next one is asked for."""
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file, progress.phase(f"hash {path.name}", path.stat().st_size) as task:
        while count := file.readinto(buffer):
            yield buffer[:count]
            task.advance(count)


def read_json(path: Path) -> Any:
    """Parse a UTF-8 JSON file; a missing or damaged file is a ``G4Error`` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise G4Error(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise G4Error(f"{path} is not valid JSON: {error}.", hint="The file is damaged; fetch it again.") from None


def write_json(path: Path, document: Any) -> None:
    """Write JSON with a final newline, atomically (temporary file, flush to disk, rename)."""
    # Named by process: two of them may write the workspace's state at once, and the later one wins whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def require_free_space(directory: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse before starting when the disk that will hold `directory` has less than `needed_bytes` free."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise G4Error(
            f"{purpose} needs {format_bytes(needed_bytes)} on the disk of {directory}, which has "
            f"{format_bytes(free_bytes)} free.",
            hint="Free some space, or choose another place with --output.",
        )


def require_absent(target: Path, force: bool) -> None:
    """Refuse to replace an existing output unless the user said --force."""
    if target.exists() and not force:
        raise G4Error(f"{target} already exists.", hint="Use --force to replace it, or --output to write elsewhere.")


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield a working folder beside `target` and rename it to `target` when the block ends well.

    A crash, a kill or an exception never leaves a half-written `target`: only ``.<name>.partial`` remains, which the
    next run with ``resume=True`` continues and any other run empties first.
    An existing `target` is replaced only with `force`, and only after the new one is complete.
    Two processes never write the same `target`: the second is refused.
    """
    require_absent(target, force)
    partial = target.with_name(f".{target.name}.partial")
    with _locked_directory(partial, target):
        if not resume:
            empty_directory(partial)
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(target, replaced)
        os.replace(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked_directory(directory: Path, target: Path) -> Iterator[None]:
    """Create `directory` and hold the lock on it; the lock ends with the process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls above the other writer may have finished and renamed the folder.
            ours = directory.exists() and os.path.samestat(os.fstat(handle), directory.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise G4Error(f"Another g4 is writing {target} right now.", hint="Wait for it, or use another --output.")
        yield
    finally:
        os.close(handle)


def empty_directory(directory: Path) -> None:
    """Remove everything inside a folder and keep the folder."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def format_bytes(count: int | float) -> str:
    """Render bytes in binary units with three significant digits: 512 B, 1.50 KiB, 17.4 GiB."""
    value = float(count)
    if value < 1024:
        return f"{int(value)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")
