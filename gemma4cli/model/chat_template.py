"""Rendering a chat template that nobody has vetted.

A chat template is a program that arrives with the weights. It runs in Jinja's sandbox (no private attributes, nothing
mutable), inside a forked child with limits on memory, CPU and wall time, so that an endless loop or a memory bomb costs
one sentence. The environment (block trimming, loop controls, `tojson`, `raise_exception`, `strftime_now`) is the one
that transformers gives templates, because that is what they are written for.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gemma4cli.errors import G4Error

_MEMORY_BYTES = 256 << 20
_CPU_S = 4
_WALL_S = 8.0
_HINT = "Get the template again from the model's repository, or run with --raw, which uses none."


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use beyond what the process already has."""

    memory_bytes: int = _MEMORY_BYTES
    cpu_s: int = _CPU_S
    wall_s: float = _WALL_S


def render(template: str, variables: Mapping[str, Any], limits: TemplateLimits = TemplateLimits()) -> str:
    """Render a template in a limited child process.

    Raises: G4Error when the template is malformed, refuses the conversation, or does not stay within the limits.
    """
    # Imported here, before the fork, so that the child does not pay for it on every turn.
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401

    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(template, variables, limits, write_end)
    os.close(write_end)
    try:
        answer = _read_all(read_end, time.monotonic() + limits.wall_s)
        if answer is None:
            raise G4Error(f"The chat template did not finish within {limits.wall_s:g} s.", hint=_HINT)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return _judge(answer, status, limits)


def _judge(answer: bytes, status: int, limits: TemplateLimits) -> str:
    try:
        kind, text = json.loads(answer)
    except ValueError:
        # The child died without a word. The CPU limit arrives as SIGXCPU; anything else is a stack or memory blow-up.
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            raise G4Error(
                f"The chat template did not finish within {limits.cpu_s} s of CPU time.", hint=_HINT
            ) from None
        raise G4Error("The chat template crashed its renderer.", hint=_HINT) from None
    if kind == "text":
        return text
    if kind == "refused":
        raise G4Error(f"The chat template refuses this conversation: {text}", hint="Change the messages or use --raw.")
    raise G4Error(f"The chat template {text}.", hint=_HINT)


def _read_all(descriptor: int, deadline: float) -> bytes | None:
    """Read to the end of the pipe; None when the deadline passes first."""
    chunks = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _child(template: str, variables: Mapping[str, Any], limits: TemplateLimits, write_end: int) -> None:
    """Render and leave without running anything of the parent's: no handlers, no exit hooks, no buffered output."""
    try:
        _limit_self(limits)
        answer = json.dumps(_render_here(template, variables)).encode()
        while answer:
            answer = answer[os.write(write_end, answer) :]
    except MemoryError:
        os.write(
            write_end, json.dumps(["failed", f"needs more than {limits.memory_bytes >> 20} MiB of memory"]).encode()
        )
    finally:
        os._exit(0)


def _limit_self(limits: TemplateLimits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it kills the child
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    with open("/proc/self/statm", encoding="ascii") as file:
        address_space = int(file.read().split()[0]) * resource.getpagesize()
    for what, amount in (
        (resource.RLIMIT_AS, address_space + limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (amount, hard))


class _Refusal(Exception):
    """Raised by the template itself through raise_exception()."""


def _render_here(template: str, variables: Mapping[str, Any]) -> tuple[str, str]:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return "text", environment.from_string(template).render(**variables)
    except _Refusal as refusal:
        return "refused", str(refusal)
    except jinja2.exceptions.SecurityError as error:
        return "failed", f"tries what the sandbox forbids: {_sentence(error)}"
    except jinja2.TemplateSyntaxError as error:
        return "failed", f"is malformed in line {error.lineno}: {_sentence(error)}"
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign program raises is that program's failure
        return "failed", f"failed with {type(error).__name__}: {_sentence(error)}"


def _sentence(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escaping, as templates that describe tools expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
