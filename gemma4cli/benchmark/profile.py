"""Where the time of one step goes, from torch's profiler: matrix products, attention, norms, and everything else.

In a checkpoint's model the modules say what an operator belongs to: every linear layer, norm and attention call opens
a scope, and an operator counts for the innermost one around it. In a compiled bundle the kernels' names say it. On a
GPU the times are those of the kernels, and what is left of the step is gaps, in which the GPU waits; on a CPU it is
Python between the operators.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4cli.benchmark.measure import Probe
from gemma4cli.benchmark.plan import Case, Plan
from gemma4cli.benchmark.subject import CheckpointSubject, LoadedSubject, Subject
from gemma4cli.errors import G4Error
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

GROUPS = ("matvec", "attention", "norm", "other")
_SCOPE = "g4."
_TOP = 8
_KERNELS = (
    (re.compile(r"^(matvec|matmul|quantize_rows)"), "matvec"),
    (re.compile(r"^(attend|split|combine)"), "attention"),
    (re.compile(r"rsqrt|norm"), "norm"),
)
"""Names in gemma4cli/kernels, and parts of the names that Inductor gives."""


@dataclass(frozen=True)
class Work:
    """One operator or kernel: its name, group and seconds."""

    name: str
    group: str
    seconds: float


def profile_steps(subject: Subject, plan: Plan, threads: int | None, progress: Progress = SILENT) -> dict[str, Any]:
    """Profile one step of every test of a plan: a whole chunk of prompt, or one decoded token.

    Returns: `model`, and `steps`: per test the seconds of a step, of each group, launches (of operators on a CPU, of
        kernels on a GPU) and gaps.
    Raises: G4Error for what does not run in PyTorch, and with --compile, whose fused kernels belong to no module.
    """
    if subject.engine_name == "runner":
        raise G4Error(
            "--profile looks into PyTorch, and the runner is outside of it.",
            hint="Name a checkpoint: g4 bench CHECKPOINT --profile. For a CUDA bundle: --engine torch.",
        )
    if isinstance(subject, CheckpointSubject) and subject.compile:
        raise G4Error("--profile tells modules apart, which --compile fuses.", hint="Leave --compile away.")
    loaded = subject.load(threads, progress)
    with loaded.engine as engine, contextlib.ExitStack() as stack:
        if isinstance(subject, CheckpointSubject):
            stack.enter_context(_scopes(engine.model))
        model_tests = [test for test in plan.tests if test.path == "model"]
        task = stack.enter_context(progress.phase("profile", len(model_tests), "steps"))
        probe = Probe(engine, subject.config.vocab_size)
        probe.begin_round(subject.context_length)
        steps = []
        for test in model_tests:
            task.advance(0, test.name)
            steps.append(_profile(subject, loaded, probe, test, plan.repeats))
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


def _profile(subject: Subject, loaded: LoadedSubject, probe: Probe, test: Case, repeats: int) -> dict[str, Any]:
    """Profile a step at the test's depth; its duration is the median of steps without the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports every start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    on_gpu = subject.device != "cpu"
    step = Case(test.n_depth, 0 if test.n_gen else min(test.n_prompt, loaded.chunk), 1 if test.n_gen else 0)
    probe.run(step)
    seconds = sorted(probe.run(step).seconds for _ in range(repeats))[repeats // 2]
    timed = probe.prepare(step)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        profiled = timed().seconds
    find = _operators if not on_gpu else _kernels_of_operators if subject.engine_name == "eager" else _kernels_of_graphs
    work = list(find(profiler.events()))
    if not on_gpu:
        # The profiler's own cost falls on every operator; a step without it is what the shares are of.
        work = [Work(item.name, item.group, item.seconds * seconds / profiled) for item in work]
    launched = "kernel launches" if on_gpu else "operators"
    summary = summarize(work, seconds)
    return {"test": test.name, "tokens": step.tokens, "seconds": seconds, "launched": launched, **summary}


def _operators(events: Sequence[Any]) -> Iterator[Work]:
    """What ran on the CPU, by the scope around it."""
    for event in events:
        if not event.name.startswith(_SCOPE) and event.self_cpu_time_total > 0:
            yield Work(event.name, _group(event), event.self_cpu_time_total / 1e6)


def _kernels_of_operators(events: Sequence[Any]) -> Iterator[Work]:
    """What ran on the GPU, by the scope around the operator that launched it."""
    for event in events:
        for kernel in event.kernels:
            yield Work(kernel.name, _group(event), kernel.duration / 1e6)


def _kernels_of_graphs(events: Sequence[Any]) -> Iterator[Work]:
    """What ran on the GPU, by its name: a CUDA graph launches it all at once, from nowhere in particular."""
    from torch.autograd import DeviceType

    for event in events:
        if event.device_type == DeviceType.CUDA:
            yield Work(event.name, group_of_kernel(event.name), event.time_range.elapsed_us() / 1e6)


def group_of_kernel(name: str) -> str:
    """Group a kernel of a compiled program by its name: our own kernels', else what Inductor says it fused."""
    for pattern, group in _KERNELS:
        if pattern.search(name):
            return group
    return "other"


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
