"""Memory, disk and shared memory, as this process may use them: a container's limits count, not the host's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gemma4cli.doctor.check import Check, Purpose, ok
from gemma4cli.files import format_bytes
from gemma4cli.hub.machine import free_bytes

_SMALL_SHM_BYTES = 64 << 20  # what docker and podman give by default
_LITTLE_DISK_BYTES = 25 << 30
_CGROUPS = Path("/sys/fs/cgroup")


def check_memory(purpose: Purpose, cgroups: Path = _CGROUPS) -> Check:
    """Compare what is available with what a bundle for the CPU takes."""
    import psutil

    available, limit = psutil.virtual_memory().available, memory_limit(cgroups)
    found = f"{format_bytes(available)} available"
    if limit is not None and limit < available:
        available, found = limit, f"{format_bytes(limit)}, the limit of this container"
    needed = 0 if purpose.runs_on_gpu else purpose.memory_bytes
    if needed > available:
        do = f"The bundle takes {format_bytes(needed)}. Close something, or export with a smaller --ctx."
        return Check("memory", "missing", found, needed=True, do=do)
    return ok("memory", found, needed=needed > 0)


def memory_limit(cgroups: Path = _CGROUPS) -> int | None:
    """Return the memory limit, bytes, of the control group that a container starts in; None when there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroups / name).read_text().strip()
        except OSError:
            continue
        # The first version writes "no limit" as the largest number of pages that fits into 63 bits.
        return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None


def check_disk(workspace: Path) -> Check:
    """Is there room in the workspace, and may we write there?"""
    free = free_bytes(workspace)
    found = f"{format_bytes(free)} free for {workspace}"
    if not _is_writable(workspace):
        return Check("disk", "warning", f"{workspace} is read-only", do="To write, point G4_HOME at another folder.")
    if free < _LITTLE_DISK_BYTES:
        do = f"The 31B takes {format_bytes(_LITTLE_DISK_BYTES)}; point G4_HOME at another disk for it."
        return Check("disk", "warning", found, do=do)
    return ok("disk", found)


def _is_writable(path: Path) -> bool:
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Look at /dev/shm, which containers make small; torch and NCCL put what processes share there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            status = os.statvfs(folder)
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return Check("shared memory", "warning", found, do="Start the container with --shm-size 1g.")
    size = status.f_frsize * status.f_blocks
    if size <= _SMALL_SHM_BYTES:
        do = "Enough for g4 itself; for several processes start the container with --shm-size 1g."
        return Check("shared memory", "warning", f"{format_bytes(size)} in {folder}", do=do)
    return ok("shared memory", f"{format_bytes(size)} in {folder}")
