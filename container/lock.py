"""Pin everything the container installs, with hashes; `make lock` runs this.

    requirements.lock   all of g4 but torch: the same for both variants
    torch-cpu.lock      torch without CUDA, which is not on PyPI
    torch-cuda.lock     torch with CUDA, CUDA's libraries and its compiler, from PyPI
    runtime.lock        what running a bundle needs, no torch
    runtime-cuda.lock   what running a bundle on a GPU needs besides
    build.lock          what building packages needs
    sources.lock        requirements that come without a wheel

uv resolves for the container's Python and platform. `--check` resolves nothing and needs no network: it compares the
locks with pyproject.toml and with each other, which is what CI does.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_34"
ENVIRONMENT = {"python_version": PYTHON, "sys_platform": "linux", "platform_machine": "x86_64"}
COMPILER = "cuda-toolkit[nvcc]==13.0.3"
# What `gemma4cli[cuda]` installs to compile against; the rest of CUDA comes with torch and only with that.
HEADERS = {"cuda-toolkit", "nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-runtime"}
# tokenizers needs the Hub's client to download, which the runtime does not do.
RUNTIME = ("jinja2", "numpy", "psutil", "rich", "tokenizers", "typer")
RUNTIME_WITHOUT = ("huggingface-hub",)
RUNTIME_CUDA = ("nvidia-cuda-runtime",)
SOURCES = ("antlr4-python3-runtime",)
BUILD = ("cmake>=3.28,<5", "ninja", "setuptools", "uv", "wheel")
HEADER = "# Made by `make lock` (container/lock.py).\n"
_ENTRY = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)[^\n\\]*(?:\\\n +--hash=\w+:\w+ ?)*", re.MULTILINE)


def read_lock(text: str) -> dict[str, str]:
    """Return the entries of a lock by canonical name, each with its hashes, as they stand."""
    return {canonicalize_name(match["name"]): match[0] for match in _ENTRY.finditer(text)}


def version_of(entry: str) -> str:
    """Return the pinned version of an entry."""
    match = _ENTRY.match(entry)
    assert match is not None
    return match["version"]


def is_of_cuda(name: str) -> bool:
    """Whether a package belongs to torch's CUDA build only."""
    return name == "torch" or (name.startswith(("nvidia-", "cuda-")) and name not in HEADERS)


def wanted(pyproject: Path = PYPROJECT) -> dict[str, list[Requirement]]:
    """Return what each lock has to satisfy, by the lock's name."""
    document = tomllib.loads(pyproject.read_text())
    project = document["project"]
    direct = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["cuda"])]
    here = [requirement for requirement in direct if requirement.marker is None or _applies(requirement)]
    torch = [requirement for requirement in here if requirement.name == "torch"]
    names = {canonicalize_name(requirement.name): requirement for requirement in here}
    build = [Requirement(text) for text in (*document["build-system"]["requires"], *BUILD)]
    return {
        "requirements.lock": [requirement for requirement in here if requirement.name != "torch"],
        "torch-cpu.lock": torch,
        "torch-cuda.lock": [*torch, Requirement("nvidia-cuda-nvcc")],
        "runtime.lock": [names[name] for name in RUNTIME],
        "sources.lock": [Requirement(name) for name in SOURCES],
        "runtime-cuda.lock": [Requirement(name) for name in RUNTIME_CUDA],
        "build.lock": build,
    }


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate(dict(ENVIRONMENT))


def find_drift(folder: Path = FOLDER, pyproject: Path = PYPROJECT) -> list[str]:
    """Return, in sentences, where the locks do not fit pyproject.toml or each other."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for lock, requirements in wanted(pyproject).items():
        entries = read_lock((folder / lock).read_text()) if (folder / lock).is_file() else {}
        for requirement in requirements:
            entry = entries.get(canonicalize_name(requirement.name))
            if entry is None:
                problems.append(f"{lock} lacks {requirement.name}.")
            elif not requirement.specifier.contains(version_of(entry), prereleases=True):
                problems.append(f"{lock} has {requirement.name} {version_of(entry)}; {requirement} is wanted.")
        for name, entry in entries.items():
            if "--hash=sha256:" not in entry:
                problems.append(f"{lock} has no hash for {name}.")
            version = version_of(entry).split("+")[0]
            if seen.setdefault(name, version) != version:
                problems.append(f"{lock} has {name} {version}; another lock has {seen[name]}.")
    return problems


def resolve(requirements: Iterable[str], *options: str) -> dict[str, str]:
    """Have uv resolve requirements; return the lock's entries."""
    with tempfile.TemporaryDirectory() as folder:
        source, lock = Path(folder) / "requirements.in", Path(folder) / "lock"
        source.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--generate-hashes", "--no-annotate"]
        command += ["--no-header", "--python-version", PYTHON, "--python-platform", PLATFORM, "--quiet"]
        subprocess.run([*command, *options, "--output-file", lock, source], check=True)
        return read_lock(lock.read_text())


def make_locks(torch_cpu: str | None) -> None:
    """Write all locks. `torch_cpu` is the index, or a folder, with torch's builds for the CPU; None keeps that lock."""
    project = tomllib.loads(PYPROJECT.read_text())
    dependencies = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["cuda"]]
    # The Makefile says which torch, among those that pyproject.toml allows.
    torch = re.search(r"^TORCH := (\S+)$", (FOLDER.parent / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    everything = resolve([*dependencies, torch[1], COMPILER])
    common = {name: entry for name, entry in everything.items() if not is_of_cuda(name)}
    _write("sources.lock", {name: common.pop(name) for name in SOURCES})
    _write("requirements.lock", common)
    _write("torch-cuda.lock", {name: entry for name, entry in everything.items() if is_of_cuda(name)})
    if torch_cpu is not None:
        pin = f"{torch[1]}+cpu"
        folder = Path(torch_cpu)
        found = _hash_wheels(folder, pin) if folder.is_dir() else resolve([pin], "--no-deps", "--index-url", torch_cpu)
        _write("torch-cpu.lock", found)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins, tempfile.NamedTemporaryFile("w") as without:
        pins.write("".join(f"{name}=={version_of(entry)}\n" for name, entry in common.items()))
        without.write("".join(f"{name}; python_version < '3'\n" for name in RUNTIME_WITHOUT))
        pins.flush()
        without.flush()
        _write("runtime.lock", resolve(RUNTIME, "--constraints", pins.name, "--overrides", without.name))
    _write("runtime-cuda.lock", {name: common[name] for name in RUNTIME_CUDA})
    # Building takes ExecuTorch's C++ libraries and headers, and none of what its Python code imports.
    tools = resolve([*BUILD, *(text for text in project["build-system"]["requires"] if "executorch" not in text)])
    _write("build.lock", {**tools, "executorch": common["executorch"]})


def _hash_wheels(folder: Path, pin: str) -> dict[str, str]:
    """Pin a package to the wheels in a folder, which uv does not hash."""
    name, version = pin.split("==")
    wheels = sorted(folder.glob(f"{name}-{version}-*.whl"))
    if not wheels:
        sys.exit(f"error: {folder} has no wheel of {pin}")
    hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    return {name: " \\\n".join((pin, *(f"    --hash=sha256:{digest}" for digest in hashes)))}


def _write(name: str, entries: dict[str, str]) -> None:
    (FOLDER / name).write_text(HEADER + "".join(f"{entries[key]}\n" for key in sorted(entries)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the locks, or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Only compare the locks with pyproject.toml.")
    parser.add_argument(
        "--torch-cpu", metavar="WHERE", help="The index, or a folder, with torch's builds for the CPU; else kept as is."
    )
    options = parser.parse_args(arguments)
    if not options.check:
        make_locks(options.torch_cpu)
    problems = find_drift()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print("hint: make lock", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
