"""The error boundary: one sentence, one hint, the right exit code; bugs keep their traceback; streams may be closed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma4cli import workspace
from gemma4cli.errors import G4Error
from tests.conftest import Outcome
from tests.support.tiny import write_checkpoint

RunG4 = Callable[..., Outcome]
PROGRAM = [sys.executable, "-m", "gemma4cli"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make every command that looks for its workspace fail with the given exception."""

    def fail(error: BaseException) -> None:
        def raise_it(*args: object) -> None:
            raise error

        monkeypatch.setattr(workspace.Workspace, "from_environment", raise_it)

    return fail


def test_a_known_failure_is_a_sentence_and_a_hint(g4: RunG4) -> None:
    outcome = g4("pull", "/no/such/model")
    assert (outcome.code, outcome.out) == (1, "")
    first, second = outcome.err.splitlines()
    assert first.startswith("error: /no/such/model ")
    assert second.startswith("hint: ")


def test_with_json_the_failure_is_the_document(g4: RunG4) -> None:
    outcome = g4("pull", "/no/such/model", "--json")
    document = json.loads(outcome.out)
    assert set(document) == {"error"}
    assert document["error"]["exit_code"] == outcome.code == 1
    assert document["error"]["message"] in outcome.err


def test_a_part_that_is_not_installed_is_named(g4: RunG4, failing: Callable[[BaseException], None]) -> None:
    """The runtime image has no torch; a module of ours that is not there is a bug all the same."""
    failing(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    outcome = g4("run", "--prompt", "x")
    assert outcome.code == 1
    assert outcome.err.startswith("error: This needs torch, which is not installed here.\nhint: ")
    failing(ModuleNotFoundError("No module named 'gemma4cli.nothing'", name="gemma4cli.nothing"))
    assert g4("run", "--prompt", "x").code == 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull", "--nope"], "No such option: --nope"),
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["run", "--max-new-tokens", "0"], "greater than or equal to 1"),
        (["run", "--engine", "gpu"], "'gpu' is not one of 'runner', 'eager'"),
        (["run", "--ctx", "4x"], "'4x' is not a number of tokens; write 4096, 32k or 128k"),
        (["run", "--ctx", "0"], "'0' is not a number of tokens"),
        (["run", "--json", "--quiet"], "--json and --quiet exclude each other"),
    ],
)
def test_wrong_usage_exits_with_2(g4: RunG4, arguments: list[str], message: str) -> None:
    outcome = g4(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_wrong_usage_with_json_is_a_document_too(g4: RunG4) -> None:
    outcome = g4("run", "--nope", "--json")
    assert json.loads(outcome.out)["error"]["exit_code"] == outcome.code == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x/w.bin"), "/x/w.bin: the disk is full."),
        (OSError(errno.ENOSPC, "No space left"), "The disk is full."),
        (OSError(errno.EDQUOT, "Quota", "/x"), "/x: your disk quota is used up."),
        (OSError(errno.EROFS, "Read-only", "/x"), "/x: the file system is read-only."),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied."),
        (OSError(errno.EIO, "I/O", "/x"), "/x: the disk reported an I/O error."),
        (MemoryError(), "The machine ran out of memory."),
        (torch.OutOfMemoryError("CUDA out of memory"), "The GPU ran out of memory."),
    ],
)
def test_the_machine_s_failures_are_sentences(
    g4: RunG4, failing: Callable[[BaseException], None], error: Exception, message: str
) -> None:
    failing(error)
    outcome = g4("run", "--prompt", "x")
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == f"error: {message}"
    assert outcome.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("error", [ValueError("internal"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyError("k")])
def test_a_bug_keeps_its_traceback_and_says_how_to_report(
    g4: RunG4, failing: Callable[[BaseException], None], error: Exception
) -> None:
    failing(error)
    outcome = g4("run", "--prompt", "x", "--json")
    assert outcome.code == 70
    assert "Traceback (most recent call last)" in outcome.err
    assert f"error: This is a bug in g4: {type(error).__name__}" in outcome.err
    assert "g4 --version" in outcome.err
    assert json.loads(outcome.out)["error"]["exit_code"] == 70


def test_debug_shows_the_traceback_of_known_failures(
    g4: RunG4, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(G4Error("known"))
    assert "Traceback" not in g4("run", "--prompt", "x").err
    monkeypatch.setenv("G4_DEBUG", "1")
    outcome = g4("run", "--prompt", "x")
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: known\n")


def test_an_interrupt_is_quiet(g4: RunG4, failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    outcome = g4("run", "--prompt", "x")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    """`g4 --help | true`: nothing on stderr, not even when the interpreter flushes at its end."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run([*PROGRAM, "--help"], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert process.stderr == ""
    assert process.returncode == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_closed_by_the_shell(tmp_path: Path, closed: str) -> None:
    """A closed descriptor must not become the next opened file: the state file would receive our output."""
    model = write_checkpoint(tmp_path / "model")
    process = subprocess.run(
        ["sh", "-c", f'"$0" -m gemma4cli pull "$1" {closed}', sys.executable, str(model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    state = json.loads((Path(os.environ["G4_HOME"]) / "state.json").read_text())
    assert state["model"]["path"] == str(model)


def test_text_the_terminal_cannot_show_is_replaced(tmp_path: Path) -> None:
    process = subprocess.run(
        [*PROGRAM, "pull", str(tmp_path / "é")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert process.returncode == 1
    assert b"? does not exist" in process.stderr


def test_ctrl_c_while_a_command_waits() -> None:
    """The interrupt arrives for real: a prompt is awaited on a pipe that stays open."""
    process = subprocess.Popen(
        [*PROGRAM, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until_reading(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


def wait_until_reading(pid: int) -> None:
    """Wait until a process sleeps in a read of its stdin."""
    for _ in range(400):
        call = Path(f"/proc/{pid}/syscall").read_text().split()
        if call[:2] == ["0", "0x0"]:
            return
        time.sleep(0.05)
    raise AssertionError("the program never read its stdin")
