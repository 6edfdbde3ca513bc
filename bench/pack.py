"""Time packing a model for the GPU (`.ptd`) beside a plain copy of the same source on the same disk, in turns.

    python bench/pack.py model.gguf checkpoint/ --folder /tmp --runs 3 --out bench/results/pack.json

Both end with the data on the disk (`cp && sync`; packing syncs its file). Packing runs in a fresh process: `pack_s` is
the call itself, `process_s` adds the start of Python, torch and executorch, and opening the source. Peak memory is the
system's own count, mapped source included; `peak_anonymous_bytes` is without what is only page cache. The source was
read once before, so that both find it cached (or neither does, when it is larger than memory). CPU seconds and the load
average are reported too: on a machine that others use, wall times say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemma4cli.files import write_json

CONTEXT, CHUNK = 131_072, 1024


def timed(command: list[str | Path]) -> tuple[dict[str, float], str]:
    """Run a command; return wall and CPU seconds, and what it printed."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.communicate()[0]
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    return {"wall_s": round(wall, 2), "load_average": round(os.getloadavg()[0], 2)}, output


def copy(source: Path, target: Path) -> dict[str, float]:
    """Copy a file or folder and wait for the disk; CPU seconds are those of cp."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample, _ = timed(["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync -f "$1"', source, target])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {**sample, "cpu_s": round(cpu, 2)}


def pack(source: Path, target: Path) -> dict[str, Any]:
    """Pack in a process of its own."""
    sample, output = timed([sys.executable, __file__, source, "--child", target])
    return {"process_s": sample["wall_s"], "load_average": sample["load_average"], **json.loads(output)}


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
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    write_weights(target, signature, checkpoint)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pack_s": round(seconds, 2),
        "user_s": round(after.ru_utime - before.ru_utime, 2),
        "system_s": round(after.ru_stime - before.ru_stime, 2),
        "peak_rss_bytes": after.ru_maxrss * 1024,
        "peak_anonymous_bytes": peak[0],
        "planned_bytes": planned,
        "disk_bytes": target.stat().st_blocks * 512,
        "file_bytes": target.stat().st_size,
    }


def _watch(peak: list[int]) -> None:
    while True:
        status = Path("/proc/self/status").read_text()
        (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
        peak[0] = max(peak[0], int(kib) << 10)
        time.sleep(0.05)


def measure(source: Path, folder: Path, runs: int) -> dict[str, Any]:
    """Copy and pack `runs` times each, in turns."""
    copied, packed = folder / "bench-copy", folder / "bench.ptd"
    files = [source] if source.is_file() else [path for path in source.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    samples: dict[str, list[dict[str, Any]]] = {"copy": [], "pack": []}
    try:
        for _ in range(runs):
            samples["copy"].append(copy(source, copied))
            shutil.rmtree(copied) if copied.is_dir() else copied.unlink()
            samples["pack"].append(pack(source, packed))
            packed.unlink()
    finally:
        packed.unlink(missing_ok=True)
        shutil.rmtree(copied, ignore_errors=True) if copied.is_dir() else copied.unlink(missing_ok=True)
    copy_s = statistics.median(s["wall_s"] for s in samples["copy"])
    pack_s = statistics.median(s["pack_s"] for s in samples["pack"])
    return {
        "source": source.name,
        "source_bytes": size,
        "copy_s": copy_s,
        "pack_s": pack_s,
        "pack_over_copy": round(pack_s / copy_s, 3),
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in samples["pack"]),
        "peak_anonymous_bytes": max(s["peak_anonymous_bytes"] for s in samples["pack"]),
        "samples": samples,
    }


def machine() -> dict[str, object]:
    """Say what this was measured on."""
    facts = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "torch", "torchao", "gguf", "executorch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="GGUF files and quantized checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="on the disk to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(pack_here(options.sources[0], options.child)))
        return
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "results": [measure(source, options.folder, options.runs) for source in options.sources],
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
