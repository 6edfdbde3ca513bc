"""The machine a measurement was made on: what it is, and what its GPU was doing meanwhile.

A GPU's clocks, temperature and energy come from NVML through the optional package `nvidia-ml-py`; without it, or where
a GPU does not give a value, the field is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gemma4cli
from gemma4cli.benchmark.samples import GpuState

_PACKAGES = ("torch", "executorch", "torchao", "triton")
_SOURCE_TREE = Path(gemma4cli.__file__).resolve().parent.parent


class Gpu:
    """One GPU through NVML. Use `Gpu.open`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self.name = _text(nvml.nvmlDeviceGetName(handle))
        self.driver = _text(nvml.nvmlSystemGetDriverVersion())

    @classmethod
    def open(cls, say: Callable[[str], None]) -> Gpu | None:
        """Find the GPU that CUDA sees first; None, said once through `say`, when NVML is not there."""
        try:
            import pynvml
        except ImportError:
            say("nvidia-ml-py is not installed: no GPU clocks, temperature, energy (pip install 'gemma4cli[nvml]').")
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _visible_device(pynvml))
        except pynvml.NVMLError as error:
            say(f"NVML does not answer ({error}): no GPU clocks, temperature, energy.")
            return None

    def read(self) -> GpuState:
        nvml, handle = self._nvml, self._handle

        def ask(question: Callable[..., Any], *arguments: Any) -> Any:
            with contextlib.suppress(nvml.NVMLError):
                return question(handle, *arguments)
            return None

        power_mw = ask(nvml.nvmlDeviceGetPowerUsage)
        energy_mj = ask(nvml.nvmlDeviceGetTotalEnergyConsumption)
        memory = ask(nvml.nvmlDeviceGetMemoryInfo)
        return GpuState(
            sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            energy_j=None if energy_mj is None else energy_mj / 1000,
            used_bytes=None if memory is None else int(memory.used),
        )


def describe_environment(gpu: Gpu | None) -> dict[str, Any]:
    """Everything about machine and software that a number depends on."""
    import psutil

    return {
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "g4": gemma4cli.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "os": platform.platform(),
        "cpu_info": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu_info": gpu.name if gpu else "",
        "gpu_driver": gpu.driver if gpu else None,
    }


def cpu_name() -> str:
    """Return the CPU's own name, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def source_commit() -> str | None:
    """Return the commit of the source tree that this g4 runs from, with + when it has changes.

    Installed, it is what G4_COMMIT says, which a container sets, else None.
    """
    if not (_SOURCE_TREE / ".git").exists():
        return os.environ.get("G4_COMMIT") or None
    try:
        answers = [
            subprocess.run(["git", "-C", str(_SOURCE_TREE), *arguments], capture_output=True, text=True, check=True)
            for arguments in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")


def _visible_device(nvml: Any) -> Any:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    return nvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdigit() else nvml.nvmlDeviceGetHandleByUUID(first)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
