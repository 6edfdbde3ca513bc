"""The compiled methods of a CUDA program by its signature: from the cache, or made, one process per target and method.

    python -m gemma4cli.export.cuda.compile FOLDER      what such a process runs; FOLDER holds its task

They depend on the signature, the target, this package's code and the compilers' versions, which together are their name
in the cache. The versions are pinned: libraries from the cache serve where others are installed. A second export, a
fine-tune or another checkpoint of the same recipe compiles nothing; nor does anybody who is given the folder, beside
this package's data or by the environment's G4_PROGRAMS (tools/prebuild_programs.py makes one ahead).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gemma4cli
from gemma4cli.errors import G4Error
from gemma4cli.export.contract import METHODS
from gemma4cli.export.cuda.model import Signature
from gemma4cli.export.cuda.toolchain import COMPILERS, check_toolchain, environment_for
from gemma4cli.files import atomic_directory, read_json, write_json
from gemma4cli.kernels.compile import KernelUsage
from gemma4cli.kernels.targets import Target, get_target
from gemma4cli.progress import SILENT, Progress

_PACKAGE = Path(gemma4cli.__file__).parent
# The code that decides what a program is.
_SOURCES = (
    *("kernels/*/*.py", "model/*.py", "export/contract.py", "export/packed.py", "export/trace.py"),
    *(f"kernels/{name}.py" for name in ("__init__", "compile", "dependent_launch", "gluon", "targets")),
    *(f"export/cuda/{name}.py" for name in ("fake_gpu", "gluon", "launch", "layers", "lower", "model", "toolchain")),
)
_SHIPPED = _PACKAGE / "data" / "programs"
_BYTES_PER_COMPILER = 2 << 30  # 60 layers took 1.1 GB, see docs/cuda-export.md
_RECORD = "libraries.json"


@dataclass(frozen=True)
class Library:
    """One method, compiled.

    Attributes:
        code: an ELF shared library that implements AOTInductor's C interface.
        constants: the names of the tensors it wants, as in the weights file.
        kernels: what each of its kernels needs of the GPU.
    """

    code: bytes
    constants: tuple[str, ...]
    kernels: dict[str, KernelUsage]


def compiled_libraries(
    signature: Signature, target: Target, cache: Path, progress: Progress = SILENT
) -> dict[str, Library]:
    """Return the libraries of both methods for a target, compiling what is neither in the cache nor came ready.

    Args: cache: a folder for programs of all signatures; created as needed.
    Raises: G4Error when something needed for compiling is missing, or G4_PROGRAMS names no folder.
    """
    cache = cache.absolute()  # compilers run in other folders
    identity = program_identity(signature, target)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    for place in (cache, *_ready_made()):
        folder = place / f"{target.name}-{name}"
        if (folder / _RECORD).is_file():
            if place != cache:
                progress.note(f"The program for {target.name} came ready from {place}.")
            return _read(folder)
    check_toolchain()
    cache.mkdir(parents=True, exist_ok=True)
    with progress.phase(f"compile for {target.name}", len(METHODS), "methods") as task:
        libraries = _compile_all(signature, target, cache, task)
    folder = cache / f"{target.name}-{name}"
    with atomic_directory(folder, force=True) as partial:
        _write(partial, identity, libraries)
    return _read(folder)


def _ready_made() -> list[Path]:
    """Folders of programs that others compiled."""
    given = os.environ.get("G4_PROGRAMS")
    if not given:
        return [_SHIPPED]
    if not Path(given).is_dir():
        raise G4Error(f"G4_PROGRAMS is {given}, which is no folder.", hint="Unset it, or name a folder of programs.")
    return [Path(given), _SHIPPED]


def _write(folder: Path, identity: dict[str, Any], libraries: dict[str, Library]) -> None:
    methods = {}
    for method, library in libraries.items():
        (folder / f"{method}.so").write_bytes(library.code)
        kernels = {name: asdict(usage) for name, usage in sorted(library.kernels.items())}
        methods[method] = {"constants": list(library.constants), "kernels": kernels}
    write_json(folder / _RECORD, {**identity, "methods": methods})


def _read(folder: Path) -> dict[str, Library]:
    record = read_json(folder / _RECORD)
    return {
        method: Library(
            (folder / f"{method}.so").read_bytes(),
            tuple(facts["constants"]),
            {name: KernelUsage(**usage) for name, usage in facts["kernels"].items()},
        )
        for method, facts in record["methods"].items()
    }


def program_identity(signature: Signature, target: Target) -> dict[str, Any]:
    """All that the libraries depend on, as JSON."""
    return {
        "signature": signature.to_json(),
        "target": target.name,
        "compilers": COMPILERS,
        "code": _digest_of_sources(),
    }


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        digest.update(f"{path.relative_to(_PACKAGE)}\0{len(path.read_bytes())}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_all(signature: Signature, target: Target, cache: Path, task: Any) -> dict[str, Library]:
    """Compile the methods side by side where memory allows."""
    from gemma4cli.quant.quantize import available_memory

    at_once = max(1, min(len(METHODS), available_memory() // _BYTES_PER_COMPILER))
    libraries = {}
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {method: pool.submit(_compile_apart, signature, method, target, cache) for method in METHODS}
        for method, job in jobs.items():
            libraries[method] = job.result()
            task.advance(1, method)
    return libraries


def _compile_apart(signature: Signature, method: str, target: Target, cache: Path) -> Library:
    """Compile in a process of its own: the libraries keep a target's facts for the life of a process."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".compile-") as name:
        scratch = Path(name)
        environment = environment_for(scratch)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGE.parent), environment.get("PYTHONPATH"))))
        (scratch / "task").write_bytes(pickle.dumps((signature, method, target.name)))
        command = [sys.executable, "-m", "gemma4cli.export.cuda.compile", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling {method} for {target.name} failed:\n{done.stderr[-6000:]}")
        return pickle.loads((scratch / "library").read_bytes())


def main(arguments: Sequence[str]) -> None:
    """Compile what the task in a folder says and leave the library there."""
    from gemma4cli.export.cuda.lower import compile_method

    folder = Path(arguments[0])
    signature, method, target = pickle.loads((folder / "task").read_bytes())
    (folder / "library").write_bytes(pickle.dumps(compile_method(signature, method, get_target(target))))


if __name__ == "__main__":
    main(sys.argv[1:])
