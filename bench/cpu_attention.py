"""What `g4::cpu_attention` saves on the CPU: ms per step against matmul + softmax, in caches of 4k and 32k slots.

    python bench/cpu_attention.py --out bench/results/cpu-attention.json

One KV head of a full attention layer of the 31B: 8 query heads share one KV head of 512. A step writes the new keys and
values and attends, in a program exported for ExecuTorch's Python runtime, with the cache as mutable state. "plain" is
the same formula as matmul + softmax, by ExecuTorch's CPU kernels and by XNNPACK. Every program is checked against the
reference before it is timed. Reported are the median, the best and all samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4cli.kernels.cpu_attention import attention, attention_reference
from gemma4cli.native import load_kernels

HEADS, KV_HEADS, HEAD_DIM = 8, 1, 512
ALLOCATED = (4096, 32768)
REPETITIONS = 15
TOLERANCE = 1e-4


def plain_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Matmul and softmax over the whole flat cache, with a mask; the query heads of a KV head in one matmul."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [1, H_kv, G * T, D]
    bias = torch.where(torch.arange(k.shape[2])[None, :] <= input_pos[:, None], 0.0, float("-inf"))
    scores = grouped @ k.transpose(2, 3) + bias.repeat(q.shape[1] // k.shape[1], 1)
    return (torch.softmax(scores, -1) @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2).transpose(1, 2)


class Step(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], slots: int) -> None:
        super().__init__()
        self.attend = attend
        self.register_buffer("k", torch.zeros(1, KV_HEADS, slots, HEAD_DIM))
        self.register_buffer("v", torch.zeros(1, KV_HEADS, slots, HEAD_DIM))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        self.k.index_copy_(2, input_pos, k)
        self.v.index_copy_(2, input_pos, v)
        return self.attend(q, self.k, self.v, input_pos, 0)


def new_inputs(start: int, queries: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(start)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(1, n, queries, HEAD_DIM, generator=generator) for n in heads)
    return q / HEAD_DIM**0.5, k, v, torch.arange(start, start + queries)


def export(attend: Callable[..., Tensor], slots: int, queries: int, *, xnnpack: bool) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    exported = torch.export.export(Step(attend, slots), new_inputs(0, queries))
    lowered = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()] if xnnpack else None,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    program = Runtime.get().load_program(
        bytes(lowered.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True)).buffer)
    )
    return program, program.load_method("forward")


def measure(name: str, attend: Callable[..., Tensor], slots: int, filled: int, queries: int, *, xnnpack: bool) -> dict:
    """Check the step at position `filled`, then time it. Only the last positions hold more than the initial zeros."""
    program, method = export(attend, slots, queries, xnnpack=xnnpack)
    k_cache, v_cache = (torch.zeros(1, KV_HEADS, slots, HEAD_DIM) for _ in range(2))
    for start in range(filled - 3 * queries, filled + 1, queries):
        inputs = new_inputs(start, queries)
        k_cache[:, :, inputs[3]], v_cache[:, :, inputs[3]] = inputs[1], inputs[2]
        result = method.execute(list(inputs))[0]
    error = float((result - attention_reference(inputs[0], k_cache, v_cache, inputs[3], 0)).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"{name} is wrong by {error}; nothing was timed")
    samples = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        method.execute(list(inputs))
        samples.append((time.perf_counter() - began) * 1e3)
    del program
    row = {"name": name, "allocated": slots, "filled": filled, "queries": queries, "max_error": error}
    row |= {"median_ms": statistics.median(samples), "best_ms": min(samples), "samples_ms": samples}
    print(f"{name:14} allocated {slots:6} filled {filled:6} T {queries:3}: {row['median_ms']:8.3f} ms", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    load_kernels()
    rows = []
    for slots in ALLOCATED:
        for name, attend, xnnpack in (
            ("g4::cpu_attention", attention, False),
            ("plain", plain_attention, False),
            ("plain xnnpack", plain_attention, True),
        ):
            rows.append(measure(name, attend, slots, 512, 1, xnnpack=xnnpack))
    rows.append(measure("g4::cpu_attention", attention, 32768, 3968, 1, xnnpack=False))
    rows.append(measure("g4::cpu_attention", attention, 4096, 512, 64, xnnpack=False))
    rows.append(measure("plain", plain_attention, 4096, 512, 64, xnnpack=False))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    document = {
        "command": "python bench/cpu_attention.py --out bench/results/cpu-attention.json",
        "commit": commit,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "float32"},
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {package: version(package) for package in ("torch", "executorch")},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
