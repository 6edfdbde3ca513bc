"""Measure and tune the prefill product and the 8-bit product of decoding on the GPU at hand, against ceilings measured
in the same run. Decoding with 4 and 6 bits is timed by time_candidates.py.

    python bench/tune_matmul.py --out results.json [--kernel matvec_int8|matmul|both] [--seconds 200]

Every configuration is checked against the float32 reference on fresh random data before it is timed; a wrong one is
never reported. Times are medians of CUDA-graph replays over rotating copies of the weight, so that none stays in the
L2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from gemma4cli.kernels.quantized_matmul import decode, prefill, reference
from gemma4cli.kernels.quantized_matmul.format import STEP_WIDTH, PackedWeight, WeightFormat

# (N, K, how many of them a token passes): Gemma 4 31B, q/k/v and gate/up fused (docs/architecture.md).
SHAPES = {
    "gate_up": (43008, 5376, 60),
    "down": (5376, 21504, 60),
    "qkv": (16384, 5376, 50),
    "o": (5376, 8192, 50),
    "qk_full": (18432, 5376, 10),
    "o_full": (5376, 16384, 10),
    "lm_head": (262144, 5376, 1),
}
FORMATS = {
    "int4_min": WeightFormat(4, 32, True),
    "int6": WeightFormat(6, 16, False),
    "int8": WeightFormat(8, 32, False),
}


def random_weight(fmt: WeightFormat, n: int, k: int) -> PackedWeight:
    """A packed weight of random codes and scales, made on the GPU (values around 0.02)."""
    integer = lambda shape: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")  # noqa: E731
    codes = integer((n, k // 4 if fmt.bits == 8 else k // 8))
    high = integer((n, k // 16)) if fmt.bits == 6 else None
    levels = (2,) if fmt.has_min else ()
    sub = torch.randint(20, 127, (n, k // fmt.group_size, *levels), dtype=torch.int8, device="cuda")
    step = torch.rand((n, -(-k // STEP_WIDTH), *levels), device="cuda") * 4e-5 + 1e-5
    return PackedWeight(fmt, (n, k), codes, high, sub, step.half())


def graph_time_us(body: Callable[[int], None], copies: int, rounds: int = 5) -> float:
    """Median time of one body(i) in microseconds, replayed from one CUDA graph over `copies` inputs."""
    body(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 8 // copies)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(copies):
                body(i)
    graph.replay()
    torch.cuda.synchronize()
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / (repeats * copies) * 1e3)
    return sorted(samples)[len(samples) // 2]


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device copy (launched, not captured: a graph copies by DMA engine)."""
    a = torch.empty(2**30, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    samples = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return 2 * a.numel() * 4 / sorted(samples)[len(samples) // 2]


def matvec_configs() -> list[tuple[int, int, int, int]]:
    """(BLOCK_N, BLOCK_G, warps, stages) worth trying: each thread reads 8 to 64 words a step."""
    found = []
    for block_n in (1, 2, 4, 8):
        for block_g in (8, 16, 32, 64):
            for warps in (1, 2, 4):
                for stages in (1, 2, 3):
                    words = block_n * block_g * 8 // (32 * warps)
                    if 8 <= words <= 64:
                        found.append((block_n, block_g, warps, stages))
    return found


def run_matvec(w: PackedWeight, xq, scale, y, config) -> None:
    block_n, block_g, warps, stages = config
    n, k = w.shape
    decode.matvec_int8[triton.cdiv(n, block_n), 1](
        w.codes, w.sub, w.step, xq, scale, y, n, k, block_n, block_g, True, num_warps=warps, num_stages=stages
    )


def tune_matvec(name: str, deadline: float) -> dict | None:
    n, k, count = SHAPES[name]
    fmt = FORMATS["int8"]
    first = random_weight(fmt, n, k)
    copies = max(2, int(400e6 // first.nbytes) + 1)
    weights = [first] + [random_weight(fmt, n, k) for _ in range(copies - 1)]
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    xq, scale, _ = reference.quantize_activations(x)
    xq = xq.view(torch.int32)
    probe = PackedWeight(fmt, (256, k), first.codes[-256:], None, first.sub[-256:], first.step[-256:])
    expected = reference.matmul_int8(x.float(), probe)
    rows = []
    for config in matvec_configs():
        if time.time() > deadline:
            break
        y = torch.full((1, n), float("nan"), device="cuda", dtype=torch.float32)
        try:
            run_matvec(first, xq, scale, y, config)
            error = relative_error(y[:, -256:], expected)
            if not error < 1e-3 or not torch.isfinite(y).all():
                rows.append({"config": config, "error": error})
                continue
            us = graph_time_us(lambda i: run_matvec(weights[i], xq, scale, y, config), copies)  # noqa: B023
        except Exception as failure:  # a configuration the compiler or the GPU refuses is a result too
            rows.append({"config": config, "failure": repr(failure)[:100]})
            continue
        rows.append({"config": config, "us": us, "gb_s": first.nbytes / us / 1e3, "error": error})
    good = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    if not good:
        return None
    return {"shape": name, "format": "int8", "n": n, "k": k, "per_token": count, "bytes": first.nbytes,
            "best": good[0], "top": good[:5], "wrong": [r for r in rows if "us" not in r][:5]}  # fmt: skip


MATMUL_CONFIGS = [  # (BLOCK_N, BLOCK_M, GROUP_M, warps, stages)
    (128, 256, 2, 8, 3), (128, 256, 1, 8, 3), (128, 256, 4, 8, 3), (128, 256, 8, 8, 3), (128, 128, 2, 8, 3),
    (128, 64, 4, 8, 3), (128, 64, 4, 8, 4), (64, 128, 4, 8, 3), (64, 256, 2, 4, 3),
]  # fmt: skip


def tune_matmul(name: str, fmt_name: str, tokens: int, deadline: float) -> dict | None:
    n, k, count = SHAPES[name]
    fmt = FORMATS[fmt_name]
    w = random_weight(fmt, n, k)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    cublas_us = graph_time_us(lambda i: torch.matmul(x, dense.T), 1)  # noqa: F821
    del dense
    probe = PackedWeight(
        fmt, (64, k), w.codes[-64:], None if w.high is None else w.high[-64:], w.sub[-64:], w.step[-64:]
    )
    expected = reference.matmul(x.float(), probe)
    high = w.codes if w.high is None else w.high
    rows = []
    for config in MATMUL_CONFIGS:
        if time.time() > deadline:
            break
        block_n, block_m, group_m, warps, stages = config
        y = torch.full((tokens, n), float("nan"), device="cuda", dtype=torch.bfloat16)
        grid = (triton.cdiv(n, block_n) * triton.cdiv(tokens, block_m),)

        def body(i: int) -> None:
            prefill.matmul[grid](  # noqa: B023
                w.codes, high, w.sub, w.step, x, y, tokens, n, k,  # noqa: B023
                fmt.bits, fmt.group_size, fmt.has_min, block_n, block_m, group_m, tl.bfloat16, True,  # noqa: B023
                num_warps=warps, num_stages=stages,  # noqa: B023
            )  # fmt: skip

        try:
            body(0)
            error = relative_error(y[:, -64:], expected)
            if not error < 1e-2 or not torch.isfinite(y).all():
                rows.append({"config": config, "error": error})
                continue
            us = graph_time_us(body, 1)
        except Exception as failure:
            rows.append({"config": config, "failure": repr(failure)[:100]})
            continue
        rows.append({"config": config, "us": us, "tflop_s": 2 * tokens * n * k / us / 1e6, "error": error})
    good = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    if not good:
        return None
    return {"shape": name, "format": fmt_name, "n": n, "k": k, "tokens": tokens, "per_token": count,
            "cublas_tflop_s": 2 * tokens * n * k / cublas_us / 1e6, "best": good[0], "top": good[:4],
            "wrong": [r for r in rows if "us" not in r][:4]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", choices=["matvec_int8", "matmul", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=200)
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    torch.manual_seed(0)
    state = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw",
        "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    copy = copy_bandwidth()
    document: dict = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": state,
        "copy_gb_s": copy / 1e9,
        "rows": [],
    }
    print(f"{state}\ncopy {copy / 1e9:.0f} GB/s")
    for name in SHAPES if arguments.kernel != "matmul" else ():
        row = tune_matvec(name, deadline)
        if row:
            document["rows"].append({"kernel": "matvec_int8", **row})
            best = row["best"]
            print(f"matvec_int8 {name:8} {best['us']:7.1f} us {best['gb_s']:5.0f} GB/s "
                  f"{100 * best['gb_s'] * 1e9 / copy:3.0f} % {best['config']} {best['error']:.0e}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(document, indent=1))
    matmuls = [(s, f) for f in ("int4_min", "int6") for s in ("gate_up", "down", "qkv", "o")]
    for name, fmt_name in matmuls if arguments.kernel != "matvec_int8" else ():
        row = tune_matmul(name, fmt_name, 2048, deadline)
        if row:
            document["rows"].append({"kernel": "matmul", **row})
            best = row["best"]
            print(f"matmul {name:8} {fmt_name:8} {best['us']:7.1f} us {best['tflop_s']:4.0f} TFLOP/s "
                  f"(cuBLAS {row['cublas_tflop_s']:.0f}) {best['config']} {best['error']:.0e}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
