"""What went wrong with the hub, as one sentence and one thing to do."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from gemma4cli.errors import G4Error

TRANSIENT = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Asked:
    """What was being asked of which hub, for the sentences."""

    endpoint: str
    repo: str
    revision: str
    filename: str | None = None

    @property
    def what(self) -> str:
        return f"{self.filename} of {self.repo}" if self.filename else self.repo


def is_transient(error: Exception) -> bool:
    """Whether asking again may help: the connection failed, or the server says it is busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    return isinstance(error, TRANSIENT)


def seconds_to_wait(error: Exception) -> float | None:
    """Return how long the server asks us to wait (rate-limit header, else Retry-After in seconds), if it does."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    stated = headers.get("Retry-After", "").strip()
    return float(stated) if stated.isdigit() else None


def explain(error: Exception, asked: Asked) -> G4Error:
    """Turn a failure of a request into a sentence; an error that is none of the network's is raised again as it is."""
    if isinstance(error, G4Error):
        return error
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, asked)
    if isinstance(error, httpx2.ProxyError):
        return G4Error(f"The proxy refused the connection to {asked.endpoint}: {error}.", hint="Check HTTPS_PROXY.")
    if isinstance(error, httpx2.TooManyRedirects):
        return G4Error(f"{asked.endpoint} redirects in a circle for {asked.what}.", hint="Check HF_ENDPOINT.")
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return G4Error(f"{asked.endpoint} is not an address of a hub: {error}.", hint="Check HF_ENDPOINT.")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return G4Error(
            f"{asked.endpoint} cannot be reached: {error}.",
            hint="Check the network and HTTPS_PROXY; a model that is in the cache needs none: --offline.",
        )
    if isinstance(error, httpx2.TransportError):
        return G4Error(
            f"The connection to {asked.endpoint} was lost while fetching {asked.what}: {_reason(error)}.",
            hint="Run the same command again; it goes on where it stopped.",
        )
    raise error


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _explain_status(error: HfHubHTTPError, asked: Asked) -> G4Error:
    status = error.response.status_code
    page = f"{asked.endpoint}/{asked.repo}"
    # GatedRepoError is a RepositoryNotFoundError.
    if isinstance(error, GatedRepoError):
        return _explain_gated(status, page, asked)
    if isinstance(error, DisabledRepoError):
        return G4Error(f"{asked.repo} was disabled by its hub.", hint=f"See {page}.")
    if isinstance(error, RevisionNotFoundError):
        return G4Error(f"{asked.repo} has no revision {asked.revision}.", hint=f"See {page}/tree/main for what it has.")
    if isinstance(error, RemoteEntryNotFoundError):
        return G4Error(
            f"{asked.what} does not exist at revision {asked.revision}.", hint=f"See {page}/tree/{asked.revision}."
        )
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and asked.filename is None):
        return G4Error(
            f"There is no repository {asked.repo} on {asked.endpoint}, or it is private and hidden from your token.",
            hint="Check the spelling; for a private one set HF_TOKEN or run hf auth login.",
        )
    if status == 401:
        return G4Error(
            f"{asked.endpoint} refused the token.", hint="Renew it: set HF_TOKEN, or run hf auth login again."
        )
    if status == 403:
        return G4Error(f"Your token may not read {asked.what}.", hint=f"Check its permissions; see {page}.")
    if status == 429:
        wait = seconds_to_wait(error)
        hint = f"Try again in {wait:.0f} s" if wait is not None else "Try again later"
        return G4Error(
            f"{asked.endpoint} limits the rate of requests and refused {asked.what}.",
            hint=f"{hint}; a token (HF_TOKEN) has a higher limit. What was fetched is kept.",
        )
    if status in _TRANSIENT_STATUS:
        return G4Error(
            f"{asked.endpoint} keeps failing for {asked.what} (HTTP {status}).",
            hint="Run the same command again later; it goes on where it stopped.",
        )
    return G4Error(
        f"{asked.endpoint} answered HTTP {status} for {asked.what}.", hint=f"See {page}, and check HF_ENDPOINT."
    )


def _explain_gated(status: int, page: str, asked: Asked) -> G4Error:
    if status == 401:
        return G4Error(
            f"{asked.repo} is gated, and no token was sent.",
            hint=f"Accept its terms at {page}, then set HF_TOKEN or run hf auth login.",
        )
    return G4Error(f"{asked.repo} is gated, and your account has no access yet.", hint=f"Ask for it at {page}.")


def explain_disk(error: OSError, cache: Path) -> G4Error:
    """Turn a failure to write into the cache into a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return G4Error(
            f"The disk of the cache {cache} is full.",
            hint="Free some space (hf cache rm) and run the same command again; it goes on where it stopped.",
        )
    return G4Error(
        f"The cache {cache} cannot be written: {error.strerror or error}.",
        hint="Check its permissions, or choose another place with HF_HOME.",
    )


def changed(asked: Asked) -> G4Error:
    """A file is not what the repository's list said it was."""
    return G4Error(
        f"{asked.what} changed while it was being fetched.",
        hint="Run the same command again: it starts from the new version.",
    )
