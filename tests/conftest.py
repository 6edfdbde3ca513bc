"""What every test gets: a workspace of its own, and `g4` as a function."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from gemma4cli.cli import main
from gemma4cli.workspace import Workspace
from tests.support.chat_fixture import make_chat_folder

# The same examples every time, however slow the machine; look for new ones with --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def workspace_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point G4_HOME at an empty folder, so that no test sees or touches the user's workspace."""
    root = tmp_path / "g4-home"
    monkeypatch.setenv("G4_HOME", str(root))
    monkeypatch.delenv("G4_DEBUG", raising=False)
    return root


@pytest.fixture
def g4(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the demo model pulled, quantized and exported; made once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "demo-home"
    with open(shared / "demo-home.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "bundles").is_dir():
            for command in (["pull", "demo"], ["quantize"], ["export"]):
                subprocess.run(
                    [sys.executable, "-m", "gemma4cli", *command],
                    env={**os.environ, "G4_HOME": str(home)},
                    capture_output=True,
                    check=True,
                )
    return home


@pytest.fixture(scope="session")
def demo_bundle(demo_home: Path) -> Path:
    """The exported demo model. Read only: tests that damage a bundle copy it first."""
    last = Workspace(demo_home).last("bundle")
    assert last is not None
    return last.path


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A model folder with tokenizer, template and settings, and no weights."""
    return make_chat_folder(tmp_path / "chat")
