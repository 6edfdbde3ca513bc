"""What pyproject.toml promises, and what an installation holds."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

import gemma4cli
from gemma4cli import native

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DISTRIBUTION_OF = {"huggingface_hub": "huggingface-hub", "pynvml": "nvidia-ml-py"}


def dependency_names(specifiers: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", specifier).group() for specifier in specifiers}


def imported_packages(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"__future__", "gemma4cli"}


def test_everything_the_package_imports_is_declared_and_bounded() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    specifiers = PYPROJECT["project"]["dependencies"] + [s for name in extras if name != "test" for s in extras[name]]
    declared = dependency_names(specifiers)
    imported = {DISTRIBUTION_OF.get(name, name) for name in imported_packages(ROOT / "gemma4cli")}
    assert imported <= declared
    for specifier in specifiers:
        assert "==" in specifier or ("<" in specifier and ">=" in specifier), specifier


def test_the_installed_version_is_the_packages_own() -> None:
    assert importlib.metadata.version("gemma4cli") == gemma4cli.__version__


def runtime_paths(file: Path) -> list[str]:
    with open(file, "rb") as stream:
        dynamic = ELFFile(stream).get_section_by_name(".dynamic")
        return next(dynamic.iter_tags("DT_RUNPATH")).runpath.split(":")


def test_the_installation_holds_the_runner_and_its_library_beside_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("G4_RUNNER", raising=False)
    runner, library = native.find_runner(), native.find_kernel_library()
    for file in (runner, library):
        paths = [Path(path.replace("$ORIGIN", str(file.resolve().parent))) for path in runtime_paths(file)]
        assert any((path / "libexecutorch.so").is_file() for path in paths)
        assert all(path.startswith("$ORIGIN") for path in runtime_paths(file))


def test_the_runner_command_works_from_anywhere(tmp_path: Path) -> None:
    """The command and the program have the same name; it once started itself instead, for ever."""
    command = [Path(sys.executable).parent / "g4-runner", "--version"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout) == (0, f"g4-runner {gemma4cli.__version__}\n")


def test_the_source_distribution_holds_the_sources_and_data_and_no_more(tmp_path: Path) -> None:
    from scikit_build_core.build import build_sdist

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = build_sdist(str(tmp_path))
    finally:
        os.chdir(before)
    with tarfile.open(tmp_path / name) as archive:
        files = {member.name.split("/", 1)[1] for member in archive.getmembers()}
    for needed in ("pyproject.toml", "runner/CMakeLists.txt", "runner/ops/attention_kernel.cpp"):
        assert needed in files
    kinds = {".toml", ".jinja", ".json", ".py", ".safetensors"}
    package = [path for path in (ROOT / "gemma4cli").rglob("*") if path.suffix in kinds]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= files
    assert {file.split("/")[0] for file in files if "/" in file} == {"docs", "gemma4cli", "runner"}


def test_a_build_without_executorch_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CMAKE_PREFIX_PATH", None)
    command = [Path(sysconfig.get_path("scripts")) / "cmake", "-S", ROOT / "runner", "-B", tmp_path / "build"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode != 0
    assert "pip install executorch==1.5.1" in " ".join(finished.stderr.split())
