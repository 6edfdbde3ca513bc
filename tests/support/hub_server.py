"""A hub on loopback: the parts of Hugging Face's API that `g4 pull` speaks, over real sockets, with faults on demand.

/api/models/{repo}[/revision/{rev}]    what a repository holds
/{repo}/resolve/{rev}/{file}           small files directly, large ones by redirect to the CDN
/cdn/{sha256}                          the bytes; reached as `localhost`, another origin than the hub's 127.0.0.1

with HubServer() as hub:
    hub.add("owner/model", {"config.json": b"…"})
    hub.fail("model.safetensors", Fault(status=503, times=2))
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".gguf", "tokenizer.json")
_PIECE = 4096


@dataclass
class Fault:
    """Something that goes wrong with the first `times` requests for a file (GET, on its last hop).

    Attributes:
        status: answer with this HTTP status and `headers` instead.
        cut_after: send this many bytes of the body, then reset the connection.
        seconds_per_piece: wait this long before every 4 KiB.
        corrupt: flip a bit of the body.
        whole: ignore the Range header.
        only_from: apply only to requests that start at or after this byte.
    """

    times: int = 1 << 30
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    seconds_per_piece: float = 0.0
    corrupt: bool = False
    whole: bool = False
    only_from: int = 0


@dataclass
class FakeRepo:
    """A repository with one commit; `listed` overrides sizes or hashes that the list states."""

    files: dict[str, bytes]
    commit: str
    refs: set[str]
    status: int | None = None
    error_code: str = ""
    token: str | None = None
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request the server saw."""

    method: str
    path: str
    start: int
    authorized: bool
    host: str


def is_large(name: str) -> bool:
    return name.endswith(_LARGE)


def etag_of(name: str, data: bytes) -> str:
    """The blob's name in the cache: SHA-256 for large files, git's object id for small ones."""
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Serves repositories on a free loopback port until the `with` block ends."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.requests: list[Request] = []
        self.served: dict[str, int] = {}
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: dict[str, bytes], refs: tuple[str, ...] = ("main",)) -> FakeRepo:
        digest = hashlib.sha1(repr(sorted((n, etag_of(n, d)) for n, d in files.items())).encode()).hexdigest()
        self.repos[name] = FakeRepo(dict(files), digest, set(refs))
        return self.repos[name]

    def fail(self, path_part: str, fault: Fault) -> None:
        """Apply a fault to every request whose file name (or /api path) contains `path_part`."""
        self._faults.setdefault(path_part, []).append(fault)

    def heal(self) -> None:
        self._faults.clear()

    def count(self, path_part: str, method: str = "GET") -> int:
        return sum(path_part in request.path and request.method == method for request in self.requests)

    def note_served(self, name: str, count: int) -> None:
        with self._lock:
            self.served[name] = self.served.get(name, 0) + count

    def take_fault(self, name: str, start: int) -> Fault | None:
        with self._lock:
            for part, faults in self._faults.items():
                for fault in faults:
                    if part in name and fault.times > 0 and start >= fault.only_from:
                        fault.times -= 1
                        return fault
        return None

    def find_blob(self, sha256: str) -> tuple[str, bytes] | None:
        for repo in self.repos.values():
            for name, data in repo.files.items():
                listed = repo.listed.get(name, {})
                if is_large(name) and sha256 in (listed.get("sha256", etag_of(name, data)), listed.get("etag")):
                    return name, data
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what these tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.server_hub.requests.append(
            Request(self.command, path, start, "Authorization" in self.headers, self.headers.get("Host", ""))
        )
        try:
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._info(match[1], match[2] or "main", path)
            elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
                self._cdn(match[1], start)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3], start)
            else:
                self._error(404, "")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _repo(self, name: str, revision: str) -> FakeRepo | None:
        """Return the repository, or answer why not."""
        repo = self.server_hub.repos.get(name)
        if repo is None:
            return self._error(404 if "Authorization" in self.headers else 401, "RepoNotFound")
        if repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._error(401, "RepoNotFound")
        if revision != repo.commit and revision not in repo.refs:
            return self._error(404, "RevisionNotFound")
        return repo

    def _info(self, name: str, revision: str, path: str) -> None:
        fault = self.server_hub.take_fault(path, 0)
        if fault is not None and fault.status is not None:
            return self._error(fault.status, "", fault.headers)
        if fault is not None:
            return self._body("api", b"<html>log in to the hotel first</html>", 0, None, {}, "text/html")
        repo = self._repo(name, revision)
        if repo is None:
            return None
        siblings = []
        for file, data in repo.files.items():
            listed = {"size": len(data), "sha256": etag_of(file, data)} | repo.listed.get(file, {})
            sibling = {"rfilename": file, "size": listed["size"], "blobId": "0" * 40}
            if is_large(file):
                sibling["lfs"] = {"sha256": listed["sha256"], "size": listed["size"], "pointerSize": 134}
            else:
                sibling["blobId"] = listed["sha256"]
            siblings.append(sibling)
        document = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "tags": [], "downloads": 0}
        return self._body("api", json.dumps(document).encode(), 0, None, {}, "application/json")

    def _resolve(self, name: str, revision: str, file: str, start: int) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return None
        if repo.status is not None:
            return self._error(repo.status, repo.error_code)
        if file not in repo.files:
            return self._error(404, "EntryNotFound")
        data = repo.files[file]
        etag = repo.listed.get(file, {}).get("etag") or etag_of(file, data)
        if "sha256" in repo.listed.get(file, {}):
            etag = repo.listed[file]["sha256"]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'}
        if not is_large(file):
            return self._body(file, data, start, self.server_hub.take_fault(file, start), headers)
        headers |= {
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"http://localhost:{self.server_hub.port}/cdn/{etag}",
        }
        return self._empty(302, headers)

    def _cdn(self, sha256: str, start: int) -> None:
        found = self.server_hub.find_blob(sha256)
        if found is None:
            return self._error(404, "")
        name, data = found
        return self._body(name, data, start, self.server_hub.take_fault(name, start), {"ETag": '"the-cdn-has-its-own"'})

    def _body(
        self, name: str, data: bytes, start: int, fault: Fault | None, headers: dict[str, str], kind: str = "bytes"
    ) -> None:
        fault = fault or Fault()
        if fault.status is not None:
            return self._error(fault.status, "", fault.headers)
        if fault.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        total = len(data)
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        ranged = asked is not None and not fault.whole
        if ranged:
            data = data[start : int(asked[2]) + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        self.send_response(206 if ranged else 200)
        for key, value in {**headers, "Content-Length": str(len(data)), "Content-Type": kind}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._send(name, data, fault)

    def _send(self, name: str, data: bytes, fault: Fault) -> None:
        cut = len(data) if fault.cut_after is None else fault.cut_after
        for position in range(0, min(cut, len(data)), _PIECE):
            if fault.seconds_per_piece:
                time.sleep(fault.seconds_per_piece)
            piece = data[position : min(position + _PIECE, cut)]
            self.wfile.write(piece)
            self.server_hub.note_served(name, len(piece))
        if cut < len(data):
            self._reset()

    def _reset(self) -> None:
        """Close with a reset instead of an orderly end, as a broken line does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._empty(status, ({"X-Error-Code": code} if code else {}) | (headers or {}))

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()
