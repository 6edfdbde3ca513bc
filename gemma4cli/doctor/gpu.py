"""The NVIDIA driver, the GPU behind it, and how a container would get at it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gemma4cli.doctor.check import Check, Purpose, ok
from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.inspection.gpus import Gpu, describe, this_gpu
from gemma4cli.kernels.targets import target_for_capability

OLDEST_CUDA = (13, 0)
"""PyTorch's and ExecuTorch's CUDA wheels are built with CUDA 13.0, and need a driver that knows it."""

_DRIVER = "libcuda.so.1"
_CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
_CDI_KIND = re.compile(r"^\W*kind\W+nvidia\.com/gpu\b", re.MULTILINE)
_CONTAINER_MARKS = (Path("/run/.containerenv"), Path("/.dockerenv"))
_MODULE_VERSION = Path("/sys/module/nvidia/version")


def check_driver(purpose: Purpose) -> Check:
    """Is the driver's library there, and does it know the CUDA that programs are made for?"""
    name, needed = "driver", purpose.runs_on_gpu
    try:
        library = ctypes.CDLL(_DRIVER)
    except OSError:
        do = "Install NVIDIA's driver, 580 or later; in a container, pass the GPU in (docs/container.md)."
        return Check(name, "missing", f"no {_DRIVER}", needed, do if needed else f"Only to run on a GPU. {do}")
    version = ctypes.c_int()
    code = library.cuDriverGetVersion(ctypes.byref(version))
    if code:
        return Check(name, "missing", f"cuDriverGetVersion failed: error {code}", needed, "See what nvidia-smi says.")
    cuda = (version.value // 1000, version.value % 1000 // 10)
    found = f"CUDA {cuda[0]}.{cuda[1]}{_module_version()}"
    if cuda < OLDEST_CUDA:
        return Check(name, "missing", found, needed, "Update NVIDIA's driver to 580 or later, which has CUDA 13.0.")
    return ok(name, found, needed=needed)


def _module_version() -> str:
    return f", driver {_MODULE_VERSION.read_text().strip()}" if _MODULE_VERSION.is_file() else ""


def check_gpu(purpose: Purpose) -> tuple[Check, Gpu | None]:
    """Compare the first GPU's architecture with those that the bundle was compiled for."""
    name, needed = "gpu", purpose.runs_on_gpu
    try:
        gpu = this_gpu()
    except G4Error as error:
        do = "Only to run on a GPU; exporting needs none."
        return Check(name, "missing", error.message, needed, error.hint if needed else do), None
    try:
        target = target_for_capability(gpu.capability).name
    except G4Error as error:
        return Check(name, "missing", f"{describe(gpu)}; {error.message}", needed, error.hint), gpu
    if purpose.bundle is not None and needed and target not in purpose.bundle.manifest.targets:
        compiled = ", ".join(purpose.bundle.manifest.targets)
        found = f"{describe(gpu)}; the bundle is for {compiled}"
        return Check(name, "missing", found, needed, f"g4 export --target {target}"), gpu
    return ok(name, describe(gpu), needed=needed), gpu


def check_gpu_memory(purpose: Purpose, gpu: Gpu | None) -> Check:
    """Compare the GPU's free memory with what the bundle takes there, the CUDA context included."""
    name, needed = "gpu memory", purpose.runs_on_gpu
    if gpu is None:
        return Check(name, "missing", "no GPU", needed, "See gpu.")
    free = _free_gpu_bytes()
    found = f"{format_bytes(gpu.memory_bytes)} in all" if free is None else f"{format_bytes(free)} free"
    if not needed:
        return ok(name, found)
    takes = purpose.memory_bytes + gpu.context_bytes
    if takes > (gpu.memory_bytes if free is None else free):
        do = f"The bundle takes {format_bytes(takes)}. Stop what else uses the GPU, or export with a smaller --ctx."
        return Check(name, "missing", found, needed, do)
    return ok(name, found, needed=needed)


def _free_gpu_bytes() -> int | None:
    """Ask nvidia-smi, because the driver itself only tells whoever has a CUDA context."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    query = ["nvidia-smi", "-i", first, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(answer.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def check_cdi(
    gpu: Gpu | None, folders: Sequence[Path] = _CDI_FOLDERS, marks: Sequence[Path] = _CONTAINER_MARKS
) -> Check:
    """Look for a CDI specification, by which podman and docker pass a GPU into a container."""
    name = "cdi"
    if os.environ.get("container") or any(mark.exists() for mark in marks):  # noqa: SIM112 (podman's own spelling)
        return ok(name, "this is a container; its host passes the GPU in")
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    found = [str(path) for path in files if path.suffix in (".json", ".yaml", ".yml") and _is_nvidia(path)]
    if found:
        return ok(name, ", ".join(found))
    do = "Only for containers: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    return Check(
        name, "missing", "no specification for nvidia.com/gpu", do=do if gpu else f"{do}, on a host with a GPU"
    )


def _is_nvidia(path: Path) -> bool:
    try:
        return bool(_CDI_KIND.search(path.read_text(errors="replace")))
    except OSError:
        return False
