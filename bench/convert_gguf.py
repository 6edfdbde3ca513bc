"""Time `g4 convert-gguf` beside a plain copy of the same file on the same disk, in turns.

    python bench/convert_gguf.py model.gguf --folder /tmp --runs 3 --out bench/results/convert-gguf.json

Both end with the data on the disk (`cp && sync`; a conversion syncs every file). Each conversion is a fresh `g4`
process, start-up included; its peak memory is the operating system's own count. The file has been read once, so that
both find it cached (or neither does, when it is larger than memory). CPU seconds and the load average are reported too:
on a machine that others use, wall times say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from gemma4cli.files import write_json


def timed(command: list[str | Path]) -> dict[str, float]:
    """Run a command and return wall and CPU seconds, and peak resident bytes."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    return {
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def measure(file: Path, folder: Path, runs: int) -> dict[str, object]:
    """Copy and convert `runs` times each, in turns."""
    copy, target = folder / "bench-copy.gguf", folder / "bench-checkpoint"
    convert = [sys.executable, "-m", "gemma4cli", "convert-gguf", file, "-o", target, "--quiet"]
    samples: dict[str, list[dict[str, float]]] = {"copy": [], "convert": []}
    timed(["cat", file])
    try:
        for _ in range(runs):
            samples["copy"].append(timed(["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', file, copy]))
            copy.unlink()
            samples["convert"].append({**timed(convert), "load_average": round(os.getloadavg()[0], 2)})
            manifest = json.loads((target / "g4.json").read_text())
            shutil.rmtree(target)
    finally:
        copy.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
    size = file.stat().st_size
    rates = {name: size / statistics.median(s["wall_s"] for s in found) for name, found in samples.items()}
    return {
        "file_bytes": size,
        "checkpoint_bytes": manifest["totals"]["weight_bytes"],
        "types": manifest["recipe"]["types"],
        "exact_tensors": sum(not record["relative_error"] for record in manifest["tensors"].values()),
        "tensors": len(manifest["tensors"]),
        "copy_bytes_per_s": round(rates["copy"]),
        "convert_bytes_per_s": round(rates["convert"]),
        "convert_over_copy": round(rates["convert"] / rates["copy"], 3),
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in samples["convert"]),
        "samples": samples,
    }


def machine() -> dict[str, object]:
    """Say what this was measured on."""
    facts = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "sha_instructions": "sha_ni" in facts,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "torch", "torchao", "gguf")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="on the disk to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    result |= measure(options.file, options.folder, options.runs)
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
