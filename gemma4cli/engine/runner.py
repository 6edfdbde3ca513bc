"""The engine for bundles: a client of ``g4-runner``, the C++ process that owns weights, KV caches and the token loop.

One process serves many sessions, one request at a time, over the line protocol of docs/runner-protocol.md. A thread of
ours reads the replies, so that a generation that nobody iterates any more never blocks the runner.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4cli import native
from gemma4cli.engine.base import (
    Engine,
    Generation,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    TokenStream,
)
from gemma4cli.errors import G4Error
from gemma4cli.model.settings import GREEDY

if TYPE_CHECKING:
    import numpy as np

PROTOCOL_VERSION = 1
LOAD_TIMEOUT_S = 1800.0
"""A 31B program reads some 20 GB from disk before it is ready; no answer after half an hour is a hang."""

_CLOSE_TIMEOUT_S = 5.0
_CANCEL_POLL_S = 0.05
_SCORING_SESSION = "g4.logits"
_SESSION_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STAT_NAMES = tuple(field.name for field in fields(GenerationStats))

Event = dict[str, Any]


class RunnerEngine(Engine):
    """A loaded bundle in a process of its own.

    Args:
        bundle: folder with ``model.pte``.
        threads: how many it computes with on the CPU; None means one per fast core.
        load_timeout_s: how long loading may take.
    Raises: G4Error with the runner's own sentence when it refuses the bundle, or saying how it died.
    """

    def __init__(self, bundle: Path, *, threads: int | None = None, load_timeout_s: float = LOAD_TIMEOUT_S) -> None:
        self._bundle = bundle
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stderr_tail: deque[str] = deque(maxlen=20)
        self._lock = threading.Lock()  # one request at a time
        self._next_id = 0
        self._last_ended: int | None = None  # the request whose last reply was read most recently
        # A session of its own: Ctrl-C in the terminal must stop an answer, not the process that holds the model.
        self._process = subprocess.Popen(
            [native.find_runner(), "--bundle", bundle, *(() if threads is None else ("--threads", str(threads)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=native.runner_environment(),
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._read_replies, self._read_stderr)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.contract = self._wait_until_ready(load_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def context_length(self) -> int:
        return self.contract["context_length"]

    @property
    def load_s(self) -> float:
        """Seconds the runner took to load the bundle."""
        return self.contract["load_s"]

    def generate(self, request: GenerationRequest) -> Generation:
        self.check_fits(request)
        return Generation(lambda cancelled: self._stream(request, cancelled))

    def logits(self, tokens: Sequence[int], *, chunk: int | None = 1) -> Iterator[np.ndarray]:
        """Read tokens from position 0 and yield float32 [1, V] rows: after each chunk, what the model expects next.

        Args:
            chunk: tokens per step. A program gives the logits of a step's last token only, so with 1 there is a row for
                every token.
        """
        import numpy as np

        if " " in tempfile.gettempdir() or not tempfile.gettempdir().isascii():
            raise G4Error(
                f"The folder for temporary files, {tempfile.gettempdir()!r}, cannot be named to the runner.",
                hint="Set TMPDIR to a plain path.",
            )
        size = 4 * self.contract["vocab_size"]
        request = GenerationRequest(tuple(tokens), 1, GREEDY, frozenset(), _SCORING_SESSION, chunk)
        self.check_fits(request)
        with tempfile.TemporaryDirectory(prefix="g4-") as folder, _Fifo(Path(folder) / "logits") as fifo:
            with contextlib.suppress(G4Error):  # the first time there is no such session
                self.close_session(_SCORING_SESSION)
            generation = Generation(lambda cancelled: self._stream(request, cancelled, fifo.path))
            ended = threading.Event()
            failures: list[G4Error] = []

            def drive() -> None:
                try:
                    list(generation)
                except G4Error as error:
                    failures.append(error)
                finally:
                    ended.set()

            driver = threading.Thread(target=drive, daemon=True)
            driver.start()
            try:
                while (row := fifo.read(size, ended)) is not None:
                    yield np.frombuffer(row, dtype=np.float32)[None]
            finally:
                generation.cancel()
                while driver.is_alive():  # it may be blocked by a full pipe
                    fifo.read(size, ended)
                driver.join()
        if failures:
            raise failures[0]

    def close_session(self, session: str) -> None:
        """Free the KV cache of a session; the next request of that name starts over."""
        with self._lock:
            self._send(f"close session={_checked(session)}")
            event = self._next_event(None)
            if event is not None and event["event"] == "error":
                raise G4Error(event["message"])

    def close(self) -> None:
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError):
                process.stdin.write(b"quit\n")
                process.stdin.close()
        try:
            process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _stream(
        self, request: GenerationRequest, cancelled: threading.Event, logits: Path | None = None
    ) -> TokenStream:
        with self._lock:
            request_id = self._next_id
            self._next_id += 1
            self._send(_generate_line(request_id, request) + (f" logits={logits}" if logits else ""))
            tokens: list[int] = []
            finished = cancel_sent = False
            try:
                while True:
                    if cancelled.is_set() and not cancel_sent:
                        cancel_sent = True
                        self._send(f"cancel id={request_id}")
                    event = self._next_event(None if cancel_sent else _CANCEL_POLL_S)
                    if event is None:
                        continue
                    finished = event["event"] in ("done", "error")
                    if event["event"] == "token":
                        tokens.append(event["token"])
                        yield event["token"]
                    elif event["event"] == "done":
                        stats = GenerationStats(**{name: event[name] for name in _STAT_NAMES})
                        return GenerationResult(tuple(tokens), event["finish_reason"], stats)
                    elif event["event"] == "error":
                        raise G4Error(event["message"], hint=event.get("hint"))
            finally:
                if not finished:
                    self._abandon(request_id)

    def _abandon(self, request_id: int) -> None:
        """End a generation whose iterator was dropped half way, so that the next request finds the runner idle."""
        with contextlib.suppress(G4Error):
            self._send(f"cancel id={request_id}")
            # An interruption may have swallowed any reply, the last one too, so it is not waited for in the queue.
            while self._last_ended != request_id:
                self._next_event(_CANCEL_POLL_S)
            while self._next_event(0) is not None:
                pass

    def _wait_until_ready(self, timeout_s: float) -> Event:
        event = self._next_event(timeout_s)
        if event is None:
            raise G4Error(
                f"The runner did not finish loading {self._bundle} within {timeout_s:g} seconds.",
                hint="Is the disk very slow, or is memory being swapped?",
            )
        if event["event"] == "error":
            raise G4Error(event["message"], hint=event.get("hint"))
        if event["event"] != "ready" or event.get("protocol") != PROTOCOL_VERSION:
            raise G4Error(
                f"{native.find_runner()} speaks another protocol than this version of g4.",
                hint="Install g4 again: pip install --force-reinstall --no-deps gemma4cli",
            )
        return event

    def _send(self, line: str) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise G4Error("The runner has been closed.")
        try:
            pipe.write(line.encode("ascii") + b"\n")
            pipe.flush()
        except OSError:
            raise self._death() from None

    def _next_event(self, timeout_s: float | None) -> Event | None:
        """Return the next reply, or None when `timeout_s` passed without one; raises ``G4Error`` when it died."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)  # whoever asks next learns it too
            raise self._death()
        if event["event"] == "garbage":
            raise G4Error(
                f"{native.find_runner()} wrote `{event['text'][:80]}` where a reply belongs.",
                hint="Is G4_RUNNER another program? Unset it to use the installed runner.",
            )
        return event

    def _death(self) -> G4Error:
        try:
            code = self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it closed its output and lives on, where no reply can come from it
            self._process.kill()
            self._process.wait()
            return G4Error(
                "The runner closed its output without ending, and has been stopped.",
                hint="Is G4_RUNNER another program? Unset it to use the installed runner.",
            )
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)
        last_words = f": {self._stderr_tail[-1]}" if self._stderr_tail else "."
        if code >= 0:
            return G4Error(f"The runner ended with exit status {code}{last_words}")
        name = signal.Signals(-code).name
        hint = "G4_RUNNER_LOG=1 shows what ExecuTorch was doing."
        if name == "SIGKILL":
            hint = "The system probably ran out of memory; export with a shorter context (--ctx) or quantize further."
        return G4Error(f"The runner was killed by {name}{last_words}", hint=hint)

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "garbage", "text": line.decode("utf-8", errors="replace").strip()}
            self._events.put(event)
            if isinstance(event, dict) and event.get("event") in ("done", "error"):
                self._last_ended = event.get("id")
        self._events.put(None)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if text := line.decode("utf-8", errors="replace").strip():
                self._stderr_tail.append(text)


class _Fifo:
    """A named pipe that another process writes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        # Open for writing too: then reading never sees the end of the file, and opening does not wait for a writer.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read(self, size: int, ended: threading.Event) -> bytes | None:
        """Return the next `size` bytes, or None when the writer has `ended` and left no more."""
        data = b""
        while len(data) < size:
            last_look = ended.is_set()
            if select.select([self._descriptor], [], [], 0 if last_look else _CANCEL_POLL_S)[0]:
                data += os.read(self._descriptor, size - len(data))
            elif last_look:
                return None
        return data

    def __enter__(self) -> _Fifo:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def _generate_line(request_id: int, request: GenerationRequest) -> str:
    sampling = request.sampling
    arguments = {
        "id": request_id,
        "session": _checked(request.session),
        "tokens": ",".join(map(str, request.tokens)),
        "stop": ",".join(map(str, sorted(request.stop_ids))),
        "temperature": float(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
        "seed": sampling.seed,
    }
    if request.max_new_tokens is not None:
        arguments["max_new_tokens"] = request.max_new_tokens
    if request.chunk is not None:
        arguments["chunk"] = request.chunk
    return "generate " + " ".join(f"{name}={value}" for name, value in arguments.items())


def _checked(session: str) -> str:
    if not _SESSION_NAME.fullmatch(session):
        raise G4Error(f"`{session}` is not a session name: 1 to 64 of A-Z a-z 0-9 - _ .")
    return session
