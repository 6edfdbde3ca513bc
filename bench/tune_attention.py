"""Check and time the attention kernels on the GPU at hand: full layers of the 31B at many depths, sliding layers,
prefill.

    python bench/tune_attention.py --out results.json [--seconds 200]

Every configuration is checked against the float32 reference first. Decode is timed in a cache allocated for 131,072
tokens whatever the depth: the time must follow the depth, not the allocation. Medians of CUDA-graph replays over
several caches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from gemma4cli.kernels.attention import decode, int8, prefill, reference, turboquant
from gemma4cli.kernels.attention.cache import AttentionCache, code_bits

ALLOCATED = 131072
FULL = {"heads": 32, "kv_heads": 4, "head_dim": 512, "rotated": 128, "window": 0}
SLIDING = {"heads": 32, "kv_heads": 16, "head_dim": 256, "rotated": 256, "window": 1024}
DECODE_CONFIGS = [  # (splits, block_s, warps, stages)
    (splits, block_s, warps, stages)
    for splits in (16, 32, 64, 128)
    for block_s, warps, stages in (
        (16, 4, 1),
        (16, 4, 2),
        (32, 4, 1),
        (32, 4, 2),
        (32, 8, 2),
        (64, 8, 1),
        (64, 4, 1),
        (16, 2, 2),
    )
]
PREFILL_CONFIGS = [  # (rows, block_s, warps, stages), also with K_r fetched ahead for a folded cache
    (32, 32, 4, 1), (32, 32, 8, 1), (64, 16, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2),
    (64, 64, 8, 1), (64, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2), (128, 16, 8, 2),
]  # fmt: skip


def make_cache(kind: str, shape: dict, slots: int) -> AttentionCache:
    """Random keys and values of the model's magnitudes (values have unit root mean square)."""
    width = shape["rotated"] if kind.startswith("folded") else shape["head_dim"]
    k = torch.randn(shape["kv_heads"], slots, width, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(shape["kv_heads"], slots, shape["head_dim"], device="cuda", dtype=torch.bfloat16)
    if kind in ("plain", "folded"):
        return AttentionCache(k, v, folded=kind == "folded")
    if kind.endswith("q8"):
        encoded = [int8.encode(x) for x in (k, v)]
    else:
        table = turboquant.codebook().cuda()
        encoded = [turboquant.encode(x, torch.eye(x.shape[-1], device="cuda"), table) for x in (k, v)]
    return AttentionCache(encoded[0][0], encoded[1][0], encoded[0][1], encoded[1][1], folded=kind.startswith("folded"))


def common(cache: AttentionCache, shape: dict) -> dict:
    head_dim = shape["head_dim"]
    rotated = shape["rotated"] if cache.folded else head_dim
    return {
        "WINDOW": shape["window"], "GROUP": shape["heads"] // shape["kv_heads"], "D": head_dim, "R": rotated,
        "HALF": head_dim // 2, "R_HALF": rotated // 2, "FOLDED": cache.folded, "CODE_BITS": code_bits(cache.k),
        "DOT": tl.bfloat16 if cache.k_scale is None else tl.float16, "ASM": True,
    }  # fmt: skip


def pointers(cache: AttentionCache, q: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
    k_scale = cache.k if cache.k_scale is None else cache.k_scale
    v_scale = cache.v if cache.v_scale is None else cache.v_scale
    return [q, r, cache.k, k_scale, cache.v, v_scale]


def decoder(cache: AttentionCache, shape: dict, q, r, position, config) -> tuple[Callable[[], None], torch.Tensor]:
    splits, block_s, warps, stages = config
    heads, head_dim = shape["heads"], shape["head_dim"]
    partial = torch.empty(heads, splits, head_dim, device="cuda")
    top, total = torch.empty(heads, splits, device="cuda"), torch.empty(heads, splits, device="cuda")
    out = torch.full_like(q, torch.nan)

    def run() -> None:
        decode.split[(shape["kv_heads"], splits)](
            *pointers(cache, q, r), position, partial, top, total, cache.v.shape[1], **common(cache, shape),
            SPLITS=splits, BLOCK_S=block_s, ROWS=16, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        decode.combine[(heads, triton.cdiv(head_dim, 64))](
            partial, top, total, out, D=head_dim, SPLITS=splits, BLOCK_D=64, num_warps=4
        )

    return run, out


def prefiller(cache: AttentionCache, shape: dict, q, r, position, config) -> tuple[Callable[[], None], torch.Tensor]:
    rows, block_s, warps, stages, *ahead = config
    tokens, group = q.shape[1], shape["heads"] // shape["kv_heads"]
    out = torch.full_like(q, torch.nan)

    def run() -> None:
        prefill.attend[(triton.cdiv(tokens, rows // group), shape["kv_heads"])](
            *pointers(cache, q, r), position, out, tokens, cache.v.shape[1], **common(cache, shape),
            BLOCK_S=block_s, ROWS=rows, AHEAD=bool(ahead), num_warps=warps, num_stages=stages,
        )  # fmt: skip

    return run, out


def graph_time_us(run: Callable[[], None], repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    samples = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / repeats * 1e3)
    return sorted(samples)[2]


def rows(make, cache, shape, q, r, position, configs, repeats, deadline) -> Iterator[dict]:
    """Check and time each configuration."""
    folded = r if cache.folded else None
    expected = reference.attention(q.float(), None if folded is None else r.float(), cache, position, shape["window"])
    for config in configs:
        if time.time() > deadline:
            return
        try:
            run, out = make(cache, shape, q, r, position, config)
            run()
            error = ((out.float() - expected).norm() / expected.norm()).item()
            if not error < 2e-2:
                yield {"config": config, "error": error}
                continue
            yield {"config": config, "us": graph_time_us(run, repeats), "error": error}
        except Exception as failure:  # a configuration the compiler or the GPU refuses is a result too
            yield {"config": config, "failure": repr(failure)[:80]}


def report(document: dict, label: str, found: list[dict], work: float, unit: str) -> None:
    good = sorted((row for row in found if "us" in row), key=lambda row: row["us"])
    bad = [row for row in found if "us" not in row]
    document["rows"].append({"case": label, "top": good[:5], "bad": bad[:6]})
    best = [(row["config"], round(row["us"], 1)) for row in good[:3]]
    rate = f"{work / good[0]['us']:.0f} {unit}" if good else "none"
    print(f"{label:28} {rate:12} err {good[0]['error'] if good else 0:.0e} {best} bad {len(bad)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    torch.manual_seed(0)
    document: dict = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": []}
    for kind in ("plain", "folded", "tq4", "folded-tq4"):
        cache = make_cache(kind, FULL, ALLOCATED)
        bytes_per_slot = sum(t.numel() * t.element_size() for t in (cache.k, cache.v)) / ALLOCATED
        q = torch.randn(32, 1, 512, device="cuda", dtype=torch.bfloat16) * 0.05
        r = torch.randn(32, 1, 128 if cache.folded else 512, device="cuda", dtype=torch.bfloat16) * 0.05
        best = None
        for depth in (130000, 32768, 8192, 512):
            configs = DECODE_CONFIGS if best is None else best
            where = torch.tensor([depth - 1], device="cuda")
            found = list(rows(decoder, cache, FULL, q, r, where, configs, 20, deadline))
            report(document, f"decode {kind} @{depth}", found, bytes_per_slot * depth / 1e3, "GB/s")
            if best is None:
                best = [row["config"] for row in sorted((f for f in found if "us" in f), key=lambda f: f["us"])[:6]]
        for depth in (0, 30720):
            q2 = torch.randn(32, 1024, 512, device="cuda", dtype=torch.bfloat16) * 0.05
            r2 = torch.randn(32, 1024, r.shape[-1], device="cuda", dtype=torch.bfloat16) * 0.05
            where = torch.arange(depth, depth + 1024, device="cuda")
            cut = AttentionCache(cache.k[:, :32768].contiguous(), cache.v[:, :32768].contiguous(),
                                 None if cache.k_scale is None else cache.k_scale[:, :32768].contiguous(),
                                 None if cache.v_scale is None else cache.v_scale[:, :32768].contiguous(),
                                 cache.folded)  # fmt: skip
            ahead = [(*config, "ahead") for config in PREFILL_CONFIGS] if kind == "folded" else []
            found = list(rows(prefiller, cut, FULL, q2, r2, where, PREFILL_CONFIGS + ahead, 3, deadline))
            flops = 4 * 32 * 512 * 1024 * (depth + 512) / 1e6
            report(document, f"prefill {kind} 1024@{depth}", found, flops, "TFLOP/s")
        arguments.out.write_text(json.dumps(document, indent=1))
        del cache
        torch.cuda.empty_cache()
    ring = make_cache("plain", SLIDING, 2047)
    for tokens in (1, 1024):
        q = torch.randn(32, tokens, 256, device="cuda", dtype=torch.bfloat16) * 0.05
        where = torch.arange(5000, 5000 + tokens, device="cuda")
        make, configs = (decoder, DECODE_CONFIGS) if tokens == 1 else (prefiller, PREFILL_CONFIGS)
        found = list(rows(make, ring, SLIDING, q, q, where, configs, 10, deadline))
        work = 2 * 16 * 256 * 2 * 1024 / 1e3 if tokens == 1 else 4 * 32 * 256 * tokens * 1024 / 1e6
        report(document, f"sliding T={tokens}", found, work, "GB/s" if tokens == 1 else "TFLOP/s")
    arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
