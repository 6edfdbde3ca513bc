"""A CUDA program by its signature: from the cache, or compiled, one process per target and method.

    python -m gemma4cli.export.cuda.compile FOLDER      what such a process runs; FOLDER holds its task

The program depends on the signature, the target, this package's code and the compilers' versions, which together are
its name in the cache. A second export, a fine-tune or another checkpoint of the same recipe compiles nothing.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import gemma4cli
from gemma4cli.export.contract import METHODS, Contract
from gemma4cli.export.cuda.model import Signature
from gemma4cli.export.cuda.toolchain import environment_for
from gemma4cli.files import atomic_directory, read_json, write_json
from gemma4cli.kernels.compile import KernelUsage
from gemma4cli.kernels.targets import Target, get_target
from gemma4cli.progress import SILENT, Progress

_PACKAGE = Path(gemma4cli.__file__).parent
# The folders whose code decides what a program is.
_SOURCES = ("export", "kernels", "model")
_COMPILERS = ("torch", "triton", "executorch")
_BYTES_PER_COMPILER = 4 << 30  # measured for 60 layers, see docs/cuda-export.md
_PROGRAM, _RECORD = "model.pte", "program.json"


@dataclass(frozen=True)
class CompiledProgram:
    """A program in the cache.

    Attributes:
        kernels: per method, what each kernel of the library needs of the GPU.
    """

    path: Path
    kernels: dict[str, dict[str, KernelUsage]]


def compiled_program(
    signature: Signature, contract: Contract, target: Target, cache: Path, progress: Progress = SILENT
) -> CompiledProgram:
    """Return the program for a target, compiling it if the cache has none.

    Args: cache: a folder for programs of all signatures; created as needed.
    Raises: G4Error when something needed for compiling is missing.
    """
    identity = program_identity(signature, contract, target)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{target.name}-{name}"
    if not (folder / _RECORD).is_file():
        from gemma4cli.export.cuda.lower import assemble

        cache.mkdir(parents=True, exist_ok=True)
        with progress.phase(f"compile for {target.name}", len(METHODS), "methods") as task:
            libraries = _compile_all(signature, target, cache, task)
        with atomic_directory(folder, force=True) as partial:
            (partial / _PROGRAM).write_bytes(assemble(libraries, contract))
            kernels = {
                method: {kernel: asdict(usage) for kernel, usage in sorted(library.kernels.items())}
                for method, library in libraries.items()
            }
            write_json(partial / _RECORD, {**identity, "kernels": kernels})
    record = read_json(folder / _RECORD)
    kernels = {m: {k: KernelUsage(**u) for k, u in usages.items()} for m, usages in record["kernels"].items()}
    return CompiledProgram(folder / _PROGRAM, kernels)


def program_identity(signature: Signature, contract: Contract, target: Target) -> dict[str, Any]:
    """All that a program depends on, as JSON."""
    return {
        "signature": signature.to_json(),
        "contract": contract.to_json(),
        "target": target.name,
        "compilers": {name: metadata.version(name).partition("+")[0] for name in _COMPILERS},
        "code": _digest_of_sources(),
    }


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (_PACKAGE / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0{len(path.read_bytes())}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_all(signature: Signature, target: Target, cache: Path, task: Any) -> dict[str, Any]:
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


def _compile_apart(signature: Signature, method: str, target: Target, cache: Path) -> Any:
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
