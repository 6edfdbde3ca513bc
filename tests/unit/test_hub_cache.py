"""The file that arrives in parts, and what the disk's failures are called."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4cli.hub.cache import Partial, RepoCache
from gemma4cli.hub.client import RemoteFile
from gemma4cli.hub.download import blob_hash
from gemma4cli.hub.failures import explain_disk


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), part_bytes=st.integers(1, 100), choices=st.randoms(use_true_random=False))
def test_any_order_and_any_number_of_restarts_give_the_file(
    tmp_path: Path, data: bytes, part_bytes: int, choices: object
) -> None:
    blob = tmp_path / "blob"
    partial = Partial(blob, len(data), part_bytes)
    while missing := [part for part in range(len(partial.received)) if not partial.is_complete(part)]:
        part = choices.choice(missing)
        start, end = partial.extent(part)
        position = start + partial.received[part]
        partial.write(part, data[position : choices.randint(position + 1, end)])
        if choices.random() < 0.3:
            received = list(partial.received)
            partial.close()
            partial = Partial(blob, len(data), part_bytes)
            assert partial.received == received
    assert partial.read(0, len(data)) == data
    partial.finish()
    partial.close()
    assert blob.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_other_part_sizes_start_over(tmp_path: Path) -> None:
    first = Partial(tmp_path / "blob", 100, 10)
    first.write(0, bytes(10))
    first.close()
    second = Partial(tmp_path / "blob", 100, 20)
    assert second.received == [0] * 5
    second.close()


def test_what_is_missing_is_counted_from_the_ledger(tmp_path: Path) -> None:
    file = RemoteFile("m.gguf", 100, "a" * 64)
    cache = RepoCache("o/r", tmp_path)
    assert cache.missing_bytes(file, "c" * 40) == 100
    assert not list(tmp_path.iterdir())
    partial = cache.partial(file, 30)
    partial.write(2, bytes(25))
    partial.close()
    assert cache.missing_bytes(file, "c" * 40) == 75
    cache.blob(file).write_bytes(bytes(100))
    assert cache.missing_bytes(file, "c" * 40) == 0


def test_hashes_are_those_of_git_and_git_lfs() -> None:
    # `printf hello | git hash-object --stdin`
    small = blob_hash(RemoteFile("x", 5, "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"))
    small.update(b"hello")
    assert small.hexdigest() == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    large = blob_hash(RemoteFile("x", 5, "0" * 64))
    large.update(b"hello")
    assert large.hexdigest() == hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "The disk of the cache /cache is full."),
        (errno.EDQUOT, "The disk of the cache /cache is full."),
        (errno.EROFS, "The cache /cache cannot be written: Read-only file system."),
        (errno.EACCES, "The cache /cache cannot be written: Permission denied."),
    ],
)
def test_disk_failures_are_told_apart(number: int, sentence: str) -> None:
    import os

    error = explain_disk(OSError(number, os.strerror(number)), Path("/cache"))
    assert error.message == sentence
    assert "HF_HOME" in error.hint or "hf cache" in error.hint
