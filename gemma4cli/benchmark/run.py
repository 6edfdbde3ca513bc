"""One benchmark from beginning to end: load, roofline, rounds, comparison; gives one document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4cli.benchmark.bandwidth import measure_bandwidth
from gemma4cli.benchmark.device import Gpu, describe_environment
from gemma4cli.benchmark.measure import Measured, Probe, measure
from gemma4cli.benchmark.plan import Case, Plan
from gemma4cli.benchmark.roofline import Roofline
from gemma4cli.benchmark.samples import Row, mean_and_deviation, percentile, spread
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from gemma4cli.benchmark.llama_bench import LlamaBench
    from gemma4cli.benchmark.subject import LoadedSubject, Subject

Document = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What is known before the first test: environment, subject, engine, roofline."""

    environment: Document
    subject: Document
    engine: Document
    roofline: Roofline
    bandwidth_note: str | None

    def to_json(self) -> Document:
        return {
            "environment": self.environment,
            "model": self.subject,
            "engine": self.engine,
            "roofline": {**self.roofline.to_json(), "note": self.bandwidth_note},
        }


def run_benchmark(
    subject: Subject,
    plan: Plan,
    *,
    threads: int | None = None,
    rival: LlamaBench | None = None,
    announce: Callable[[Head], None] = lambda head: None,
    progress: Progress = SILENT,
) -> Document:
    """Measure everything a plan asks for.

    announce: called with what is known before the tests begin.
    Returns: `environment`, `model`, `engine`, `roofline`, `memory`, `complete`, `tests` (one record per test, with
        llama-bench's field names where it has the same) and `versus`.
    """
    from gemma4cli.model.chat import Chat

    needs_text = any(test.path == "text" for test in plan.tests)
    chat = Chat.from_dir(subject.path) if needs_text else None
    gpu = None if subject.device == "cpu" else Gpu.open(progress.note)
    idle = gpu.read() if gpu else None
    loaded = subject.load(threads, progress)
    with loaded.engine:
        head = _head(subject, loaded, plan, gpu)
        announce(head)
        probe = Probe(loaded.engine, subject.config.vocab_size, chat, gpu)
        if rival is not None:
            rival.threads = loaded.threads if threads is None else threads
        measured = measure(plan, probe, between_rounds=rival.run_round if rival else None, progress=progress)
        device_bytes = probe.peaks.device_bytes
        if device_bytes is None and idle is not None and idle.used_bytes is not None:
            seen = [s.gpu.used_bytes for row in measured.rows for s in row.samples if s.gpu and s.gpu.used_bytes]
            device_bytes = max(seen, default=idle.used_bytes) - idle.used_bytes
    return {
        **head.to_json(),
        "memory": {"peak_host_bytes": probe.peaks.host_bytes, "peak_device_bytes": device_bytes},
        "complete": measured.complete,
        "repeats": plan.repeats,
        "warmup": plan.warmup,
        "tests": [record(row, head) for row in measured.rows],
        "versus": rival.to_json(_medians(measured)) if rival and rival.rates else None,
    }


def record(row: Row, head: Head) -> Document:
    """One test as a flat record: llama-bench's fields first, then ours."""
    test, samples = row.test, row.samples
    nanoseconds = [round(1e9 * sample.seconds) for sample in samples]
    average_ns, deviation_ns = mean_and_deviation([float(value) for value in nanoseconds])
    average, deviation = mean_and_deviation(row.rates)
    bound = head.roofline.bound(test) if test.path == "model" else None
    joules = [sample.joules / test.tokens for sample in samples if sample.joules is not None]
    states = [sample.gpu for sample in samples if sample.gpu is not None]
    return {
        "build_commit": head.environment["commit"],
        "cpu_info": head.environment["cpu_info"],
        "gpu_info": head.environment["gpu_info"],
        "backends": head.engine["backends"],
        "model_filename": head.subject["path"],
        "model_type": head.subject["type"],
        "model_size": head.subject["weight_bytes"],
        "model_n_params": head.subject["parameters"],
        "n_batch": head.engine["chunk"],
        "n_ubatch": head.engine["chunk"],
        "n_threads": head.engine["threads"],
        "type_k": head.subject["kv_format"],
        "type_v": head.subject["kv_format"],
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": head.environment["test_time"],
        "avg_ns": round(average_ns),
        "stddev_ns": round(deviation_ns),
        "avg_ts": average,
        "stddev_ts": deviation,
        "samples_ns": nanoseconds,
        "samples_ts": row.rates,
        "test": test.name,
        "path": test.path,
        **{f"{name}_version": head.environment[name] for name in ("g4", "torch", "executorch")},
        "n_ctx": head.subject["context_length"],
        **{f"{name}_ts": value for name, value in spread(row.rates).items()},
        "ttft_s": spread([sample.ttft_s for sample in samples if sample.ttft_s is not None]),
        "decode_ts": spread([(test.n_gen - 1) / sample.decode_s for sample in samples if sample.decode_s]),
        "bytes_per_token": head.roofline.traffic.bytes_per_token(test) if test.n_gen else None,
        "bound_ts": bound,
        "of_bound": percentile(row.rates, 50) / bound if bound else None,
        "joules_per_token": spread(joules)["median"],
        "sm_clock_mhz": spread([s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None])["median"],
        "temperature_c": max((s.temperature_c for s in states if s.temperature_c is not None), default=None),
    }


def _head(subject: Subject, loaded: LoadedSubject, plan: Plan, gpu: Gpu | None) -> Head:
    roofline, note = _roofline(subject, loaded, plan)
    described = subject.describe()
    kind = f"gemma4 {_billions(described['parameters'])}" + (f" {subject.recipe}" if subject.recipe else "")
    return Head(
        environment=describe_environment(gpu),
        subject={**described, "type": kind},
        engine={
            "name": subject.engine_name,
            "backends": loaded.backends,
            "threads": loaded.threads,
            "chunk": loaded.chunk,
            "load_s": loaded.load_s,
        },
        roofline=roofline,
        bandwidth_note=note,
    )


def _roofline(subject: Subject, loaded: LoadedSubject, plan: Plan) -> tuple[Roofline, str | None]:
    decoding = [test for test in plan.tests if test.n_gen]
    if subject.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            return Roofline(loaded.traffic, None), "This Python's torch sees no GPU: its bandwidth is not measured."
    read = loaded.traffic.bytes_per_token(min(decoding)) if decoding else loaded.traffic.weight_bytes
    return Roofline(loaded.traffic, measure_bandwidth(read, subject.device, loaded.threads)), None


def _medians(measured: Measured) -> dict[Case, float]:
    return {row.test: percentile(row.rates, 50) for row in measured.rows if row.test.path == "model" and row.samples}


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
