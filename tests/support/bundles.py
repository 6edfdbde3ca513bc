"""Real exports for tests: made once by `g4 export` in a process of its own, then kept in `build/tests`.

The folder's name carries a hash of every source file that shapes an export, so a change makes new ones. Several test
workers may ask at once: one exports, the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import gemma4cli
from gemma4cli.model.config import FULL, SLIDING
from tests.support import tiny

PACKAGE = Path(gemma4cli.__file__).parent
DEMO_MODEL = PACKAGE / "data" / "demo"
TINY_CONTEXT, TINY_CHUNK = 96, 12
TINY: dict[str, Any] = {"layer_types": [SLIDING, FULL], "num_hidden_layers": 2}
"""Overrides of the tiny model's config: one layer of each kind keeps an export within seconds."""

_BUILD = PACKAGE.parent / "build" / "tests"
_PEAK = "peak KiB "
_MEASURE = f"""import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print("{_PEAK}", usage.ru_maxrss, sep="", file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))"""
# A process starts with the memory peak of the one that started it, so a small one stands between it and the tests.


@dataclass(frozen=True)
class Run:
    """One `g4` process: what it said, how long it took, and its peak memory."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int


def run_g4(*arguments: str | Path, home: Path) -> Run:
    """Run a command line in a process of its own, with `home` as its workspace."""
    environment = {**os.environ, "G4_HOME": str(home), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "gemma4cli", *map(str, arguments)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([sys.executable, "-S", "-c", _MEASURE, *command], env=environment,
                                   stdout=stdout, stderr=stderr)  # fmt: skip
        code = process.wait()
        seconds = time.monotonic() - started
        stdout.seek(0)
        stderr.seek(0)
        errors, _, peak_kib = stderr.read().rpartition(_PEAK)
        return Run(code, stdout.read(), errors, seconds, int(peak_kib) * 1024)


@cache
def demo_bundle() -> Path:
    """Export the demo model with the default recipe and a context of 1,024 tokens, quantizing it on the way."""
    return made("demo", lambda home: run_g4("export", DEMO_MODEL, "--ctx", "1k", "--json", home=home))


def demo_checkpoint() -> Path:
    """The quantized checkpoint that `demo_bundle` was made from."""
    return demo_bundle().parents[1] / "checkpoints" / "demo-default"


@cache
def tiny_checkpoint() -> Path:
    """A plain random checkpoint of two layers."""
    return tiny.write_checkpoint(home_of("tiny-model") / "models" / "tiny", **TINY)


@cache
def tiny_bundle(recipe: str) -> Path:
    """Export `tiny_checkpoint` by a recipe ("none" keeps float32) with TINY_CONTEXT and TINY_CHUNK."""
    return made(f"tiny-{recipe}", lambda home: run_g4(*tiny_export(recipe), home=home))


def tiny_export(recipe: str) -> list[str | Path]:
    """The arguments of the export that `tiny_bundle` makes."""
    return ["export", tiny_checkpoint(), "--recipe", recipe, "--ctx", str(TINY_CONTEXT), "--chunk", str(TINY_CHUNK),
            "--json"]  # fmt: skip


def run_of(bundle: Path) -> Run:
    """Return how the export went that made a bundle."""
    return Run(**json.loads((bundle.parents[1] / "run.json").read_text()))


def made(name: str, export: Callable[[Path], Run]) -> Path:
    home = home_of(name)
    with open(home.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "run.json").exists():
            run = export(home)
            assert run.code == 0, run.stderr
            (home / "run.json").write_text(json.dumps(asdict(run)))
        return Path(json.loads(Run(**json.loads((home / "run.json").read_text())).stdout)["bundle"])


def home_of(name: str) -> Path:
    home = _BUILD / f"exports-{_fingerprint()}" / name
    home.mkdir(parents=True, exist_ok=True)
    return home


@cache
def _fingerprint() -> str:
    digest = hashlib.sha256()
    kernels = sorted(path for path in (PACKAGE / "kernels").iterdir() if path.is_dir())
    rooms = ("export", "export/cuda", "quant", "model", "kernels", *(f"kernels/{path.name}" for path in kernels))
    sources = [path for room in rooms for path in sorted((PACKAGE / room).glob("*.py"))]
    sources += [
        DEMO_MODEL / "model.safetensors",
        *sorted((PACKAGE / "quant" / "recipes").iterdir()),
        Path(tiny.__file__),
    ]
    for path in [*sources, Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    for package in ("torch", "torchao", "executorch"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()[:16]
