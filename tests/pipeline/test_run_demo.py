"""`g4 run` with the demo model, for real: prompts in, answers out, in pipes and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.support.chat_fixture import DEMO

RunG4 = Callable[..., Outcome]
FRANCE = "What is the capital of France?"
PROGRAM = [sys.executable, "-m", "gemma4cli", "run", "--model", str(DEMO), "--ctx", "512"]


def ask(g4: RunG4, *arguments: str) -> Outcome:
    return g4("run", "--model", DEMO, "--ctx", "512", *arguments)


def document(g4: RunG4, *arguments: str) -> dict:
    outcome = ask(g4, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_capital_of_france(g4: RunG4) -> None:
    outcome = ask(g4, "--prompt", FRANCE, "--temperature", "0")
    assert (outcome.code, outcome.out) == (0, "Paris\n"), outcome.err


def test_the_document_repeats_the_answer_by_its_seed(g4: RunG4) -> None:
    prompt = ["--prompt", "Tell me something.", "--temperature", "3", "--top-k", "0", "--max-new-tokens", "12"]
    first = document(g4, *prompt)
    second = document(g4, *prompt, "--seed", str(first["sampling"]["seed"]))
    other = document(g4, *prompt, "--seed", str(first["sampling"]["seed"] + 1))
    assert first["token_ids"] == second["token_ids"] != other["token_ids"]
    assert first["sampling"]["top_p"] == json.loads((DEMO / "generation_config.json").read_text())["top_p"]


def test_a_cut_answer_has_its_reason(g4: RunG4) -> None:
    done = document(g4, "--prompt", FRANCE, "--temperature", "0", "--max-new-tokens", "1")
    assert done["finish_reason"] == "length"
    assert len(done["token_ids"]) == 1


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(g4: RunG4) -> None:
    outcome = g4("run", "--model", DEMO, "--ctx", "16", "--prompt", FRANCE)
    assert outcome.code == 1
    assert re.search(r"has \d+ tokens, but the context holds 16 including the answer", outcome.err)
    assert outcome.out == ""


def test_a_context_the_model_does_not_have_is_refused(g4: RunG4) -> None:
    outcome = g4("run", "--model", DEMO, "--ctx", "1m", "--prompt", FRANCE)
    assert outcome.code == 1
    assert "1048576" in outcome.err
    assert "Traceback" not in outcome.err


def test_raw_text_is_continued_as_it_is(g4: RunG4) -> None:
    turn = f"<|turn>user\n{FRANCE}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    raw = document(g4, "--raw", "--prompt", turn, "--temperature", "0")
    chat = document(g4, "--prompt", FRANCE, "--temperature", "0")
    assert raw["token_ids"] == chat["token_ids"]
    assert raw["prompt_tokens"] == chat["prompt_tokens"]


def test_thinking_is_given_apart(g4: RunG4) -> None:
    done = document(g4, "--prompt", FRANCE, "--think", "--temperature", "0", "--max-new-tokens", "64")
    assert done["thinking"]
    assert "thought" not in done["text"]


def test_a_pipe_in_and_a_reader_that_leaves() -> None:
    """The reader takes one byte and goes: no traceback, not even at the interpreter's end."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [*PROGRAM, "--temperature", "3", "--top-k", "0", "--seed", "1", "--max-new-tokens", "200"],
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=subprocess.PIPE,
    )
    os.close(write_end)
    assert process.stdin is not None
    process.stdin.write(FRANCE.encode())
    process.stdin.close()
    assert os.read(read_end, 1)
    os.close(read_end)
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait(60) == 1
    assert error == b""


def test_bytes_on_stdin_that_are_not_utf_8() -> None:
    done = subprocess.run(PROGRAM, input=b"caf\xe9", capture_output=True, check=False)
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

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal() -> Callable[[list[str]], Terminal]:
    opened: list[Terminal] = []

    def open_terminal(command: list[str]) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield open_terminal
    for one in opened:
        os.close(one.descriptor)


def test_a_chat_in_a_terminal(terminal: Callable[[list[str]], Terminal], workspace_root: Path) -> None:
    chat = terminal([*PROGRAM, "--temperature", "0"])
    chat.wait_for(r"\[ctx 0/512\] > ")
    chat.type(f"{FRANCE}\r")
    assert "Paris\r\n" in chat.wait_for(r"\[ctx \d+/512\] > ")
    chat.type("\x03")
    chat.wait_for(r"Ctrl-D or /exit leaves")
    chat.type("/stats\r")
    chat.wait_for(r"tok/s")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert FRANCE in (workspace_root / "history").read_text()


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat(terminal: Callable[[list[str]], Terminal]) -> None:
    """The key itself, so that the signal goes to the whole foreground process group."""
    chat = terminal([*PROGRAM, "--temperature", "5", "--top-k", "0", "--top-p", "1", "--seed", "3"])
    chat.wait_for(r"\[ctx 0/512\] > ")
    chat.type("Talk.\r")
    chat.wait_for(r"Talk\.\r\n.")
    chat.type("\x03")
    chat.wait_for(r"\(stopped\)")
    chat.wait_for(r"\[ctx \d+/512\] > ")
    chat.type("/exit\r")
    assert chat.exit_code() == 0


def test_ctrl_c_once_answering_exits_with_130() -> None:
    process = subprocess.Popen(
        [*PROGRAM, "--prompt", "Talk.", "--temperature", "5", "--top-k", "0", "--top-p", "1", "--seed", "3", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    time.sleep(0.2)
    wait_for_torch(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not out or json.loads(out)["finish_reason"] == "cancelled"
    assert b"Traceback" not in err


def wait_for_torch(pid: int) -> None:
    """Wait until a process has mapped torch's library: it is loading the model, or answering."""
    for _ in range(1200):
        if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the process never loaded torch")
