"""The container's locks: they fit pyproject.toml and each other, and a change of either is noticed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("lock", ROOT / "container" / "lock.py")
lock = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(lock)


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    for path in (ROOT / "container").glob("*.lock"):
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text, count=1))


def test_the_locks_have_not_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    assert lock.main(["--check"]) == 0, capsys.readouterr().err


def test_the_locks_name_no_host_and_every_entry_is_read() -> None:
    for path in (ROOT / "container").glob("*.lock"):
        text = path.read_text()
        assert "://" not in text
        assert "--hash=sha256:" in text
        rest = text.removeprefix(lock.HEADER)
        for entry in lock.read_lock(text).values():
            rest = rest.replace(entry, "", 1)
        assert rest.strip() == "", path.name


def test_torch_is_the_makefiles_and_in_no_other_lock() -> None:
    pinned = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    entries = {path.name: lock.read_lock(path.read_text()) for path in (ROOT / "container").glob("*.lock")}
    having = {name: lock.version_of(found["torch"]) for name, found in entries.items() if "torch" in found}
    assert having == {"torch-cpu.lock": f"{pinned}+cpu", "torch-cuda.lock": pinned}
    assert not any(name.startswith("nvidia") for name in entries["torch-cpu.lock"] | entries["runtime.lock"])


@pytest.mark.parametrize(("file", "old", "new", "sentence"), [
    ("pyproject.toml", r'"rich>=14,<16"', '"rich>=16"', "requirements.lock has rich 15"),
    ("pyproject.toml", r'"rich>=14,<16"', '"rich", "flask"', "requirements.lock lacks flask."),
    ("torch-cpu.lock", r"torch==2.13.0\+cpu", "torch==2.99.0+cpu", "torch-cpu.lock has torch 2.99.0+cpu; torch<2.14"),
    ("torch-cuda.lock", r"torch==2.13.0", "torch==2.12.0", "another lock has 2.13.0"),
    ("runtime.lock", r"(?m)^numpy==", "number==", "runtime.lock lacks numpy."),
    ("sources.lock", r" \\\n +--hash=\S+", "", "sources.lock has no hash for antlr4-python3-runtime."),
])  # fmt: skip
def test_drift_is_said_in_a_sentence(locks: Path, file: str, old: str, new: str, sentence: str) -> None:
    assert lock.find_drift(locks, locks / "pyproject.toml") == []
    edit(locks / file, old, new)
    problems = lock.find_drift(locks, locks / "pyproject.toml")
    assert any(sentence in problem for problem in problems), problems
