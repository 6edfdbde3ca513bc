"""What this machine has: free disk, memory, GPUs; and whether a model fits."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.files import format_bytes

# Beside the weights: KV cache of a short context, activations, the runtime.
_HEADROOM_BYTES = 2 << 30


@dataclass(frozen=True)
class Machine:
    """Bytes. `gpu_bytes` is the largest GPU's memory, None without one."""

    disk_free_bytes: int
    memory_bytes: int
    gpu_name: str | None
    gpu_bytes: int | None

    @classmethod
    def probe(cls, cache: Path) -> Machine:
        name, memory = _largest_gpu()
        return cls(free_bytes(cache), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), name, memory)

    def disk_verdict(self, download_bytes: int) -> str:
        """Say whether a download fits on the disk."""
        short = download_bytes - self.disk_free_bytes
        return "fits" if short <= 0 else f"{format_bytes(short)} too small"

    def runs(self, run_bytes: int) -> str:
        """Say where a model of this many bytes of weights can run."""
        needed = run_bytes + _HEADROOM_BYTES
        places = [
            place
            for place, size in (("GPU", self.gpu_bytes), ("CPU", self.memory_bytes))
            if size is not None and size >= needed
        ]
        return " and ".join(places) if places else f"needs {format_bytes(needed)}"


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds, or will hold, `path`."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _largest_gpu() -> tuple[str | None, int | None]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        gpus = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
        return max(((name.strip(), int(mebibytes) << 20) for name, mebibytes in gpus), key=lambda gpu: gpu[1])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, None
