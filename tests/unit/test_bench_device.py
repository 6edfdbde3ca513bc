"""The machine's account of itself, and a GPU's through an NVML that is there, silent, or missing."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest

from gemma4cli import __version__
from gemma4cli.benchmark import device
from gemma4cli.benchmark.device import Gpu, describe_environment
from gemma4cli.benchmark.samples import GpuState


class NVMLError(Exception):
    pass


def fake_nvml(**changes) -> types.ModuleType:
    """An NVML with one GPU; `changes` replace functions by name."""

    def refuse(*arguments):
        raise NVMLError("Not Supported")

    module = types.ModuleType("pynvml")
    functions = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"575.57.08",
        "nvmlDeviceGetHandleByIndex": lambda index: ("index", index),
        "nvmlDeviceGetHandleByUUID": lambda uuid: ("uuid", uuid),
        "nvmlDeviceGetName": lambda handle: f"GPU {handle[1]}",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980}[kind],
        "nvmlDeviceGetTemperature": lambda handle, kind: {0: 41}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 312_500,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7_000,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=1 << 30),
    }
    for name, function in {**functions, **{name: refuse for name, value in changes.items() if value is None}}.items():
        setattr(module, name, function)
    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = NVMLError, 1, 0
    return module


def test_a_gpu_tells_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu = Gpu.open(pytest.fail)
    assert gpu is not None
    assert (gpu.name, gpu.driver) == ("GPU 0", "575.57.08")
    assert gpu.read() == GpuState(1980, 41, 312.5, 7.0, 1 << 30)
    assert describe_environment(gpu)["gpu_info"] == "GPU 0"


@pytest.mark.parametrize(("visible", "name"), [("3,1", "GPU 3"), ("GPU-12ab", "GPU GPU-12ab"), ("", "GPU 0")])
def test_the_gpu_is_the_first_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, visible: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = Gpu.open(pytest.fail)
    assert gpu is not None and gpu.name == name


def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = fake_nvml(nvmlDeviceGetTotalEnergyConsumption=None, nvmlDeviceGetPowerUsage=None)
    monkeypatch.setitem(sys.modules, "pynvml", silent)
    gpu = Gpu.open(pytest.fail)
    assert gpu is not None
    assert gpu.read() == GpuState(1980, 41, None, None, 1 << 30)


def test_without_nvml_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpu.open(said.append) is None
    assert said == [
        "nvidia-ml-py is not installed: no GPU clocks, temperature, energy (pip install 'gemma4cli[nvml]')."
    ]
    said.clear()
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=None))
    assert Gpu.open(said.append) is None
    assert said == ["NVML does not answer (Not Supported): no GPU clocks, temperature, energy."]


def test_the_environment_names_what_numbers_depend_on() -> None:
    environment = describe_environment(None)
    assert environment["g4"] == __version__
    assert environment["torch"] and environment["executorch"] == "1.5.1"
    assert environment["memory_bytes"] == psutil.virtual_memory().total
    assert environment["cpu_info"]
    assert (environment["gpu_info"], environment["gpu_driver"]) == ("", None)


def test_the_commit_is_that_of_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(device, "_SOURCE_TREE", tmp_path)
    assert device.source_commit() is None
    git("init", "-q")
    assert device.source_commit() is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "--short=10", "HEAD")
    assert device.source_commit() == head
    (tmp_path / "a").write_text("2")
    assert device.source_commit() == f"{head}+"
