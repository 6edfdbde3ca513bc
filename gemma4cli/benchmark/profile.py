"""Where the time of one step goes, from torch's profiler: matrix products, attention, norms, and everything else.

The model's own modules say what an operator belongs to: every linear layer, norm and attention call opens a scope, and
an operator counts for the innermost one around it. On a GPU the times are those of the kernels, and what is left of
the step is gaps, in which the GPU waits; on a CPU it is Python between the operators.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4cli.benchmark.plan import Case, Plan
from gemma4cli.benchmark.subject import CheckpointSubject
from gemma4cli.errors import G4Error
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from gemma4cli.engine.eager import EagerEngine

GROUPS = ("matvec", "attention", "norm", "other")
_SCOPE = "g4."
_TOP = 8


@dataclass(frozen=True)
class Work:
    """One operator or kernel: its name, group and seconds."""

    name: str
    group: str
    seconds: float


def profile_steps(
    subject: CheckpointSubject, plan: Plan, threads: int | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Profile one step of every test of a plan: a whole chunk of prompt, or one decoded token.

    Returns: `model`, and `steps`: per test the seconds of a step, of each group, launches (of operators on a CPU, of
        kernels on a GPU) and gaps.
    Raises: G4Error with --compile, whose fused kernels belong to no module.
    """
    if subject.compile:
        raise G4Error("--profile tells modules apart, which --compile fuses.", hint="Leave --compile away.")
    loaded = subject.load(threads, progress)
    with loaded.engine as engine:
        model_tests = [test for test in plan.tests if test.path == "model"]
        with progress.phase("profile", len(model_tests), "steps") as task, _scopes(engine.model):
            steps = []
            for test in model_tests:
                task.advance(0, test.name)
                steps.append(_profile(engine, test, plan.repeats))
                task.advance(1)
    return {"model": subject.describe(), "threads": loaded.threads, "steps": steps}


def summarize(work: Sequence[Work], seconds: float) -> dict[str, Any]:
    """Add up one step: seconds of each group, what no operator accounts for, and the longest by name."""
    groups = {group: sum(item.seconds for item in work if item.group == group) for group in GROUPS}
    names: dict[tuple[str, str], list[float]] = {}
    for item in work:
        names.setdefault((item.name, item.group), []).append(item.seconds)
    longest = sorted(names.items(), key=lambda entry: -sum(entry[1]))[:_TOP]
    return {
        "groups": groups,
        "gap_s": max(0.0, seconds - sum(groups.values())),
        "launches": len(work),
        "top": [
            {"name": name, "group": group, "count": len(times), "seconds": sum(times)}
            for (name, group), times in longest
        ],
    }


def _profile(engine: EagerEngine, test: Case, repeats: int) -> dict[str, Any]:
    """Profile a step at the test's depth; its duration is the median of steps without the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports every start and stop on stderr
    import torch
    from torch.profiler import ProfilerActivity, profile

    device = engine.model.model.embed_tokens.embed_scale.device
    count = 1 if test.n_gen else min(test.n_prompt, engine.model.cache.prefill_chunk)
    tokens = torch.ones(1, count, dtype=torch.int64, device=device)
    positions = torch.arange(test.n_depth, test.n_depth + count, device=device)

    @torch.no_grad()
    def step() -> float:
        started = time.perf_counter()
        engine.model(tokens, positions)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    step()
    seconds = sorted(step() for _ in range(repeats))[repeats // 2]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        profiled = step()
    work = list(_work(profiler.events(), on_gpu=device.type == "cuda"))
    if device.type == "cpu":
        # The profiler's own cost falls on every operator; a step without it is what the shares are of.
        work = [Work(item.name, item.group, item.seconds * seconds / profiled) for item in work]
    launched = "operators" if device.type == "cpu" else "kernel launches"
    return {"test": test.name, "tokens": count, "seconds": seconds, "launched": launched, **summarize(work, seconds)}


def _work(events: Sequence[Any], *, on_gpu: bool) -> Iterator[Work]:
    for event in events:
        if event.name.startswith(_SCOPE):
            continue
        if on_gpu:
            for kernel in event.kernels:
                yield Work(kernel.name, _group(event), kernel.duration / 1e6)
        elif event.self_cpu_time_total > 0:
            yield Work(event.name, _group(event), event.self_cpu_time_total / 1e6)


def _group(event: Any) -> str:
    """Find the innermost scope around an operator."""
    around = event.cpu_parent
    while around is not None:
        if around.name.startswith(_SCOPE):
            return around.name.removeprefix(_SCOPE)
        around = around.cpu_parent
    return "other"


@contextlib.contextmanager
def _scopes(model: torch.nn.Module) -> Iterator[None]:
    """Wrap every linear layer, norm and attention call of a model in a profiler scope."""
    from torch import nn
    from torch.profiler import record_function

    from gemma4cli.model.layers import Attention, RMSNorm

    def scoped(call: Callable[..., Any], group: str) -> Callable[..., Any]:
        def inside(*arguments: Any, **options: Any) -> Any:
            with record_function(_SCOPE + group):
                return call(*arguments, **options)

        return inside

    plain: list[tuple[nn.Module, str, Callable[..., Any]]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | RMSNorm):
            plain.append((module, "forward", module.forward))
            module.forward = scoped(module.forward, "norm" if isinstance(module, RMSNorm) else "matvec")
        if isinstance(module, Attention):
            plain.append((module, "attend", module.attend))
            module.attend = scoped(module.attend, "attention")
    try:
        yield
    finally:
        for module, name, call in plain:
            setattr(module, name, call)
