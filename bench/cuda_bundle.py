"""Measure a CUDA bundle on the GPU at hand, its compiled code hosted by PyTorch: memory, prefill and decode by depth.

    python bench/cuda_bundle.py BUNDLE --depth 0,8192,32768 --gen 64 --out bench/results/NAME.json \\
        [--save-logits FILE | --compare-logits FILE]

The context is filled with random tokens, chunk by chunk, once; at each depth one more chunk is read (three times, the
median), and decoding is timed three ways: the replay of the CUDA graph of the exported `decode` by events on the device
(device_ms); by the clock, each step launched when the token before has been read (waited_ms); and as a user gets it, by
the statistics of a generation, which launches one step ahead (generated_ms, tok_s). Memory is what the driver counts
for the process, beside what the bundle's manifest predicts. What a KV format costs in accuracy: one bundle's logits at
each depth against those that another bundle of the same weights has saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.compiled import CompiledEngine
from gemma4cli.export.bundle import open_bundle
from gemma4cli.model.settings import GREEDY, SamplingSettings

GEMMA = SamplingSettings(temperature=1.0, top_k=64, top_p=0.95, seed=1)


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def prefill(engine: CompiledEngine, tokens: list[int], depth: int, count: int, repeats: int) -> float:
    """Read `count` tokens after the first `depth`, again and again; returns tokens/s up to the token they give."""
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        int(engine.step("bench", tokens[depth : depth + count], GREEDY)[0])
        samples.append(time.perf_counter() - started)
        del engine._sessions["bench"].tokens[depth:]
    return count / statistics.median(samples)


def decode(engine: CompiledEngine, context: list[int], count: int, sampling: SamplingSettings) -> dict[str, float]:
    """Time `count` steps after `context`, which the session holds; the graph's own time by events."""
    engine.step("bench", [7], sampling)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        int(engine.step("bench", [7], sampling)[0])
    waited = (time.perf_counter() - started) / count
    graph = engine._sessions["bench"].graph
    samples = []
    for _ in range(20):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last))
    rate = generate(engine, context, count, sampling)
    return {
        "device_ms": statistics.median(samples),
        "waited_ms": 1e3 * waited,
        "generated_ms": 1e3 / rate,
        "tok_s": rate,
    }


def generate(engine: CompiledEngine, context: list[int], count: int, sampling: SamplingSettings) -> float:
    """Let the engine answer after `context`, which the session goes back to; returns tokens/s of `count` steps."""
    request = GenerationRequest((*context, 7), count + 1, sampling, frozenset(), "bench")
    generation = engine.generate(request)
    for _ in generation:
        pass
    stats = generation.result.stats
    if (stats.reused_tokens, stats.generated_tokens) != (len(context), count + 1) or stats.decode_tok_s is None:
        raise RuntimeError(f"the generation after {len(context)} tokens was another one: {stats}")
    return stats.decode_tok_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depth", default="0,512,8192,32768")
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--save-logits", type=Path)
    parser.add_argument("--compare-logits", type=Path)
    options = parser.parse_args()
    before = used_bytes()
    started = time.perf_counter()
    engine = CompiledEngine.from_bundle(options.bundle)
    contract, manifest = engine.contract, open_bundle(options.bundle).manifest
    report: dict[str, Any] = {
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
    prefill(engine, tokens, 0, contract.prefill_chunk, 2)  # the first call loads kernels
    report["ttft_512_ms"] = 512e3 / prefill(engine, tokens, 0, 512, 5)
    logits = {}
    others = torch.load(options.compare_logits) if options.compare_logits else {}
    for depth in (int(text) for text in options.depth.split(",")):
        for done in range(len(engine._sessions["bench"].tokens), depth, contract.prefill_chunk):
            engine.step("bench", tokens[done : min(done + contract.prefill_chunk, depth)], GREEDY)
        logits[depth] = engine.step("bench", tokens[depth : depth + 1], GREEDY)[1][0].float().cpu()
        del engine._sessions["bench"].tokens[depth:]
        count = min(contract.prefill_chunk, contract.context_length - depth)
        entry: dict[str, Any] = {"prefill_tokens": count, "prefill_tok_s": prefill(engine, tokens, depth, count, 3)}
        if depth in others:
            entry["cosine"] = torch.nn.functional.cosine_similarity(logits[depth], others[depth], dim=0).item()
        for name, sampling in {"greedy": GREEDY, "gemma_defaults": GEMMA}.items():
            entry[name] = decode(engine, tokens[:depth], options.gen, sampling)
            del engine._sessions["bench"].tokens[depth:]  # rings hold a chunk more than the window: this is allowed
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
    if options.save_logits:
        torch.save(logits, options.save_logits)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
