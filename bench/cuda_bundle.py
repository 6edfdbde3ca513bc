"""Measure a CUDA bundle on the GPU at hand, its compiled code hosted by PyTorch: memory, prefill and decode by depth.

    python bench/cuda_bundle.py BUNDLE --depth 512,8192,32768 --gen 64 --out bench/results/NAME.json

The context is filled with random tokens, chunk by chunk, once; at each depth decoding is timed as replays of the CUDA
graph of the exported `decode`, by events on the device and by the clock, one token after the other. Memory is what the
driver counts for the process, beside what the bundle's manifest predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

from gemma4cli.engine.compiled import CompiledEngine
from gemma4cli.export.bundle import open_bundle
from gemma4cli.model.settings import GREEDY, SamplingSettings

GEMMA = SamplingSettings(temperature=1.0, top_k=64, top_p=0.95, seed=1)


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def decode(engine: CompiledEngine, count: int, sampling: SamplingSettings) -> dict[str, float]:
    """Time `count` steps after what the session holds; the graph's own time by events."""
    engine.step("bench", [7], sampling)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        int(engine.step("bench", [7], sampling)[0])
    wall = (time.perf_counter() - started) / count
    graph = engine._sessions["bench"].graph
    samples = []
    for _ in range(20):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last))
    return {"device_ms": statistics.median(samples), "wall_ms": 1e3 * wall, "tok_s": 1 / wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depth", default="512,8192,32768")
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = used_bytes()
    started = time.perf_counter()
    engine = CompiledEngine.from_bundle(options.bundle)
    contract, manifest = engine.contract, open_bundle(options.bundle).manifest
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bundle": {
            "context": contract.context_length,
            "chunk": contract.prefill_chunk,
            "kv": manifest.kv["full"].format,
        },
        "created_with": manifest.created_with,
        "predicted": {**vars(manifest.memory), "total": manifest.memory.total_bytes},
        "load_s": time.perf_counter() - started,
        "depths": {},
    }
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, contract.vocab_size, (contract.context_length,), generator=generator).tolist()
    done = 0
    for depth in (int(text) for text in options.depth.split(",")):
        rates = []
        while done < depth:
            count = min(contract.prefill_chunk, depth - done)
            torch.cuda.synchronize()
            began = time.perf_counter()
            engine.step("bench", tokens[done : done + count], GREEDY)
            torch.cuda.synchronize()
            rates.append(count / (time.perf_counter() - began))
            done += count
        entry = {"prefill_tok_s_last_4_chunks": statistics.median(rates[-4:]) if rates else None}
        entry["greedy"] = decode(engine, options.gen, GREEDY)
        entry["gemma_defaults"] = decode(engine, options.gen, GEMMA)
        done = len(engine._sessions["bench"].tokens)
        report["depths"][str(depth)] = entry
        print(depth, json.dumps(entry), flush=True)
    torch.cuda.synchronize()
    report["measured"] = {
        "driver_bytes": used_bytes() - before,
        "driver_bytes_before": before,
        "torch_allocated": torch.cuda.memory_allocated(),
        "torch_peak": torch.cuda.max_memory_allocated(),
        "torch_reserved": torch.cuda.memory_reserved(),
    }
    query = "name,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    report["gpu_state"] = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(json.dumps({key: value for key, value in report.items() if key != "depths"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
