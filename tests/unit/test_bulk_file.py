"""Large files written in pieces: the bytes, the checksum, and what a disk that fills up leaves."""

from __future__ import annotations

import errno
import itertools
import os
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma4cli import bulk_file
from gemma4cli.bulk_file import PAGE, BulkFile, crc32_of_both

SIZES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 70_000, (3 << 20) + 7)


@pytest.fixture(params=[False, True], ids=["cached", "past the cache"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether small files take the way of large ones. (On a filesystem without O_DIRECT both ways are the same.)"""
    if request.param:
        monkeypatch.setattr(bulk_file, "DIRECT_BYTES", 0)
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_pieces_in_any_order_make_the_file(tmp_path: Path, direct: bool, size: int) -> None:
    shuffled = random.Random(size)
    data = shuffled.randbytes(size)
    cuts = sorted({0, size, *(shuffled.randrange(size + 1) for _ in range(50))})
    pieces = list(itertools.pairwise(cuts))
    shuffled.shuffle(pieces)
    path = tmp_path / "file"
    with BulkFile(path, size, checksum=True) as file, ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda piece: file.write(memoryview(data)[slice(*piece)], piece[0]), pieces):
            pass
        file.finish()
        checksum = file.crc32()
    assert path.read_bytes() == data
    assert checksum == f"{zlib.crc32(data):08x}"


def test_what_nobody_writes_is_zero(tmp_path: Path, direct: bool) -> None:
    """A page with two tensors' ends, and a hole at the end of the file that takes no disk."""
    with BulkFile(tmp_path / "file", 64 << 20) as file:
        file.write(memoryview(b"a" * 10), 5)
        file.write(memoryview(b"b" * 10), PAGE - 10)
        file.finish()
    found = (tmp_path / "file").read_bytes()
    assert found.startswith(bytes(5) + b"a" * 10 + bytes(PAGE - 25) + b"b" * 10)
    assert not found[PAGE:].strip(b"\0")
    assert len(found) == 64 << 20
    assert (tmp_path / "file").stat().st_blocks * 512 <= 16 * PAGE


@pytest.mark.parametrize("pieces", [[(0, 60)], [(0, 60), (59, 100)], [(0, 60), (61, 100)]])
def test_a_checksum_of_less_or_more_than_the_file_is_none(tmp_path: Path, pieces: list[tuple[int, int]]) -> None:
    with BulkFile(tmp_path / "file", 100, checksum=True) as file:
        for start, stop in pieces:
            file.write(memoryview(bytes(stop - start)), start)
        with pytest.raises(AssertionError, match="written"):
            file.crc32()


def test_checksums_of_parts_make_that_of_the_whole() -> None:
    data = random.Random(0).randbytes(100_000)
    for cut in (0, 1, 3, 4096, 65_537, 100_000):
        parts = data[:cut], data[cut:]
        assert crc32_of_both(*map(zlib.crc32, parts), len(parts[1])) == zlib.crc32(data)


def test_a_short_write_is_continued_and_a_full_disk_is_an_error(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may take less than it was given, and not in whole pages; then it refuses."""
    write, data = os.pwrite, random.Random(1).randbytes(300_000)

    def short(handle: int, piece: memoryview, offset: int) -> int:
        taken = write(handle, piece[: 2 * PAGE], offset)
        return taken - 5 if len(piece) > taken else taken

    def full(handle: int, piece: memoryview, offset: int) -> int:
        return PAGE // 2 if direct else 0

    monkeypatch.setattr(os, "pwrite", short)
    with BulkFile(tmp_path / "file", len(data)) as file:
        file.write(memoryview(data), 0)
        file.finish()
        assert (tmp_path / "file").read_bytes() == data
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left") as failure:
            file.write(memoryview(data), 0)
    assert failure.value.errno == errno.ENOSPC
