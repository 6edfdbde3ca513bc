"""Measure the peak memory of quantizing tensors of the 31B's size: python -m bench.quantization_memory FOLDER

Writes a random checkpoint of one layer with the 31B's embedding (262144 x 5376) and matrices (21504 x 5376), 3.9 GB,
to FOLDER, quantizes it there with `g4 quantize` in a process of its own, and prints JSON for bench/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from gemma4cli.quant.quantize import plan_quantization
from gemma4cli.quant.recipe import load_recipe
from tests.support.tiny import write_checkpoint

_SIZES = {
    "vocab_size": 262144,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="default")
    arguments = parser.parse_args()
    source, target = arguments.folder / "source", arguments.folder / "quantized"
    if not source.exists():
        write_checkpoint(source, dtype=torch.bfloat16, vision=False, **_SIZES)
    program = "import sys; from gemma4cli.cli import main; code = main(sys.argv[1:]);"
    program += "print(*(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))); sys.exit(code)"
    command = ["quantize", str(source), "--recipe", arguments.recipe, "-o", str(target), "--force", "--quiet"]
    run = subprocess.run([sys.executable, "-c", program, *command], check=True, capture_output=True, text=True)
    plan = plan_quantization(source, load_recipe(arguments.recipe))
    print(
        json.dumps(
            {
                "bench": "quantization_memory",
                "recipe": arguments.recipe,
                "largest_tensor": [262144, 5376],
                "peak_rss_bytes": int(run.stdout.split()[-1]) << 10,
                "planned_peak_bytes": plan.peak_bytes,
                "source_bytes": plan.totals.source_bytes,
                "threads": torch.get_num_threads(),
                "torch": version("torch"),
                "torchao": version("torchao"),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
