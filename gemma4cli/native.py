"""Where the compiled parts of g4 are: the runner and two libraries.

Imports the standard library only. Order: the environment variable ``G4_RUNNER``, the installed distribution (a wheel or
an editable install), the build folder of a source tree (``build/runner``, see docs/runner-protocol.md).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from gemma4cli.errors import G4Error

RUNNER_NAME = "g4-runner"
KERNEL_LIBRARY_NAME = "libg4_kernels.so"
CODES_LIBRARY_NAME = "libg4_codes.so"
_SOURCE_TREE = Path(__file__).resolve().parent.parent


def find_runner() -> Path:
    """Return the path of the runner; raises ``G4Error`` when there is none."""
    named = os.environ.get("G4_RUNNER")
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise G4Error(
                f"G4_RUNNER names {named}, which is not an executable file.",
                hint="Unset G4_RUNNER to use the installed runner.",
            )
        return Path(named)
    for candidate in (_installed_runner(), _SOURCE_TREE / "build" / "runner" / "bin" / RUNNER_NAME):
        if candidate is not None and os.access(candidate, os.X_OK):
            return candidate
    raise G4Error(
        f"{RUNNER_NAME}, the compiled part of g4, is not installed.",
        hint="Install g4 again with a C++ compiler present: pip install --force-reinstall --no-deps gemma4cli",
    )


def _installed_runner() -> Path | None:
    try:
        files = importlib.metadata.distribution("gemma4cli").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.parts[-3:] == ("gemma4cli", "bin", RUNNER_NAME):  # not the command of the same name
            return Path(str(file.locate()))
    return None


def find_kernel_library() -> Path:
    """Return the path of the operators' library, which lies beside the runner (``bin/`` and ``lib/``)."""
    return _find_library(KERNEL_LIBRARY_NAME)


def _find_library(name: str) -> Path:
    runner = find_runner()
    library = runner.resolve().parent.parent / "lib" / name
    if not library.is_file():
        raise G4Error(
            f"{library} does not exist, but the runner {runner} does.",
            hint="The installation is incomplete: pip install --force-reinstall --no-deps gemma4cli",
        )
    return library


@cache
def load_kernels() -> ctypes.CDLL:
    """Register our operators with ExecuTorch's Python runtime; call it before a program that uses them is loaded."""
    import executorch.extension.pybindings.portable_lib  # noqa: F401  (loads libexecutorch.so, which holds the registry)

    library = ctypes.CDLL(str(find_kernel_library()), mode=ctypes.RTLD_GLOBAL)
    if not library.g4_kernels_registered():
        raise G4Error("ExecuTorch refused to register g4's operators.", hint="Are two versions of g4 mixed?")
    return library


@cache
def load_codes() -> ctypes.CDLL:
    """Return the functions that take GGUF's blocks apart (``runner/codes/codes.cpp``)."""
    return ctypes.CDLL(str(_find_library(CODES_LIBRARY_NAME)))


def runner_environment() -> dict[str, str]:
    """Return this process's environment, with ExecuTorch's libraries on the loader's path.

    The runner finds them by itself when it is installed beside them; not when the two live in different
    site-packages folders.
    """
    environment = dict(os.environ)
    spec = importlib.util.find_spec("executorch")
    if spec is not None and spec.submodule_search_locations:
        places = [str(Path(spec.submodule_search_locations[0]) / "lib"), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(place for place in places if place)
    return environment


def main() -> None:
    """Become the runner: the ``g4-runner`` command."""
    try:
        runner = find_runner()
    except G4Error as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    os.execve(runner, [RUNNER_NAME, *sys.argv[1:]], runner_environment())
