"""What `g4 doctor` finds: on this machine, on one with a GPU (a driver library made for the test), on broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.doctor import gpu, machine
from gemma4cli.doctor.check import Check, Purpose
from gemma4cli.export.bundle import BundleManifest, KVRecord, MemoryRecord, open_bundle, write_manifest
from gemma4cli.export.contract import Contract
from gemma4cli.inspection.gpus import find_gpu

DRIVER = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = CUDA; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Test GPU", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? MAJOR : attribute == 76 ? 0 : 232448;
  return 0;
}
"""
FREE_MIB = 20480
GIB = 1 << 30


def make_bundle(folder: Path, backend: str = "cpu", targets: tuple[str, ...] = ("cpu",), memory: int = 1000) -> Path:
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"program")

    def manifest(files: dict[str, Any]) -> BundleManifest:
        contract = Contract(64, 8, 100, 4, 11, eos_ids=(1, 6), bos_id=2)
        caches = {"full": KVRecord("float32", 1, 64, 4096)}
        return BundleManifest({}, {}, backend, targets, contract, caches, MemoryRecord(memory, 0, 0), files=files)

    write_manifest(folder, manifest)
    return folder


def make_driver(folder: Path, *, cuda: int = 13000, major: int = 9) -> Path:
    """A folder with NVIDIA's driver library and nvidia-smi, as far as `g4 doctor` asks them."""
    folder.mkdir()
    (folder / "driver.c").write_text(DRIVER)
    build = ["cc", "-shared", "-fPIC", f"-DCUDA={cuda}", f"-DMAJOR={major}", folder / "driver.c"]
    subprocess.run([*build, "-o", folder / "libcuda.so.1"], check=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho {FREE_MIB}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def examine(*arguments: str | Path, home: Path, driver: Path | None = None, **environment: str) -> tuple[int, Any]:
    """Run `g4 doctor --json` in a process of its own, with the driver that it is to find."""
    inherited = {**os.environ, "G4_HOME": str(home), **environment}
    inherited["LD_LIBRARY_PATH"] = str(driver or "")
    if driver is not None:
        inherited["PATH"] = f"{driver}:{inherited['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "gemma4cli", "doctor", *map(str, arguments), "--json"],
        env=inherited, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in document["checks"]} | {"": document}


def needs(checks: Any) -> set[str]:
    return {name for name, check in checks.items() if name and check["needed"] and check["state"] == "missing"}


def test_this_machine_is_ready_to_work_and_to_export(tmp_path: Path) -> None:
    code, checks = examine("--target", "cpu,sm_90", home=tmp_path)
    assert (code, needs(checks)) == (0, set())
    for name in ("runner", "torch", "compiler versions", "c++ compiler", "cuda headers", "libcuda stub"):
        assert checks[name]["state"] == "ok"
        assert checks[name]["needed"]
    assert checks[""]["targets"] == ["cpu", "sm_90"]
    assert not checks["driver"]["needed"]


def test_whatever_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    _, checks = examine(home=tmp_path, PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert {"c++ compiler", "cuda headers", "libcuda stub"} <= {n for n, c in checks.items() if n and c["do"]}
    for check in checks[""]["checks"]:
        assert (check["do"] is None) == (check["state"] == "ok"), check


def test_a_bundle_for_the_cpu_needs_the_runner_and_memory(tmp_path: Path) -> None:
    code, checks = examine(make_bundle(tmp_path / "bundle"), home=tmp_path)
    assert (code, needs(checks)) == (0, set())
    assert {name for name, check in checks.items() if name and check["needed"]} == {"bundle", "runner", "memory"}
    code, checks = examine(make_bundle(tmp_path / "large", memory=1 << 50), home=tmp_path)
    assert (code, needs(checks)) == (1, {"memory"})
    assert checks["memory"]["do"].startswith("The bundle takes 1024 TiB. ")


def test_a_bundle_for_a_gpu_needs_driver_card_memory_and_delegate(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "cuda", ("sm_90",), 15 * GIB)
    code, checks = examine(bundle, home=tmp_path)
    assert code == 1
    assert needs(checks) >= {"driver", "gpu", "gpu memory"}
    code, checks = examine(bundle, home=tmp_path, driver=make_driver(tmp_path / "driver"))
    assert checks["driver"]["found"].startswith("CUDA 13.0")
    assert checks["gpu"]["found"].startswith("Test GPU: sm_90, 24")
    assert checks["gpu memory"]["found"] == "20.0 GiB free"
    assert needs(checks) <= {"cuda delegate"}
    assert code == len(needs(checks))


def test_a_gpu_that_does_not_fit_the_bundle_says_why(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "cuda", ("sm_90",), 23 * GIB)
    code, checks = examine(bundle, home=tmp_path, driver=make_driver(tmp_path / "old", cuda=12040, major=8))
    assert code == 1
    assert "580 or later" in checks["driver"]["do"]
    assert checks["gpu"]["found"].endswith("the bundle is for sm_90")
    assert checks["gpu"]["do"] == "g4 export --target sm_80"
    assert "The bundle takes 23." in checks["gpu memory"]["do"]


def test_broken_tools_and_a_broken_runner_are_found(tmp_path: Path) -> None:
    runner = tmp_path / "g4-runner"
    runner.write_text("#!/bin/sh\necho 'libexecutorch.so: cannot open' >&2\nexit 127\n")
    runner.chmod(0o755)
    code, checks = examine("--target", "sm_80", home=tmp_path, PATH=str(tmp_path), G4_RUNNER=str(runner))
    assert code == 1
    assert needs(checks) == {"runner", "c++ compiler", "libcuda stub"}
    assert checks["runner"]["found"].endswith("libexecutorch.so: cannot open")
    assert checks["c++ compiler"]["do"] == "apt install binutils g++"


def test_a_damaged_bundle_is_a_check_and_not_an_error(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.pte").write_bytes(b"pro")
    code, checks = examine(bundle, home=tmp_path)
    assert (code, needs(checks)) == (1, {"bundle"})
    assert "incomplete or damaged" in checks["bundle"]["found"]


def test_without_a_bundle_the_last_one_is_taken_and_people_get_a_verdict(g4: Callable[..., Any], tmp_path: Path,
                                                                         workspace_root: Path) -> None:  # fmt: skip
    from gemma4cli.workspace import Workspace

    bundle = make_bundle(tmp_path / "bundle")
    Workspace(workspace_root).remember("bundle", bundle)
    outcome = g4("doctor")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"Ready to run {bundle}."
    assert f"Using {bundle}" in outcome.err
    assert g4("doctor", "--quiet").out == "ok\n"
    (bundle / "g4.json").write_text("{")
    outcome = g4("doctor")
    assert outcome.code == 1
    assert outcome.out.splitlines()[-1] == f"To run {bundle}, this lacks: bundle."
    assert g4("doctor", "--target", "sm_91").code == 2


@pytest.mark.parametrize(("name", "text", "limit"), [
    ("memory.max", "max\n", None), ("memory.max", "1048576\n", 1 << 20),
    ("memory/memory.limit_in_bytes", "9223372036854771712\n", None), ("memory/memory.limit_in_bytes", "4096\n", 4096),
])  # fmt: skip
def test_a_containers_memory_limit_counts(tmp_path: Path, name: str, text: str, limit: int | None) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert machine.memory_limit(tmp_path) == limit
    purpose = Purpose(open_bundle(make_bundle(tmp_path / "bundle", memory=2 << 20)))
    assert machine.check_memory(purpose, tmp_path).fails == (limit is not None)


def test_small_or_absent_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path).state == "ok"
    assert machine.check_shared_memory(tmp_path / "absent").state == "warning"


def test_cdi_specifications_are_found_by_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("container", raising=False)

    def look(card: Any = None) -> Check:
        return gpu.check_cdi(card, [tmp_path / "cdi", tmp_path / "absent"], [tmp_path / "mark"])

    assert look().state == "missing"
    assert look().do.endswith("on a host with a GPU")
    assert look(find_gpu("h200")).do.endswith("nvidia.yaml")
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi" / "other.yaml").write_text("kind: example.com/net\n")
    assert look().state == "missing"
    for name, text in (
        ("a.yaml", "---\ncdiVersion: 0.5.0\nkind: nvidia.com/gpu\n"),
        ("b.json", '{"kind": "nvidia.com/gpu"}'),
    ):
        (tmp_path / "cdi" / name).write_text(text)
        assert look().found == str(tmp_path / "cdi" / name)
        (tmp_path / "cdi" / name).unlink()
    (tmp_path / "mark").touch()
    assert "container" in look().found
    (tmp_path / "mark").unlink()
    monkeypatch.setenv("container", "podman")
    assert "container" in look().found
