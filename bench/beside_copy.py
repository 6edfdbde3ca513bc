"""What the benchmarks share that time a command beside a plain copy of its source on the same disk, in turns.

Both end with the data on the disk (`cp && sync`). The source is read once before, so that both find it cached (or
neither does, when it is larger than memory). What is measured runs in a process of its own and measures itself: peak
memory is that process's `VmHWM` (the `ru_maxrss` that a parent is told begins with the parent's own). CPU seconds and
the load average are reported too: on a machine that others use, wall times say little.
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
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemma4cli.files import write_json

Sample = dict[str, Any]


def arguments(description: str, source: str, **options: Any) -> argparse.ArgumentParser:
    """Return a parser with what all of these benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(source, type=Path, **options)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="on the disk to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def files_of(source: Path) -> list[Path]:
    return [source] if source.is_file() else [path for path in source.iterdir() if path.is_file()]


def in_turns(source: Path, folder: Path, runs: int, work: Callable[[Path], Sample], target: Path) -> dict[str, Any]:
    """Copy `source` and call `work(target)` `runs` times each, and remove what they made.

    Returns sizes, the samples of both, and the ratio of their median times.
    """
    copied = folder / "bench-copy"
    for path in files_of(source):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    samples: dict[str, list[Sample]] = {"copy": [], "work": []}
    try:
        for _ in range(runs):
            samples["copy"].append(_copy(source, copied))
            _remove(copied)
            samples["work"].append(work(target))
            _remove(target)
    finally:
        _remove(copied)
        _remove(target)
    copy_s, work_s = (statistics.median(sample["wall_s"] for sample in samples[name]) for name in ("copy", "work"))
    return {
        "source": source.name,
        "source_bytes": sum(path.stat().st_size for path in files_of(source)),
        "copy_s": copy_s,
        "work_s": work_s,
        "time_over_copy": round(work_s / copy_s, 3),
        "rate_over_copy": round(copy_s / work_s, 3),
        "peak_rss_bytes": max(sample["peak_rss_bytes"] for sample in samples["work"]),
        "samples": samples,
    }


def run_child(script: str, source: Path, target: Path) -> Sample:
    """Run a script's own `--child` and return what it prints, and how long it took with its start."""
    sample, output = _timed([sys.executable, script, source, "--child", target])
    return {**sample, **json.loads(output)}


def usage() -> Sample:
    """Return CPU seconds and peak memory of this process so far, including threads and ended children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status").read_text()
    return {
        "user_s": round(own.ru_utime + children.ru_utime, 2),
        "system_s": round(own.ru_stime + children.ru_stime, 2),
        "peak_rss_bytes": int(status.partition("VmHWM:")[2].split()[0]) << 10,
    }


def report(out: Path | None, packages: Sequence[str], result: dict[str, Any]) -> None:
    """Print a result with the command and the machine, and write it to `out`."""
    document = {"command": " ".join(["python", *sys.argv]), "machine": _machine(packages), **result}
    if out:
        write_json(out, document)
    print(json.dumps(document, indent=2))


def _copy(source: Path, target: Path) -> Sample:
    before = usage()
    sample, _ = _timed(["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync -f "$1"', source, target])
    after = usage()
    return {**sample, **{key: round(after[key] - before[key], 2) for key in ("user_s", "system_s")}}


def _timed(command: list[str | Path]) -> tuple[Sample, str]:
    os.sync()
    load, started = os.getloadavg()[0], time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"wall_s": round(time.perf_counter() - started, 2), "load_before": round(load, 2)}, process.stdout


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _machine(packages: Sequence[str]) -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
