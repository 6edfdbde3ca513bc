"""What every test gets: a workspace of its own, and `g4` as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemma4cli.cli import main
from tests.support.chat_fixture import make_chat_folder


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


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A model folder with tokenizer, template and settings, and no weights."""
    return make_chat_folder(tmp_path / "chat")
