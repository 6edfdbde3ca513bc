"""Time packing a model for the GPU (`.ptd`) beside a plain copy of its source on the same disk, in turns.

    python bench/pack.py model.gguf checkpoint/ --folder /tmp --runs 3 --out bench/results/pack.json

See beside_copy.py. Packing runs in a fresh process and syncs its file: `wall_s` is the call itself, `process_s` adds the
start of Python, torch and executorch, and opening the source. `peak_rss_bytes` counts the mapped source too;
`peak_anonymous_bytes` is without what is only page cache.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from beside_copy import arguments, in_turns, report, run_child, usage

CONTEXT, CHUNK = 131_072, 1024


def pack(source: Path, target: Path) -> dict[str, Any]:
    """Pack in a process of its own."""
    sample = run_child(__file__, source, target)
    packing = sample.pop("pack_s")
    return {**sample, "process_s": sample["wall_s"], "wall_s": packing}


def pack_here(source: Path, target: Path) -> dict[str, Any]:
    """Pack in this process."""
    import torch

    from gemma4cli.export.cuda.model import Signature
    from gemma4cli.export.cuda.weights import planned_bytes, write_weights
    from gemma4cli.model.kv_cache import CacheSpec
    from gemma4cli.quant.checkpoint import open_checkpoint
    from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint

    checkpoint = GGUFCheckpoint([source]) if source.is_file() else open_checkpoint(source)
    shown = checkpoint.first_rows() if isinstance(checkpoint, GGUFCheckpoint) else checkpoint
    signature = Signature.of(shown, CacheSpec(CONTEXT, CHUNK, torch.bfloat16), "bf16")
    planned = planned_bytes(signature)  # loads executorch
    peak = [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    before, started = usage(), time.perf_counter()
    write_weights(target, signature, checkpoint)
    seconds, after = time.perf_counter() - started, usage()
    return {
        "pack_s": round(seconds, 2),
        **{key: round(after[key] - before[key], 2) for key in ("user_s", "system_s")},
        "peak_rss_bytes": after["peak_rss_bytes"],
        "peak_anonymous_bytes": peak[0],
        "planned_bytes": planned,
        "disk_bytes": target.stat().st_blocks * 512,
        "file_bytes": target.stat().st_size,
    }


def _watch(peak: list[int]) -> None:
    while True:
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.partition("RssAnon:")[2].split()[0]) << 10)
        time.sleep(0.05)


def main() -> None:
    options = arguments(__doc__, "sources", nargs="+", help="GGUF files and quantized checkpoints").parse_args()
    if options.child:
        print(json.dumps(pack_here(options.sources[0], options.child)))
        return
    results = []
    for source in options.sources:
        target = options.folder / "bench.ptd"
        results.append(in_turns(source, options.folder, options.runs, lambda at, of=source: pack(of, at), target))
    report(options.out, ("numpy", "torch", "torchao", "gguf", "executorch"), {"results": results})


if __name__ == "__main__":
    main()
