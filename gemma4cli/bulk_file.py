"""Large new files, written in pieces of any size, in any order, by several threads at once.

The system copies what is written into its page cache first, page by page, and throws out other pages for it: for files
as large as memory that takes longer than the disk does, and loses the source that is being read. So large files are
written past it (O_DIRECT). That takes whole pages at aligned addresses: what a piece begins and ends with in the midst
of a page is put together in memory, and a piece that does not lie in memory as it will in the file is copied first.
Where the filesystem has no such writing (tmpfs on older systems), it is done the usual way.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import threading
import zlib
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np

from gemma4cli.native import load_codes

PAGE = 4096
# Smaller files are soon read again and fit the page cache.
DIRECT_BYTES = 256 << 20
_BUFFER_BYTES = 4 << 20


class ThreadMemory(threading.local):
    """Memory that each thread uses again and again: touching fresh memory takes longer than most of what is done in it.

    What it gives is the calling thread's until that asks for more.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BUFFER_BYTES)

    def take(self, offset: int, count: int) -> memoryview:
        """Return memory for bytes that will be written at `offset` of a file: from there they need not be copied."""
        start = offset % PAGE
        needed = start + count
        if len(self._memory) < needed:
            self._memory = mmap.mmap(-1, -(-needed // _BUFFER_BYTES) * _BUFFER_BYTES)
        return memoryview(self._memory)[start:needed]


_UNALIGNED = ThreadMemory()


class BulkFile:
    """A file that is being made; as a context manager it is closed at the end.

    Nothing is on the disk for certain before `finish` returns. Bytes that nobody writes are zero.
    """

    def __init__(self, path: Path, nbytes: int, *, past_cache: bool = True, checksum: bool = False) -> None:
        """Create the file or empty it.

        Args:
            past_cache: do not leave it in the page cache, when it is large.
            checksum: compute the CRC-32 on the way; every byte must then be written, once.
        """
        self._nbytes = nbytes
        self._pieces: list[tuple[int, int, int]] | None = [] if checksum else None
        self._edges: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        try:
            os.truncate(self._handle, nbytes)
            self._direct = past_cache and nbytes >= DIRECT_BYTES and _writes_directly(self._handle)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> BulkFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, whole or not."""
        os.close(self._handle)

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes from `offset` of the file on. Safe to call from several threads.

        Raises: OSError as the system does.
        """
        if self._pieces is not None:
            piece = offset, len(data), _crc32(data)
            with self._lock:
                self._pieces.append(piece)
        if self._direct:
            self._write_directly(data, offset)
        else:
            _write_all(self._handle, data, offset)

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        # Neighbouring pages go together.
        for _, run in itertools.groupby(enumerate(sorted(self._edges)), key=lambda item: item[1] - item[0]):
            pages = [page for _, page in run]
            self._write_directly(memoryview(b"".join(self._edges[page] for page in pages)), pages[0] * PAGE)
        self._edges.clear()
        if self._direct:
            os.truncate(self._handle, self._nbytes)  # the last page was written whole
        os.fsync(self._handle)

    def crc32(self) -> str:
        """Return the CRC-32 of the whole file as 8 hex digits, like ``files.crc32_file``."""
        assert self._pieces is not None
        end = value = 0
        for start, count, crc in sorted(self._pieces):
            assert start == end, f"bytes {min(start, end)} to {max(start, end)} were not written once"
            value = crc32_of_both(value, crc, count)
            end = start + count
        assert end == self._nbytes, f"{end} of {self._nbytes} bytes were written"
        return f"{value:08x}"

    def _write_directly(self, data: memoryview, offset: int) -> None:
        """Write what lies in whole pages, and keep the rest for `finish`."""
        if not data:
            return
        head = min(-offset % PAGE, len(data))
        tail = (offset + len(data)) % PAGE if head < len(data) else 0
        body = len(data) - head - tail
        if head:
            self._keep(data[:head], offset)
        if tail:
            self._keep(data[head + body :], offset + head + body)
        pages, place = data[head : head + body], offset + head
        if _address(pages) % PAGE == 0:
            _write_all(self._handle, pages, place, PAGE)
            return
        for start in range(0, body, _BUFFER_BYTES):
            piece = pages[start : start + _BUFFER_BYTES]
            buffer = _UNALIGNED.take(0, len(piece))
            np.copyto(np.frombuffer(buffer, np.uint8), piece)
            _write_all(self._handle, buffer, place + start, PAGE)

    def _keep(self, data: memoryview, offset: int) -> None:
        page, start = divmod(offset, PAGE)
        with self._lock:
            self._edges.setdefault(page, bytearray(PAGE))[start : start + len(data)] = data


def crc32_of_both(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two strings one after the other from that of each.

    CRC-32 is a remainder of polynomials over GF(2) (RFC 1952, reflected: the highest bit is the constant term); putting
    bytes after the first string multiplies its remainder by x^8 for each of them.
    """
    return _times(_shift(second_bytes), first) ^ second


_POLYNOMIAL, _ONE, _X8 = 0xEDB88320, 0x80000000, 0x00800000


@cache
def _shift(count: int) -> int:
    """x^(8 count), by squaring."""
    power, square = _ONE, _X8
    while count:
        if count & 1:
            power = _times(square, power)
        square = _times(square, square)
        count >>= 1
    return power


def _times(first: int, second: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if first >> bit & 1:
            product ^= second
        second = second >> 1 ^ (_POLYNOMIAL if second & 1 else 0)
    return product


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def _crc32(data: memoryview) -> int:
    """Return zlib's CRC-32."""
    if not _crc32_is_fast():
        return zlib.crc32(data)
    return load_codes().g4_crc32(ctypes.c_uint32(0), ctypes.c_void_p(_address(data)), ctypes.c_size_t(len(data)))


@cache
def _crc32_is_fast() -> bool:
    library = load_codes()
    fast = bool(library.g4_crc32_is_fast())
    if fast:
        library.g4_crc32.restype = ctypes.c_uint32
    return fast


def _writes_directly(handle: int) -> bool:
    """Switch the file to O_DIRECT if its filesystem has that, found out by writing a page."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        if flag:
            fcntl.fcntl(handle, fcntl.F_SETFL, flags | flag)
            page = _UNALIGNED.take(0, PAGE)
            page[:] = bytes(PAGE)
            os.pwrite(handle, page, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
        return False
    return bool(flag)


def _write_all(handle: int, data: memoryview, offset: int, unit: int = 1) -> None:
    """Write all of it; a disk that fills up takes less at first, and says so when asked again."""
    while data:
        written = os.pwrite(handle, data, offset)
        written -= written % unit
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[written:], offset + written
