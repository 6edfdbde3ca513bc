"""How fast `g4::cpu_linear` reads weights (one row of activations) and multiplies (128 rows), per shape and threads.

    python bench/cpu_linear.py --out bench/results/cpu-linear.json

The shapes are the 31B's: the widest layers of a block in the format of Q4_K, the same in 8 bits, and the output head in
the format of Q6_K. Every program is checked against the reference before it is timed. One row is bound by memory: its
rate counts all bytes of the weight, and beside it stands what C's memchr reads in the same process, with as many
threads. Reported are the medians and all samples; a sample that another program shares the machine with is no good.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4cli.benchmark.device import describe_environment
from gemma4cli.kernels.cpu_linear import linear, linear_reference
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat
from gemma4cli.native import load_kernels

Q4_K, Q6_K, INT8 = WeightFormat(4, 32, True), WeightFormat(6, 16, False), WeightFormat(8, 32, False)
# name, rows, columns, format
SHAPES = (
    ("gate", 21504, 5376, Q4_K),
    ("down", 5376, 21504, Q4_K),
    ("gate, 8-bit", 21504, 5376, INT8),
    ("head", 262144, 5376, Q6_K),
)
PREFILL_ROWS = 128
MOST_PREFILL_WEIGHTS = 2**27  # the head sees one row only
CHECKED_ROWS = 64
REPETITIONS = {1: 15, PREFILL_ROWS: 5}
READ_BYTES = 2**29


class Linear(nn.Module):
    def forward(self, x: Tensor, *weight: Tensor) -> Tensor:
        codes, *high, sub, step = weight
        return linear(x, codes, high[0] if high else None, sub, step)


def random_weight(n: int, k: int, weight_format: WeightFormat) -> PackedWeight:
    words = k // (4 if weight_format.bits == 8 else 8)
    levels = (2,) if weight_format.has_min else ()
    codes = torch.randint(-(2**31), 2**31, (n, words), dtype=torch.int32)
    high = torch.randint(-(2**31), 2**31, (n, k // 16), dtype=torch.int32) if weight_format.bits == 6 else None
    sub = torch.randint(-127, 128, (n, k // weight_format.group_size, *levels), dtype=torch.int8)
    step = torch.rand(n, -(-k // 256), *levels).to(torch.float16)
    return PackedWeight(weight_format, (n, k), codes, high, sub, step)


def tensors(weight: PackedWeight) -> tuple[Tensor, ...]:
    parts = (weight.codes, weight.high, weight.sub, weight.step)
    return tuple(part for part in parts if part is not None)


def export(weight: PackedWeight) -> Any:
    """Export one layer whose weight is an input that is not copied; returns the program and its method."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.runtime import Runtime

    inputs = (torch.randn(1, 2, weight.shape[1]), *tensors(weight))
    rows = torch.export.Dim("rows", min=1, max=PREFILL_ROWS)
    exported = torch.export.export(Linear(), inputs, dynamic_shapes=({1: rows}, (None,) * (len(inputs) - 1)))
    edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_skip_dim_order=True))
    config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    program = Runtime.get().load_program(bytes(edge.to_executorch(config).buffer))
    return program, program.load_method("forward")


def check(method: Any, weight: PackedWeight) -> None:
    """Compare the first and the last rows with the reference, for both numbers of rows."""
    for m in REPETITIONS:
        x = torch.randn(1, m, weight.shape[1])
        result = method.execute([x, *tensors(weight)])[0]
        for part in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            high = None if weight.high is None else weight.high[part]
            expected = linear_reference(x, weight.codes[part], high, weight.sub[part], weight.step[part])
            error = (result[..., part] - expected).abs().max() / expected.abs().max()
            if not error < 1e-5:
                raise SystemExit(f"{weight.format} is wrong by {error}; nothing was timed")


def sample_seconds(action: Callable[[], Any], repetitions: int) -> list[float]:
    samples = []
    for _ in range(repetitions):
        began = time.perf_counter()
        action()
        samples.append(time.perf_counter() - began)
    return samples


def measure_reading(threads: int) -> float:
    """Return the bytes per second that `threads` threads read, the median of samples."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    buffer = torch.ones(READ_BYTES, dtype=torch.int8)
    part = READ_BYTES // threads
    places = [buffer.data_ptr() + thread * part for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        samples = sample_seconds(lambda: list(pool.map(lambda place: memchr(place, 2, part), places)), 9)
    return READ_BYTES / statistics.median(samples)


def measure(name: str, weight: PackedWeight, method: Any, m: int, threads: int, reading: float) -> dict[str, Any]:
    x = torch.randn(1, m, weight.shape[1])
    samples = sample_seconds(lambda: method.execute([x, *tensors(weight)]), REPETITIONS[m])
    seconds = statistics.median(samples)
    n, k = weight.shape
    row = {"name": name, "rows": n, "columns": k, "bits": weight.format.bits, "m": m, "threads": threads}
    row |= {"gigabytes_per_second": weight.nbytes / seconds / 1e9, "read_gigabytes_per_second": reading / 1e9}
    row |= {"gigaops_per_second": 2 * m * n * k / seconds / 1e9, "samples_ms": [sample * 1e3 for sample in samples]}
    rate = f"{row['gigaops_per_second']:6.1f} GOP/s"
    if m == 1:
        rate = f"{row['gigabytes_per_second']:6.1f} GB/s of {row['read_gigabytes_per_second']:.1f} GB/s"
    print(f"{name:12} {n:6} x {k:5} M {m:3} threads {threads}: {seconds * 1e3:9.3f} ms {rate}", flush=True)
    return row


def main() -> None:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    load_kernels()
    rows = []
    for name, n, k, weight_format in SHAPES:
        weight = random_weight(n, k, weight_format)
        program, method = export(weight)
        check(method, weight)
        for threads in arguments.threads:
            _unsafe_reset_threadpool(threads)
            reading = measure_reading(threads)
            rows.append(measure(name, weight, method, 1, threads, reading))
            if n * k <= MOST_PREFILL_WEIGHTS:
                rows.append(measure(name, weight, method, PREFILL_ROWS, threads, reading))
        del program, method
    document = {
        "command": "python bench/cpu_linear.py --out bench/results/cpu-linear.json",
        "environment": describe_environment(None),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
