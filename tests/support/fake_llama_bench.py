"""A stand-in for llama.cpp's llama-bench: takes its options, prints JSON of its form, and times nothing."""

from __future__ import annotations

import sys
from pathlib import Path

# The fields of llama.cpp b6900 and later, with values of a run on a CPU.
_SCRIPT = r"""#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open({log!r}, "a").write(json.dumps(sys.argv[1:]) + "\n")
assert options["-o"] == "json" and options["-r"] == "1"
results = []
for depth in map(int, options.get("-d", "0").split(",")):
    sizes = [(int(n), 0) for n in options["-p"].split(",")] + [(0, int(n)) for n in options["-n"].split(",")]
    for prompt, gen in sizes:
        if not prompt + gen:
            continue
        rate = {rate} / (1 + depth / 1000) * (10 if prompt else 1)
        ns = int(1e9 * (prompt + gen) / rate)
        results.append({{
            "build_commit": "8cf427ff", "build_number": 6900, "cpu_info": "A CPU", "gpu_info": "", "backends": "CPU",
            "model_filename": options["-m"], "model_type": "gemma4 31B Q4_K - Medium", "model_size": 4677120000,
            "model_n_params": 7615616512, "n_batch": 2048, "n_ubatch": 512, "n_threads": int(options.get("-t", 8)),
            "cpu_mask": "0x0", "cpu_strict": False, "poll": 50, "type_k": "f16", "type_v": "f16",
            "n_gpu_layers": int(options["-ngl"]), "n_cpu_moe": 0, "split_mode": "layer", "main_gpu": 0,
            "no_kv_offload": False, "flash_attn": -1, "devices": "auto", "tensor_split": "0.00",
            "tensor_buft_overrides": "none", "load_mode": "mmap", "embeddings": False, "no_op_offload": 0,
            "no_host": False, "fit_target": 0, "fit_min_ctx": 0, "n_prompt": prompt, "n_gen": gen, "n_depth": depth,
            "test_time": "2026-04-24T11:58:50Z", "avg_ns": ns, "stddev_ns": 0, "avg_ts": rate, "stddev_ts": 0.0,
            "samples_ns": [ns], "samples_ts": [rate],
        }})
print(json.dumps(results))
"""


def write_llama_bench(folder: Path, rate: float = 100.0) -> tuple[Path, Path]:
    """Write the program; returns it and the file to which it logs its arguments, one JSON list per run."""
    program, log = folder / "llama-bench", folder / "llama-bench.log"
    program.write_text(_SCRIPT.format(python=sys.executable, log=str(log), rate=rate))
    program.chmod(0o755)
    return program, log


def write_script(folder: Path, body: str) -> Path:
    """Write an executable shell script."""
    program = folder / "program.sh"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program
