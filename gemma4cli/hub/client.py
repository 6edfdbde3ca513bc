"""Asking a hub: what a repository holds, and bytes of its files, with retries.

The session (proxies, certificates, HF_TOKEN, HF_ENDPOINT, offline mode), the headers and the error classes are
huggingface_hub's. Its own file downloads (2.4) start from zero after an interruption, over HTTP and Xet alike, and do
not check hashes; so the bytes are read here by HTTP range request, which every hub serves for Xet-stored files too.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from gemma4cli import __version__
from gemma4cli.errors import G4Error
from gemma4cli.hub.failures import (
    Asked,
    changed,
    explain,
    is_transient,
    seconds_to_wait,
)

T = TypeVar("T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
HUB_ERRORS = (HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL)
# A server without range requests sends the file from its start; more than this much is not worth reading past.
_MAX_SKIPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class RetryPolicy:
    """How often to ask after failures that may pass, and how long to wait (seconds) in between."""

    attempts: int = 6
    first_contact_attempts: int = 2
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    longest_stated_wait_s: float = 300.0

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """G4_HUB_RETRY_WAIT (seconds before the first retry) is for tests; it is no part of the interface."""
        return cls(first_wait_s=float(os.environ.get("G4_HUB_RETRY_WAIT", "1.0")))


class Stopped(Exception):
    """The download was told to stop while it waited."""


class Patience:
    """Counts the failures in a row of one piece of work; a success in between starts the count again."""

    def __init__(self, hub: Hub, asked: Asked) -> None:
        self._hub, self._policy, self._asked = hub, hub.policy, asked
        self._failures = 0

    def succeeded(self) -> None:
        self._hub.reached = True
        self._failures = 0

    def wait_after(self, error: Exception) -> None:
        """Wait before the next attempt, or raise the explained error when there is none."""
        self._failures += 1
        stated = seconds_to_wait(error)
        too_long = stated is not None and stated > self._policy.longest_stated_wait_s
        # A hub that never answered is not having a hiccup: the network is down, or the address is wrong.
        never_answered = isinstance(error, httpx2.ConnectError) and not self._hub.reached
        attempts = self._policy.first_contact_attempts if never_answered else self._policy.attempts
        if not is_transient(error) or too_long or self._failures >= attempts:
            raise explain(error, self._asked) from error
        wait = self._backoff() if stated is None else stated
        self._hub.say(f"{_short(error)} for {self._asked.what}; trying again in {wait:.1f} s.")
        if self._hub.stop.wait(wait):
            raise Stopped

    def _backoff(self) -> float:
        # Jitter keeps the connections of one download from coming back all at once.
        wait = self._policy.first_wait_s * 2 ** (self._failures - 1) * random.uniform(0.75, 1.25)
        return min(wait, self._policy.longest_wait_s)


def _short(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return "No connection" if isinstance(error, httpx2.ConnectError) else "Lost the connection"


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit. `etag` names the blob: the SHA-256 of a large file, the git object id of a small one."""

    name: str
    size: int
    etag: str

    @property
    def is_lfs(self) -> bool:
        return len(self.etag) == 64


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    repo: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]


class Hub:
    """A hub and how patiently to ask it.

    Args:
        endpoint: its address; HF_ENDPOINT or huggingface.co when None.
        say: takes one sentence per retry.
    Attributes:
        stop: set it to end all waiting and reading; the hub is of no use afterwards.
        reached: whether it has answered yet.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        policy: RetryPolicy | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.policy = policy or RetryPolicy.from_environment()
        self.say = say
        self.stop = threading.Event()
        self.reached = False
        self._api = HfApi(endpoint=self.endpoint, library_name="g4", library_version=__version__)

    def repository(self, repo: str, revision: str) -> Repository:
        """Ask what a repository holds at a revision.

        Raises: G4Error, one sentence for each way in which a hub refuses.
        """
        asked = Asked(self.endpoint, repo, revision)
        no_hub = G4Error(
            f"{self.endpoint} does not answer like a hub for {repo}.",
            hint="Check HF_ENDPOINT, and whether the network wants you to log in first.",
        )
        try:
            info = self._retry(
                asked,
                lambda: self._api.model_info(
                    repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
                ),
            )
        except json.JSONDecodeError:
            raise no_hub from None
        if not _COMMIT.fullmatch(info.sha or "") or info.siblings is None:
            raise no_hub
        files = [
            RemoteFile(
                sibling.rfilename,
                sibling.lfs.size if sibling.lfs else sibling.size,
                sibling.lfs.sha256 if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings
        ]
        for file in files:
            self._check(file, repo)
        return Repository(repo, revision, info.sha, {file.name: file for file in files})

    def read(self, source: Repository, file: RemoteFile, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`, fewer only where the file ends."""
        end = min(start + length, file.size)
        asked = Asked(self.endpoint, source.repo, source.revision, file.name)
        return self._retry(asked, lambda: b"".join(self.stream(source, file, start, end)))

    def stream(self, source: Repository, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes [start, end) of a file in pieces as they arrive; one attempt, errors are huggingface_hub's.

        Raises: G4Error when the server now has another version of the file.
        """
        headers = build_hf_headers(library_name="g4", library_version=__version__)
        headers["Accept-Encoding"] = "identity"
        if start > 0 or end < file.size:
            headers["Range"] = f"bytes={start}-{end - 1}"
        # Always the hub's own address, never the CDN's it redirected to last time: those expire within the hour.
        url = hf_hub_url(source.repo, file.name, revision=source.commit, endpoint=self.endpoint)
        if end <= start:
            return
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            asked = Asked(self.endpoint, source.repo, source.revision, file.name)
            _check_version(response, file, asked)
            position = start if response.status_code == 206 else 0
            if start - position > _MAX_SKIPPED_BYTES:
                raise G4Error(f"{self.endpoint} cannot send a part of {asked.what}.", hint="Check HF_ENDPOINT.")
            for piece in response.iter_bytes():
                skipped = max(start - position, 0)
                position += len(piece)
                if wanted := piece[skipped : len(piece) - max(position - end, 0)]:
                    yield wanted
                if position >= end:
                    return
        raise httpx2.RemoteProtocolError(f"the server sent {position - start} of {end - start} bytes")

    def patience(self, source: Repository, file: RemoteFile) -> Patience:
        """Return a fresh count of failures for one piece of a file."""
        asked = Asked(self.endpoint, source.repo, source.revision, file.name)
        return Patience(self, asked)

    def _retry(self, asked: Asked, request: Callable[[], T]) -> T:
        patience = Patience(self, asked)
        while True:
            try:
                answer = request()
                patience.succeeded()
                return answer
            except HUB_ERRORS as error:
                patience.wait_after(error)

    def _check(self, file: RemoteFile, repo: str) -> None:
        """Names and hashes become paths in the cache: accept none that could leave it."""
        parts = file.name.split("/")
        whole = isinstance(file.size, int) and file.size >= 0 and _HASH.fullmatch(file.etag or "")
        if not whole or "\\" in file.name or any(part in ("", ".", "..") for part in parts):
            raise G4Error(f"{self.endpoint} lists {file.name!r} of {repo} wrongly.", hint="Check HF_ENDPOINT.")


def _check_version(response: httpx2.Response, file: RemoteFile, asked: Asked) -> None:
    """Compare the hub's word on the file with the list's; the CDN's own ETag means something else."""
    hops = [*response.history, response]
    stated = [hop.headers[constants.HUGGINGFACE_HEADER_X_LINKED_ETAG] for hop in hops if "X-Linked-Etag" in hop.headers]
    if not stated and not file.is_lfs and "ETag" in response.headers:
        stated = [response.headers["ETag"]]
    if stated and stated[0].removeprefix("W/").strip('"') != file.etag:
        raise changed(asked)
