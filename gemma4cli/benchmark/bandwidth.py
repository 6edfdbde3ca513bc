"""What this machine's memory delivers, measured now, with as many threads as the engine has.

The buffers are as large as what a decoded token reads: a small model lives in the CPU's caches, and so must its bound.
Measured in a process of its own, because the buffers would count in the peak memory of this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma4cli.errors import G4Error

if TYPE_CHECKING:
    import numpy as np

_SMALLEST_BUFFER = 1 << 20
_LARGEST_BUFFER = 1 << 30
_LARGEST_GPU_BUFFER = 4 << 30
_WINDOW_S = 0.005
_TOTAL_S = 0.4
_GPU_RUNS, _GPU_CALLS = 5, 20


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: `copy` counts those read and those written, `read` those of a pass over the whole buffer."""

    device: str
    threads: int | None
    buffer_bytes: int
    copy: float
    read: float

    @property
    def best(self) -> float:
        return max(self.copy, self.read)


def measure_bandwidth(bytes_per_token: float, device: str, threads: int) -> Bandwidth:
    """Time copies and passes over as many bytes as a token reads, at least 1 MiB and at most 1 GiB (4 GiB on a GPU).

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
    size = max(wanted_bytes, _SMALLEST_BUFFER)
    if device == "cpu":
        return _measure_cpu(size, threads)
    return _measure_gpu(size, device)


def _measure_cpu(size: int, threads: int) -> Bandwidth:
    """Every thread streams through a part of its own without waiting for the others, as parts of a matrix are read."""
    import numpy as np
    import psutil

    size = min(size, _LARGEST_BUFFER, psutil.virtual_memory().available // 4)
    count = size // threads // 8 * 2
    parts = [np.ones(count, dtype=np.int32) for _ in range(threads)]

    def copy(part: np.ndarray) -> Callable[[], Any]:
        half = len(part) // 2
        return lambda: np.copyto(part[:half], part[half:])

    def read(part: np.ndarray) -> Callable[[], Any]:
        return part.max

    nbytes = 4 * count
    return Bandwidth(
        "cpu",
        threads,
        nbytes * threads,
        copy=_threads_rate([copy(part) for part in parts], nbytes),
        read=_threads_rate([read(part) for part in parts], nbytes),
    )


def _threads_rate(actions: Sequence[Callable[[], Any]], nbytes: int) -> float:
    """Bytes per second of all threads together, each repeating its action.

    The best of many short windows of time: a bound must not depend on what else this machine is doing.
    """
    rates: list[float] = []

    def work(action: Callable[[], Any], start: threading.Barrier) -> float:
        action()
        start.wait()
        began, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _WINDOW_S:
            action()
            done += nbytes
        return done / elapsed

    with ThreadPoolExecutor(len(actions)) as pool:
        began = time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - began < _TOTAL_S:
            start = threading.Barrier(len(actions))
            rates.append(sum(pool.map(work, actions, [start] * len(actions))))
    return max(rates)


def _measure_gpu(size: int, device: str) -> Bandwidth:
    import torch

    where = torch.device(device)
    size = min(size, _LARGEST_GPU_BUFFER, torch.cuda.mem_get_info(where)[0] // 4)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=where)
    half = buffer.numel() // 2
    first, second = buffer[:half], buffer[half : 2 * half]
    copy = _events_rate(lambda: second.copy_(first), 8 * half)
    read = _events_rate(buffer.sum, buffer.nbytes)
    return Bandwidth(device, None, buffer.nbytes, copy, read)


def _events_rate(action: Callable[[], Any], nbytes: int) -> float:
    """Bytes per second of the fastest of some runs of calls, timed on the GPU."""
    import torch

    action()
    fastest = float("inf")
    for _ in range(_GPU_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_GPU_CALLS):
            action()
        end.record()
        end.synchronize()
        fastest = min(fastest, start.elapsed_time(end) / 1000 / _GPU_CALLS)
    return nbytes / fastest


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
