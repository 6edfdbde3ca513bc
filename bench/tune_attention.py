"""Check and time prefill's attention on the GPU at hand, compiled by the Triton that is there: the 31B's full and sliding
layers. Decoding's is timed as it is compiled for bundles, by time_candidates.py, which takes caches from here.

    python bench/tune_attention.py --out results.json [--seconds 200]

Every configuration is checked against the float32 reference first. Medians of CUDA-graph replays.
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

from gemma4cli.kernels.attention import int8, prefill, reference, turboquant
from gemma4cli.kernels.attention.cache import AttentionCache, code_bits

SLOTS = 32768
FULL = {"heads": 32, "kv_heads": 4, "head_dim": 512, "rotated": 128, "window": 0}
SLIDING = {"heads": 32, "kv_heads": 16, "head_dim": 256, "rotated": 256, "window": 1024}
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


def graph_time_us(run: Callable[[], None], repeats: int = 3) -> float:
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


def rows(cache, shape, q, r, position, configs, deadline) -> Iterator[dict]:
    """Check and time each configuration."""
    folded = r if cache.folded else None
    expected = reference.attention(q.float(), None if folded is None else r.float(), cache, position, shape["window"])
    for config in configs:
        if time.time() > deadline:
            return
        try:
            run, out = prefiller(cache, shape, q, r, position, config)
            run()
            error = ((out.float() - expected).norm() / expected.norm()).item()
            if not error < 2e-2:
                yield {"config": config, "error": error}
                continue
            yield {"config": config, "us": graph_time_us(run), "error": error}
        except Exception as failure:  # a configuration the compiler or the GPU refuses is a result too
            yield {"config": config, "failure": repr(failure)[:80]}


def report(document: dict, label: str, found: list[dict], work: float) -> None:
    good = sorted((row for row in found if "us" in row), key=lambda row: row["us"])
    bad = [row for row in found if "us" not in row]
    document["rows"].append({"case": label, "top": good[:5], "bad": bad[:6]})
    best = [(row["config"], round(row["us"], 1)) for row in good[:3]]
    rate = f"{work / good[0]['us']:.0f} TFLOP/s" if good else "none"
    print(f"{label:28} {rate:12} err {good[0]['error'] if good else 0:.0e} {best} bad {len(bad)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    torch.manual_seed(0)
    document: dict = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": []}
    for kind in ("plain", "folded", "q8", "folded-q8", "tq4", "folded-tq4"):
        cache = make_cache(kind, FULL, SLOTS)
        for depth in (0, 30720):
            q = torch.randn(32, 1024, 512, device="cuda", dtype=torch.bfloat16) * 0.05
            r = torch.randn(32, 1024, 128 if cache.folded else 512, device="cuda", dtype=torch.bfloat16) * 0.05
            where = torch.arange(depth, depth + 1024, device="cuda")
            ahead = [(*config, "ahead") for config in PREFILL_CONFIGS] if kind == "folded" else []
            found = list(rows(cache, FULL, q, r, where, PREFILL_CONFIGS + ahead, deadline))
            report(document, f"full, {kind} 1024@{depth}", found, 4 * 32 * 512 * 1024 * (depth + 512) / 1e6)
        arguments.out.write_text(json.dumps(document, indent=1))
    ring = make_cache("plain", SLIDING, 2047)
    q = torch.randn(32, 1024, 256, device="cuda", dtype=torch.bfloat16) * 0.05
    found = list(rows(ring, SLIDING, q, q, torch.arange(5000, 6024, device="cuda"), PREFILL_CONFIGS, deadline))
    report(document, "sliding 1024@5000", found, 4 * 32 * 256 * 1024 * 1024 / 1e6)
    arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
