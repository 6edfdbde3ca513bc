"""`g4 run` with the demo model, for real: prompts in, answers out, in pipes and in a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.support.chat_fixture import DEMO
from tests.support.gguf_writer import GGML, describe, write

RunG4 = Callable[..., Outcome]
FRANCE = "What is the capital of France?"
Ask = Callable[..., Outcome]
Document = Callable[..., dict[str, Any]]
PROGRAM = [sys.executable, "-m", "gemma4cli"]


@pytest.fixture(params=["runner", "eager"])
def run_demo(request: pytest.FixtureRequest) -> list[str]:
    """The beginning of a command line that runs the demo model: its bundle in C++, and its checkpoint in PyTorch."""
    if request.param == "eager":
        return ["run", "--model", str(DEMO), "--ctx", "512"]
    return ["run", str(request.getfixturevalue("demo_bundle"))]


@pytest.fixture
def ask(g4: RunG4, run_demo: list[str]) -> Ask:
    return lambda *arguments: g4(*run_demo, *arguments)


@pytest.fixture
def document(ask: Ask) -> Document:
    def run(*arguments: str) -> dict[str, Any]:
        outcome = ask(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


def test_the_capital_of_france(ask: Ask) -> None:
    outcome = ask("--prompt", FRANCE, "--temperature", "0")
    assert (outcome.code, outcome.out) == (0, "Paris\n"), outcome.err


def test_the_document_repeats_the_answer_by_its_seed(document: Document) -> None:
    prompt = ["--prompt", "Tell me something.", "--temperature", "3", "--top-k", "0", "--max-new-tokens", "12"]
    first = document(*prompt)
    second = document(*prompt, "--seed", str(first["sampling"]["seed"]))
    assert first["token_ids"] == second["token_ids"]
    # One other seed may give the same few tokens by chance.
    seeds = range(first["sampling"]["seed"] + 1, first["sampling"]["seed"] + 6)
    assert any(document(*prompt, "--seed", str(seed))["token_ids"] != first["token_ids"] for seed in seeds)
    assert first["sampling"]["top_p"] == json.loads((DEMO / "generation_config.json").read_text())["top_p"]


def test_a_cut_answer_has_its_reason(document: Document) -> None:
    done = document("--prompt", FRANCE, "--temperature", "0", "--max-new-tokens", "1")
    assert done["finish_reason"] == "length"
    assert len(done["token_ids"]) == 1


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(ask: Ask) -> None:
    outcome = ask("--prompt", FRANCE * 900)
    assert outcome.code == 1
    assert re.search(r"has \d{4,} tokens, but the context holds (512|4096) including the answer", outcome.err)
    assert outcome.out == ""


def test_a_context_the_model_does_not_have_is_refused(g4: RunG4) -> None:
    outcome = g4("run", "--model", DEMO, "--ctx", "1m", "--prompt", FRANCE)
    assert outcome.code == 1
    assert "1048576" in outcome.err
    assert "Traceback" not in outcome.err


def test_raw_text_is_continued_as_it_is(document: Document) -> None:
    turn = f"<|turn>user\n{FRANCE}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    raw = document("--raw", "--prompt", turn, "--temperature", "0")
    chat = document("--prompt", FRANCE, "--temperature", "0")
    assert raw["token_ids"] == chat["token_ids"]
    assert raw["prompt_tokens"] == chat["prompt_tokens"]


def test_thinking_is_given_apart(document: Document) -> None:
    done = document("--prompt", FRANCE, "--think", "--temperature", "0", "--max-new-tokens", "64")
    assert done["thinking"]
    assert "thought" not in done["text"]


def test_a_gguf_file_is_converted_once_and_run(g4: RunG4, tmp_path: Path) -> None:
    file = write(tmp_path / "demo.gguf", describe(DEMO, GGML.Q8_0))
    first = g4("run", file, "--ctx", "512", "--prompt", FRANCE, "--temperature", "0")
    again = g4("run", file, "--ctx", "512", "--prompt", FRANCE, "--temperature", "0")
    assert first.out == again.out == "Paris\n", first.err + again.err
    assert "Converting demo.gguf" in first.err
    assert "Converting" not in again.err


def test_a_pipe_in_and_a_reader_that_leaves(run_demo: list[str]) -> None:
    """The reader goes as soon as something has come: no traceback, not even at the interpreter's end.

    The pipe has room for 64 bytes only, so that the answer cannot have been written whole before the reader goes.
    """
    read_end, write_end = os.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, bytes(size - 64))
    process = subprocess.Popen(
        [*PROGRAM, *run_demo, "--temperature", "50", "--top-k", "0", "--top-p", "1", "--seed", "12"],
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=subprocess.PIPE,
    )
    os.close(write_end)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(FRANCE.encode())
    process.stdin.close()
    while bytes_in(read_end) == size - 64:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.close(read_end)
    error = process.stderr.read()
    assert process.wait(60) == 1
    assert error == b""


def bytes_in(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_bytes_on_stdin_that_are_not_utf_8() -> None:
    done = subprocess.run([*PROGRAM, "run"], input=b"caf\xe9", capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"error: The text on stdin is not UTF-8: byte 3 is 0xe9." in done.stderr


class Terminal:
    """A chat in a pseudo terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(command[0], command)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, pattern: str, timeout_s: float = 90) -> str:
        """Read until the new output matches; return what came up to there."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.text)):
            if not select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {pattern!r} in {self.text!r}")
            try:
                self.text += os.read(self.descriptor, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the chat ended without {pattern!r}: {self.text!r}") from None
        seen, self.text = self.text[: match.end()], self.text[match.end() :]
        return seen

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key again and again until the new output matches.

        CPython loses a signal that comes after readline has shown the prompt and before it waits for a key.
        """
        for _ in range(30):
            self.type(key)
            if select.select([self.descriptor], [], [], 3)[0]:
                self.wait_for(pattern)
                return
        raise AssertionError(f"{key!r} did nothing")

    def exit_code(self, timeout_s: float = 60) -> int:
        """Wait for the chat to end; a prompt must have been there before the key that ends it was typed."""
        for _ in range(int(timeout_s * 20)):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError("the chat did not end")


OpenTerminal = Callable[[list[str]], Terminal]


@pytest.fixture
def terminal() -> Iterator[OpenTerminal]:
    opened: list[Terminal] = []

    def open_terminal(command: list[str]) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield open_terminal
    for one in opened:
        os.close(one.descriptor)


def test_a_chat_in_a_terminal(terminal: OpenTerminal, run_demo: list[str], workspace_root: Path) -> None:
    chat = terminal([*PROGRAM, *run_demo, "--temperature", "0"])
    chat.wait_for(r"\[ctx 0/\d+\] > ")
    chat.type(f"{FRANCE}\r")
    assert "Paris\r\n" in chat.wait_for(r"\[ctx \d+/\d+\] > ")
    chat.press_until("\x03", r"Ctrl-D or /exit leaves[^[]*\[ctx \d+/\d+\] > ")
    chat.type("/stats\r")
    chat.wait_for(r"tok/s[^[]*\[ctx \d+/\d+\] > ")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert FRANCE in (workspace_root / "history").read_text()


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat(terminal: OpenTerminal, run_demo: list[str]) -> None:
    """The key itself, so that the signal goes to the whole foreground process group; the answer has 934 tokens."""
    chat = terminal([*PROGRAM, *run_demo, "--temperature", "50", "--top-k", "0", "--top-p", "1", "--seed", "12"])
    chat.wait_for(r"\[ctx 0/\d+\] > ")
    chat.type("Talk.\r")
    chat.wait_for(r"Talk\.\r\n.")
    chat.type("\x03")
    chat.wait_for(r"\(stopped\)")
    chat.wait_for(r"\[ctx \d+/\d+\] > ")
    chat.type("/exit\r")
    assert chat.exit_code() == 0


def test_ctrl_c_once_answering_exits_with_130(run_demo: list[str]) -> None:
    process = subprocess.Popen(
        [
            *PROGRAM,
            *run_demo,
            "--prompt",
            "Talk.",
            "--temperature",
            "50",
            "--top-k",
            "0",
            "--top-p",
            "1",
            "--seed",
            "12",
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    wait_until_loading(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not out or json.loads(out)["finish_reason"] == "cancelled"
    assert b"Traceback" not in err


def wait_until_loading(pid: int) -> None:
    """Wait until a process has started the runner, or mapped torch: it is loading the model, or answering."""
    for _ in range(1200):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
        if "g4-runner" in names or "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the process loaded nothing")
