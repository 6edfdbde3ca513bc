"""Time a CPU bundle beside llama.cpp's llama-bench on a machine that is not quiet: wall clock and CPU time.

    python bench/cpu_beside_llama.py BUNDLE FILE.gguf --llama-bench PATH --threads 1,2 --out results.json

`g4 bench --vs` compares the wall clock. Where other work takes turns on the same cores, a turn missed counts as
slowness; what a program used of the processor does not depend on it (what both lose to a shared memory bus does).
So every sample has both: tokens per second, and tokens per second of one thread's CPU time, user and system. With one
thread the second is what a quiet core would give. With several, threads that spin while they wait count as busy, so
only the wall clock says something; run it when the machine is quiet.

Tests are those of `g4 bench`. llama-bench runs once per test and round, right after ours, and announces with
`--progress` when its timed run begins; its CPU time counts from there to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma4cli.benchmark.device import describe_environment
from gemma4cli.benchmark.measure import Probe
from gemma4cli.benchmark.plan import Case
from gemma4cli.engine.runner import RunnerEngine

TIMED_RUN = (": prompt run ", ": generation run ")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One run of a test; `load` is the machine's load average over a minute, at its end."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    user_s: float
    system_s: float
    load: float


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a running process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICKS_PER_S, int(fields[12]) / TICKS_PER_S


def sample(test: Case, rate: float, before: tuple[float, float], after: tuple[float, float]) -> Sample:
    user, system = (b - a for a, b in zip(before, after, strict=True))
    return Sample(rate, test.tokens / (user + system), user, system, os.getloadavg()[0])


def run_ours(probe: Probe, pid: int, test: Case) -> Sample:
    timed = probe.prepare(test)
    before = cpu_seconds(pid)
    seconds = timed().seconds
    return sample(test, test.tokens / seconds, before, cpu_seconds(pid))


def run_theirs(program: Path, gguf: Path, test: Case, threads: int) -> tuple[Sample, dict[str, Any]]:
    size = ["-p", str(test.n_prompt), "-n", str(test.n_gen)]
    command = [str(program), "-m", str(gguf), "-r", "1", "-o", "json", "--progress", "-ngl", "0", "-t", str(threads)]
    process = subprocess.Popen([*command, *size], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    before = None
    for line in process.stderr:
        if any(words in line for words in TIMED_RUN):
            before = cpu_seconds(process.pid)
    # It prints its result and frees the model; a process that ended and was not waited for still has its times.
    record = json.loads(process.stdout.read())[0]
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    after = cpu_seconds(process.pid)
    if process.wait() != 0 or before is None:
        raise SystemExit(f"{program} failed, or is too old to know --progress.")
    return sample(test, record["samples_ts"][0], before, after), record


def summary(samples: list[Sample]) -> dict[str, Any]:
    wall, cpu = [s.tokens_per_s for s in samples], [s.tokens_per_cpu_s for s in samples]
    return {
        "median_tokens_per_s": round(statistics.median(wall), 3),
        "best_tokens_per_s": round(max(wall), 3),
        "median_tokens_per_cpu_s": round(statistics.median(cpu), 3),
        "samples": [{name: round(value, 3) for name, value in asdict(s).items()} for s in samples],
    }


def measure(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Alternate both programs, test by test, after one untimed round of ours (llama-bench warms up by itself)."""
    tests = [Case(0, arguments.prompt, 0), Case(0, 0, arguments.gen)]
    ours: dict[Case, list[Sample]] = {test: [] for test in tests}
    theirs: dict[Case, list[Sample]] = {test: [] for test in tests}
    record: dict[str, Any] = {}
    with RunnerEngine(arguments.bundle, threads=threads) as engine:
        probe = Probe(engine, engine.contract["vocab_size"])
        pid = engine._process.pid
        for test in tests:
            run_ours(probe, pid, test)
        for _ in range(arguments.rounds):
            for test in tests:
                ours[test].append(run_ours(probe, pid, test))
                one, record = run_theirs(arguments.llama_bench, arguments.gguf, test, threads)
                theirs[test].append(one)
                print(f"{threads} threads, {test.name}: g4 {ours[test][-1]}, llama.cpp {one}", flush=True)
    rows = []
    for test in tests:
        mine, rival = summary(ours[test]), summary(theirs[test])
        names = ("median_tokens_per_s", "best_tokens_per_s", "median_tokens_per_cpu_s")
        ratios = {name: round(mine[name] / rival[name], 3) for name in names}
        rows.append({"test": test.name, "ratio": ratios, "g4": mine, "llama.cpp": rival})
    kept = ("build_commit", "model_type", "model_size", "type_k", "n_batch", "n_ubatch", "flash_attn")
    return {"threads": threads, "llama-bench": {name: record.get(name) for name in kept}, "tests": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [measure(arguments, int(threads)) for threads in arguments.threads.split(",")]
    document = {"environment": describe_environment(None), "gguf": arguments.gguf.name, "runs": runs}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
