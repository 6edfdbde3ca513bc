"""What is installed: the runner, torch, ExecuTorch's CUDA delegate, and what compiling for a GPU takes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from gemma4cli import native
from gemma4cli.doctor.check import Check, Purpose, ok
from gemma4cli.errors import G4Error
from gemma4cli.export.cuda import toolchain

_DELEGATE = "libexecutorch_backend_cuda.so"
_DELEGATE_HINT = (
    "It is in ExecuTorch's cu130 wheel, on PyTorch's own package index; or run bundles with --engine torch, "
    "which takes a CUDA build of torch."
)
_ONLY_TO_COMPILE = "Only to export for a GPU. "


def check_runner() -> Check:
    """Start the runner, which shows that ExecuTorch's libraries are found, too."""
    name = "runner"
    try:
        runner = native.find_runner()
    except G4Error as error:
        return Check(name, "missing", error.message, needed=True, do=error.hint)
    try:
        done = subprocess.run(
            [runner, "--version"], env=native.runner_environment(), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, "missing", f"{runner} does not start: {error}", needed=True, do="Install g4 again.")
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        do = "Install g4 again, with executorch==1.5.1 beside it."
        return Check(name, "missing", f"{runner} does not start: {said}", needed=True, do=do)
    return ok(name, done.stdout.strip(), needed=True)


def check_torch(purpose: Purpose) -> Check:
    """Which torch is installed: exporting needs one, running a bundle does not."""
    name, needed = "torch", purpose.exports
    version = _version("torch")
    if version is None:
        do = "Running bundles needs none. To export, install g4 with its requirements: pip install gemma4cli"
        return Check(name, "missing", "not installed", needed, do)
    return ok(name, f"{version}{', with CUDA' if _torch_has_cuda() else ', for the CPU only'}", needed=needed)


def check_delegate(purpose: Purpose) -> Check:
    """Look for what executes a GPU program in the runner; torch can do so instead."""
    name, needed = "cuda delegate", purpose.runs_on_gpu
    folder = _package_folder("executorch")
    if folder is not None and (folder / "lib" / _DELEGATE).is_file():
        return ok(name, str(folder / "lib" / _DELEGATE), needed=needed)
    found = "executorch is not installed" if folder is None else f"executorch has no {_DELEGATE}"
    if needed and _torch_has_cuda():
        return Check(name, "warning", found, needed, "Run the bundle with --engine torch.")
    return Check(
        name, "missing", found, needed, _DELEGATE_HINT if needed else f"Only to run on a GPU. {_DELEGATE_HINT}"
    )


def check_compilers(purpose: Purpose) -> Check:
    """Compare torch, Triton and ExecuTorch with the versions that g4 compiles with."""
    name, needed = "compiler versions", purpose.compiles_for_gpu
    try:
        toolchain.check_versions()
    except G4Error as error:
        return Check(name, "missing", error.message, needed, error.hint)
    return ok(name, ", ".join(f"{package} {_version(package)}" for package in toolchain.COMPILERS), needed=needed)


def check_compiler(purpose: Purpose) -> Check:
    """Look for the C++ compiler and the binary tools."""
    name, needed = "c++ compiler", purpose.compiles_for_gpu
    absent = [tool for tool in toolchain.TOOLS if shutil.which(tool) is None]
    if absent:
        packages = " ".join(sorted({toolchain.TOOLS[tool] for tool in absent}))
        do = f"apt install {packages}"
        return Check(name, "missing", f"no {', '.join(absent)}", needed, do if needed else _ONLY_TO_COMPILE + do)
    said = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout
    return ok(name, said.partition("\n")[0] or "g++", needed=needed)


def check_headers(purpose: Purpose) -> Check:
    """Look for CUDA's headers where an export will."""
    name, needed = "cuda headers", purpose.compiles_for_gpu
    try:
        return ok(name, str(toolchain.find_cuda_home()), needed=needed)
    except G4Error as error:
        do = error.hint if needed else f"{_ONLY_TO_COMPILE}{error.hint}"
        return Check(name, "missing", error.message, needed, do)


def check_driver_stub(purpose: Purpose) -> Check:
    """Make the library that stands in for the driver's at linking, as every export does."""
    name, needed = "libcuda stub", purpose.compiles_for_gpu
    try:
        with tempfile.TemporaryDirectory(prefix="g4-") as folder:
            toolchain.make_driver_stub(Path(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        do = "g++ makes it; see c++ compiler, and that TMPDIR can be written to."
        return Check(name, "missing", f"cannot be made: {error}", needed, do if needed else _ONLY_TO_COMPILE + do)
    return ok(name, "made by g++ at each export", needed=needed)


def _torch_has_cuda() -> bool:
    folder = _package_folder("torch")
    return folder is not None and (folder / "lib" / "libtorch_cuda.so").is_file()


def _package_folder(name: str) -> Path | None:
    """Find a package without importing it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) if places else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
