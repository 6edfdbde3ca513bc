"""The client of the runner against programs that misbehave in the ways a process can."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma4cli import native
from gemma4cli.engine import runner
from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.runner import RunnerEngine
from gemma4cli.errors import G4Error
from gemma4cli.model.settings import GREEDY

Install = Callable[[str], None]

READY = '{"event":"ready","protocol":1,"context_length":8,"load_s":0.1}'
REQUEST = GenerationRequest((1, 2), 4, GREEDY, frozenset())


@pytest.fixture
def fake_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that makes a shell script stand where the runner is looked for."""

    def install(script: str) -> None:
        program = tmp_path / "runner.sh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("G4_RUNNER", str(program))

    return install


def start(**options: float) -> RunnerEngine:
    return RunnerEngine(Path("bundle"), **options)


def test_the_runners_own_sentence_and_hint_are_passed_on(fake_runner: Install) -> None:
    fake_runner("""echo '{"event":"error","id":null,"message":"No such bundle.","hint":"Make one."}'; exit 1""")
    with pytest.raises(G4Error, match=r"^No such bundle\.$") as caught:
        start()
    assert caught.value.hint == "Make one."


def test_a_runner_that_ends_early_is_reported_with_its_last_words(fake_runner: Install) -> None:
    fake_runner("echo first >&2; echo 'lib.so: cannot open' >&2; exit 127")
    with pytest.raises(G4Error, match=r"exit status 127: lib\.so: cannot open$"):
        start()


def test_a_runner_that_closes_its_output_and_lives_on_is_stopped(
    fake_runner: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for its exit status waited forever."""
    monkeypatch.setattr(runner, "_CLOSE_TIMEOUT_S", 0.2)
    fake_runner("exec sleep 60 > /dev/null")
    began = time.monotonic()
    with pytest.raises(G4Error, match="closed its output without ending") as caught:
        start()
    assert "G4_RUNNER" in (caught.value.hint or "")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("name", "hint"), [("KILL", "memory"), ("SEGV", "G4_RUNNER_LOG")])
def test_a_killed_runner_is_reported_with_its_signal(fake_runner: Install, name: str, hint: str) -> None:
    fake_runner(f"kill -{name} $$")
    with pytest.raises(G4Error, match=f"killed by SIG{name}") as caught:
        start()
    assert hint in (caught.value.hint or "")


def test_a_runner_that_hangs_while_loading_is_given_up_and_killed(fake_runner: Install) -> None:
    fake_runner("exec sleep 60")
    began = time.monotonic()
    with pytest.raises(G4Error, match=r"did not finish loading bundle within 0\.2 seconds"):
        start(load_timeout_s=0.2)
    assert time.monotonic() - began < 20


def test_another_protocol_is_refused(fake_runner: Install) -> None:
    fake_runner("""echo '{"event":"ready","protocol":99}'; cat""")
    with pytest.raises(G4Error, match="speaks another protocol"):
        start()


def test_something_that_is_not_a_runner_is_refused(fake_runner: Install) -> None:
    fake_runner("echo hello; cat")
    with pytest.raises(G4Error, match="wrote `hello` where a reply belongs"):
        start()


def test_a_runner_that_dies_while_answering_ends_the_generation_with_an_error(fake_runner: Install) -> None:
    fake_runner(f"""echo '{READY}'; read line; echo '{{"event":"token","id":0,"token":5}}'; kill -ABRT $$""")
    with start() as engine:
        generation = engine.generate(REQUEST)
        assert next(generation) == 5
        with pytest.raises(G4Error, match="killed by SIGABRT"):
            next(generation)
        with pytest.raises(G4Error, match="killed by SIGABRT"):
            list(engine.generate(REQUEST))


def test_a_prompt_that_fills_the_context_is_refused_before_anything_is_sent(fake_runner: Install) -> None:
    fake_runner(f"echo '{READY}'; cat")
    with start() as engine, pytest.raises(G4Error, match="has 8 tokens, but the context holds 8"):
        engine.generate(GenerationRequest(tuple(range(8)), 1, GREEDY, frozenset()))


def test_a_session_name_cannot_smuggle_a_second_request(fake_runner: Install) -> None:
    fake_runner(f"echo '{READY}'; cat")
    with start() as engine, pytest.raises(G4Error, match="is not a session name"):
        list(engine.generate(GenerationRequest((1,), 1, GREEDY, frozenset(), session="a\nquit")))


def test_closing_leaves_no_process_behind_and_can_be_repeated(fake_runner: Install) -> None:
    fake_runner(f"echo '{READY}'; read line; exit 0")
    engine = start()
    process = engine._process
    engine.close()
    engine.close()
    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    with pytest.raises(G4Error, match="has been closed"):
        list(engine.generate(REQUEST))


def test_g4_runner_must_name_an_executable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G4_RUNNER", str(tmp_path))
    with pytest.raises(G4Error, match="not an executable file"):
        native.find_runner()


def test_a_missing_runner_is_reported_with_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("G4_RUNNER", raising=False)
    monkeypatch.setattr(native, "_installed_runner", lambda: None)
    monkeypatch.setattr(native, "_SOURCE_TREE", Path("/nonexistent"))
    with pytest.raises(G4Error, match="not installed") as caught:
        native.find_runner()
    assert "pip install" in (caught.value.hint or "")


def test_a_runner_without_its_library_is_an_incomplete_installation(fake_runner: Install) -> None:
    fake_runner("exit 0")
    with pytest.raises(G4Error, match=r"libg4_kernels\.so does not exist"):
        native.find_kernel_library()


def test_the_loader_path_names_executorchs_libraries_and_keeps_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/users/own")
    first, second = native.runner_environment()["LD_LIBRARY_PATH"].split(":")
    assert (Path(first) / "libexecutorch.so").is_file()
    assert second == "/users/own"


def test_a_request_whose_last_reply_was_swallowed_by_ctrl_c_ends(
    fake_runner: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between taking the last reply and looking at it left g4 waiting for another, forever."""
    done = '{"event":"done","id":0,"finish_reason":"length"}'
    fake_runner(f"echo '{READY}'; read request; echo '{done}'; read cancel; read quit")
    engine = start()
    next_event = engine._next_event

    def interrupted(timeout_s: float | None) -> dict | None:
        event = next_event(timeout_s)
        if event is not None:
            monkeypatch.setattr(engine, "_next_event", next_event)
            raise KeyboardInterrupt
        return event

    monkeypatch.setattr(engine, "_next_event", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(REQUEST))
    engine.close()
