"""What this machine's memory delivers, measured now, with as many threads as the engine has.

The buffers are as large as what a decoded token reads: a small model lives in the CPU's caches, and so must its bound.
Measured in a process of its own, because the buffers would count in this one's peak memory and its threads are set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma4cli.errors import G4Error

if TYPE_CHECKING:
    import torch

_LARGEST_BUFFER = {"cpu": 1 << 30, "cuda": 4 << 30}
_SMALLEST_BUFFER = 1 << 20
_SECONDS = 0.3


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: `copy` counts those read and those written, `read` those of a sum over the whole buffer."""

    device: str
    threads: int | None
    buffer_bytes: int
    copy: float
    read: float

    @property
    def best(self) -> float:
        return max(self.copy, self.read)


def measure_bandwidth(bytes_per_token: float, device: str, threads: int) -> Bandwidth:
    """Time copies and sums over as many bytes as a token reads, at least 1 MiB and at most 1 GiB (4 GiB on a GPU).

    Raises: G4Error with the last words of the measuring process when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(int(bytes_per_token)), device, str(threads)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise G4Error(f"The memory bandwidth cannot be measured: {words[-1] if words else done.returncode}.")
    return Bandwidth(**json.loads(done.stdout))


def _measure(wanted_bytes: int, device: str, threads: int) -> Bandwidth:
    import torch

    from gemma4cli.engine.eager import available_bytes

    where = torch.device(device)
    size = min(max(wanted_bytes, _SMALLEST_BUFFER), _LARGEST_BUFFER[where.type], available_bytes(where) // 4)
    if where.type == "cpu":
        torch.set_num_threads(threads)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=where)
    half = buffer.numel() // 2
    first, second = buffer[:half], buffer[half : 2 * half]
    copy = _best_rate(lambda: second.copy_(first), 8 * half, where)
    read = _best_rate(buffer.sum, buffer.nbytes, where)
    return Bandwidth(device, threads if where.type == "cpu" else None, buffer.nbytes, copy, read)


def _best_rate(action: Callable[[], Any], nbytes: int, device: torch.device) -> float:
    """Bytes per second of the fastest of many calls; the first is not counted."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    action()
    wait()
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        action()
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return nbytes / fastest


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
