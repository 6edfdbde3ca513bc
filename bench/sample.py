"""Check the sampling kernels on the GPU at hand against the CPU's sampler, and time them.

    python bench/sample.py --out results.json [--tune] [--compiled] [--cases 400]

Tokens must be those of `model.sampling.sample` on the CPU; whatever differs is listed with the gap between the two
noisy scores, which rounding may bridge when it is below 1e-5. Scratch memory starts as NaN and a captured graph is
replayed with other settings. Times are medians of CUDA-graph replays over several rows of logits. `--compiled` also
times the same sampler as Inductor compiles it; `--tune` walks the space of configurations.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from gemma4cli.kernels.sampling import launch, sample_cuda
from gemma4cli.kernels.sampling.configs import SampleConfig, sample_config
from gemma4cli.kernels.targets import current_target
from gemma4cli.model.sampling import _gumbel, sample

VOCAB = 262144
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "flat": lambda x: x * 0.01,
    "equal": torch.zeros_like,
    "wide": lambda x: x * 3,
    "peaked": lambda x: x * 12,
    "ties": lambda x: (x * 4).round() / 2,
    "masked": lambda x: x.where(x > 2, float("-inf")),
}
SETTINGS = list(product([1.0, 0.7, 0.0], [64, 0, 1, 5000], [0.95, 1.0, 0.1], [0.0, 0.05]))
# Timed: logits, temperature, top_k, top_p.
TIMED = {
    "greedy": ("normal", 0.0, 64, 0.95),
    "Gemma's defaults, normal logits": ("normal", 1.0, 64, 0.95),
    "Gemma's defaults, wide logits": ("wide", 1.0, 64, 0.95),
    "no filter": ("normal", 1.0, 0, 1.0),
    "top-p only, wide logits": ("wide", 1.0, 0, 0.95),
    "top-p only, normal logits": ("normal", 1.0, 0, 0.95),
    "top-p only, equal logits (worst case)": ("equal", 1.0, 0, 0.95),
}


def arguments(
    temperature: float, top_k: int, top_p: float, min_p: float = 0.0, seed: int = 1, position: int = 1
) -> list[Tensor]:
    """All arguments after the logits, on the CPU."""
    return [torch.tensor([position]), torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]),
            torch.tensor([min_p]), torch.tensor([seed])]  # fmt: skip


def differences(cases: int) -> Iterator[dict]:
    """Yield what the GPU draws otherwise than the CPU, over random logits, settings, seeds and vocabularies."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    chance = random.Random(0)
    for case in range(cases):
        kind, setting = chance.choice(list(KINDS)), chance.choice(SETTINGS)
        vocab_size = chance.choice([VOCAB, VOCAB, 1000, 2048, 99_991])
        logits = KINDS[kind](torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(case)))
        rest = arguments(*setting, seed=chance.randrange(-(1 << 63), 1 << 63), position=chance.randrange(131072))
        expected = int(sample(logits, *rest))
        drawn = int(sample_cuda(logits.cuda(), *(tensor.cuda() for tensor in rest)))
        if drawn != expected:
            noisy = logits[0] / max(setting[0], 1e-30) + _gumbel(rest[5][None], rest[0][None], vocab_size)[0]
            yield {"kind": kind, "vocab_size": vocab_size, "settings": setting, "drawn": drawn, "expected": expected,
                   "gap": abs(float(noisy[drawn] - noisy[expected]))}  # fmt: skip
    torch.use_deterministic_algorithms(False)


def replays_follow_their_inputs() -> bool:
    """Capture once, then change logits and settings in place."""
    static = [torch.zeros(1, VOCAB).cuda(), *(tensor.cuda() for tensor in arguments(0.0, 0, 1.0))]
    sample_cuda(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample_cuda(*static)
    for index, setting in enumerate(SETTINGS[::5]):
        fresh = [torch.randn(1, VOCAB) * 3, *arguments(*setting, seed=index, position=index)]
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        if int(out) != int(sample(*fresh)):
            return False
    return True


def graph_time_us(run: Callable[[Tensor], Tensor], rows: list[Tensor], repeats: int = 10) -> float:
    """Median microseconds of one call, from replays of a graph that holds `repeats` calls for every row."""
    for row in rows:
        run(row)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for row in rows:
                run(row)
    samples = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / (repeats * len(rows)) * 1e3)
    return sorted(samples)[3]


def times(sampler: Callable[..., Tensor], names: list[str]) -> dict[str, float]:
    """Microseconds of one draw for each named entry of TIMED."""
    found = {}
    for name in names:
        kind, *setting = TIMED[name]
        rows = [KINDS[kind](torch.randn(1, VOCAB, device="cuda")) for _ in range(4)]
        rest = [tensor.cuda() for tensor in arguments(*setting)]
        found[name] = graph_time_us(lambda row, rest=rest: sampler(row, *rest), rows)
    return found


def tuned(config: SampleConfig) -> Iterator[dict]:
    """Time the passes over the vocabulary, then the search on top of the fastest of them."""
    names = ["Gemma's defaults, normal logits", "Gemma's defaults, wide logits", "top-p only, normal logits"]
    passes = [replace(config, block=block, num_warps=warps, tally_bits=bits)
              for block, warps, bits in product([1024, 2048, 4096], [2, 4, 8], [4, 5, 6])]  # fmt: skip
    best = yield from timed(passes, names)
    searches = [
        replace(best, search_bits=bits, finish_warps=warps) for bits, warps in product([2, 3, 4, 6], [2, 4, 8, 16])
    ]
    yield from timed(searches, names)


def timed(configs: list[SampleConfig], names: list[str]) -> Iterator[dict]:
    """Yield the times of each configuration; return the one that is best for Gemma's defaults."""
    best, best_us = configs[0], float("inf")
    for config in configs:
        row = times(lambda *tensors, config=config: launch(config, *tensors), names)
        us = row[names[0]] + row[names[1]]
        if us < best_us:
            best, best_us = config, us
        print(tuple(asdict(config).values()), {name: round(value, 1) for name, value in row.items()}, flush=True)
        yield {"config": asdict(config), "us": row}
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--cases", type=int, default=400)
    options = parser.parse_args()
    config = sample_config(current_target())
    document = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "config": asdict(config), "cases": options.cases,
    }  # fmt: skip
    document["differences"] = list(differences(options.cases))
    document["replays_follow_their_inputs"] = replays_follow_their_inputs()
    document["us"] = times(sample_cuda, list(TIMED))
    if options.compiled:
        document["inductor_us"] = times(torch.compile(sample, dynamic=False), list(TIMED)[:2])
    print(json.dumps(document, indent=1), flush=True)
    if options.tune:
        document["tuning"] = list(tuned(config))
    options.out.write_text(json.dumps(document, indent=1))
    wrong = [row for row in document["differences"] if not row["gap"] < 1e-5]
    return 1 if wrong or not document["replays_follow_their_inputs"] else 0


if __name__ == "__main__":
    sys.exit(main())
