"""Fetch files of a repository into the cache: in parts over several connections, resumed, hashed while they arrive."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.hub.cache import Partial, RepoCache
from gemma4cli.hub.client import HUB_ERRORS, Hub, RemoteFile, Repository, Stopped
from gemma4cli.hub.failures import explain_disk
from gemma4cli.progress import Progress, Task

# One connection to a CDN gives some 50 to 100 MB/s; eight fill most lines. Parts are large because each costs the hub
# a request, and those are limited per five minutes.
CONNECTIONS = 8
PART_BYTES = 256 << 20
_HASH_CHUNK_BYTES = 8 << 20


def fetch(
    hub: Hub,
    source: Repository,
    files: Sequence[RemoteFile],
    cache: RepoCache,
    progress: Progress,
    *,
    connections: int = CONNECTIONS,
    part_bytes: int = PART_BYTES,
) -> Path:
    """Bring `files` into the cache and return the snapshot's folder.

    A file is there, under its final name, only when its size and hash are right. What arrived before an interruption
    is kept and not fetched again. The revision is recorded last, when everything is there.

    Raises: G4Error for every failure of the hub, the network or the disk.
    """
    try:
        missing = sum(cache.missing_bytes(file, source.commit) for file in files)
        with progress.phase(f"pull {source.repo}", missing) as total:
            for file in files:
                with cache.only_us(file, progress.note):
                    if not cache.holds(file, source.commit):
                        _Download(hub, source, file, cache, progress, total).run(connections, part_bytes)
                    cache.link(file, source.commit)
        cache.remember_revision(source.revision, source.commit)
    except OSError as error:
        raise explain_disk(error, cache.root) from error
    return cache.snapshot(source.commit)


def blob_hash(file: RemoteFile) -> hashlib._Hash:
    """Start the hash that a file's etag is: SHA-256 of a large file, git's object id of a small one."""
    return hashlib.sha256() if file.is_lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


class _Download:
    """One file on its way: daemon threads fetch its parts while the calling thread hashes them in order."""

    def __init__(
        self, hub: Hub, source: Repository, file: RemoteFile, cache: RepoCache, progress: Progress, total: Task
    ) -> None:
        self._hub, self._source, self._file, self._cache = hub, source, file, cache
        self._progress, self._total = progress, total
        # Guards the partial file, the bars and `_failure`; signalled when a part is complete or a thread gives up.
        self._changed = threading.Condition()
        self._failure: Exception | None = None

    def run(self, connections: int, part_bytes: int) -> None:
        partial = self._cache.partial(self._file, part_bytes)
        have = sum(partial.received)
        if have:
            self._progress.note(
                f"Going on with {self._file.name}: {format_bytes(have)} of {format_bytes(self._file.size)} are here."
            )
        try:
            with self._progress.phase(self._file.name, self._file.size - have) as bar:
                self._start_threads(partial, bar, connections)
                digest = self._hash_as_it_arrives(partial)
            self._check_hash(digest, partial)
            partial.finish()
        except BaseException:
            # A thread may hang in a read for seconds: it must not write to a descriptor closed and perhaps reused.
            with self._changed:
                self._hub.stop.set()
            raise
        finally:
            partial.close()

    def _start_threads(self, partial: Partial, bar: Task, connections: int) -> None:
        jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        for part in range(len(partial.received)):
            if not partial.is_complete(part):
                jobs.put(part)
        for _ in range(min(connections, jobs.qsize())):
            threading.Thread(target=self._work, args=(jobs, partial, bar), daemon=True).start()

    def _work(self, jobs: queue.SimpleQueue[int], partial: Partial, bar: Task) -> None:
        """Fetch parts until none is left or one cannot be had."""
        with contextlib.suppress(queue.Empty):
            while self._failure is None:
                part = jobs.get_nowait()
                try:
                    self._fetch_part(part, partial, bar)
                except Exception as error:  # the calling thread raises it
                    self._failure = self._failure or error
                with self._changed:
                    self._changed.notify_all()

    def _fetch_part(self, part: int, partial: Partial, bar: Task) -> None:
        patience = self._hub.patience(self._source, self._file)
        start, end = partial.extent(part)
        while not partial.is_complete(part):
            try:
                for piece in self._hub.stream(self._source, self._file, start + partial.received[part], end):
                    self._store(part, piece, partial, bar)
                    patience.succeeded()
            except HUB_ERRORS as error:
                patience.wait_after(error)

    def _store(self, part: int, piece: bytes, partial: Partial, bar: Task) -> None:
        with self._changed:
            if self._hub.stop.is_set():
                raise Stopped
            partial.write(part, piece)
            bar.advance(len(piece))
            self._total.advance(len(piece))

    def _hash_as_it_arrives(self, partial: Partial) -> str:
        digest = blob_hash(self._file)
        for part in range(len(partial.received)):
            with self._changed:
                self._changed.wait_for(lambda part=part: self._failure is not None or partial.is_complete(part))
            if self._failure is not None:
                raise self._failure
            position, end = partial.extent(part)
            while chunk := partial.read(position, min(_HASH_CHUNK_BYTES, end - position)):
                digest.update(chunk)
                position += len(chunk)
        return digest.hexdigest()

    def _check_hash(self, digest: str, partial: Partial) -> None:
        if digest == self._file.etag:
            return
        partial.discard()
        raise G4Error(
            f"{self._file.name} of {self._source.repo} arrived damaged: its hash is {digest[:12]}…, the "
            f"repository says {self._file.etag[:12]}…. It was thrown away.",
            hint="Run the same command again; if it happens twice, the hub or a proxy serves a damaged copy.",
        )
