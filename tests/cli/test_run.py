"""`g4 run` around the engine: where the prompt comes from, what is printed where, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma4cli.commands.run import answer_once, read_prompt
from gemma4cli.console import Console, Mode
from gemma4cli.engine.answer import AnswerSettings
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GREEDY, SamplingSettings
from tests.conftest import Outcome
from tests.support.fake_engine import FakeEngine

RunG4 = Callable[..., Outcome]


@pytest.fixture
def chat(chat_folder: Path) -> Chat:
    return Chat.from_dir(chat_folder)


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def ask(chat: Chat, text: str, mode: Mode = "human", **options: object) -> tuple[int, str, str]:
    """Answer once with an engine that says `text`; return exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    length = options.pop("length", 256)
    show_stats = options.pop("show_stats", False)
    engine = FakeEngine([[*chat.tokenizer.encode(text), chat.stop_ids[1]]], length)  # type: ignore[arg-type]
    settings = AnswerSettings(**{"sampling": GREEDY, **options})  # type: ignore[arg-type]
    console = Console(mode, out, err)
    code = answer_once(console, engine, chat, chat.raw_ids("Hi"), settings, show_stats=bool(show_stats))
    return code, out.getvalue(), err.getvalue()


# The prompt


def test_a_prompt_from_the_command_line_leaves_stdin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"\xff")
    assert read_prompt("Hi", None) == "Hi"


def test_a_prompt_from_a_file_and_from_stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Hé\n", encoding="utf-8")
    assert read_prompt(None, tmp_path / "p.txt") == "Hé\n"
    give_stdin(monkeypatch, b"piped")
    assert read_prompt(None, None) == "piped"
    give_stdin(monkeypatch, b"dash", terminal=True)
    assert read_prompt(None, Path("-")) == "dash"


def test_no_prompt_in_a_terminal_means_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"", terminal=True)
    assert read_prompt(None, None) is None


def test_stdin_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"caf\xe9")
    with pytest.raises(G4Error, match="The text on stdin is not UTF-8: byte 3 is 0xe9") as caught:
        read_prompt(None, None)
    assert "iconv" in str(caught.value.hint)


def test_other_wrong_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_stdin(monkeypatch, b" \n")
    with pytest.raises(G4Error, match="The prompt is empty"):
        read_prompt(None, None)
    with pytest.raises(G4Error, match="--prompt and --prompt-file exclude each other"):
        read_prompt("a", tmp_path)
    with pytest.raises(G4Error, match=r"no\.txt does not exist"):
        read_prompt(None, tmp_path / "no.txt")
    with pytest.raises(G4Error, match="is a folder"):
        read_prompt(None, tmp_path)
    (tmp_path / "latin1").write_bytes(b"\xe9")
    with pytest.raises(G4Error, match="latin1 is not UTF-8"):
        read_prompt(None, tmp_path / "latin1")
    with pytest.raises(G4Error, match="--prompt is not UTF-8 text"):
        read_prompt(os.fsdecode(b"\xe9"), None)


# Usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw", "--think", "-p", "x"], "--raw uses no chat template"),
        (["--raw", "--system", "s", "-p", "x"], "--raw uses no chat template"),
        (["--model", "m", "b", "-p", "x"], "Give either BUNDLE or --model, not both."),
        (["--model", "m", "--engine", "runner", "-p", "x"], "--model runs a checkpoint in PyTorch"),
        (["--ctx", "4k", "-p", "x"], "Only --engine eager takes --ctx"),
        (["--device", "cuda", "--compile", "-p", "x"], "Only --engine eager takes --device, --compile"),
    ],
)
def test_options_that_do_not_go_together(g4: RunG4, arguments: list[str], message: str) -> None:
    outcome = g4("run", *arguments)
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_some_options_need_a_prompt(g4: RunG4, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    give_stdin(monkeypatch, b"", terminal=True)
    outcome = g4("run", option)
    assert outcome.code == 2
    assert f"{option} needs a prompt" in outcome.err


def test_nothing_exported_yet(g4: RunG4) -> None:
    outcome = g4("run", "--prompt", "x")
    assert outcome.code == 1
    assert "No bundle was given and none has been exported yet." in outcome.err


def test_settings_out_of_range_are_refused_before_loading(g4: RunG4, chat_folder: Path) -> None:
    outcome = g4("run", "--model", chat_folder, "--prompt", "x", "--top-p", "3")
    assert outcome.code == 1
    assert "top_p is 3.0; it must be above 0 and at most 1" in outcome.err
    outcome = g4("run", "--model", chat_folder, "--prompt", "x", "--stop", "")
    assert "A stop string is empty" in outcome.err
    outcome = g4("run", "--model", chat_folder, "--prompt", "x", "--system", os.fsdecode(b"\xe9"))
    assert "--system is not UTF-8 text" in outcome.err


def test_thinking_that_the_model_cannot_do(g4: RunG4, chat_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = chat_folder / name
        path.write_text(path.read_text().replace("<|channel>", "<unused0>").replace("<channel|>", "<unused1>"))
    config = json.loads((chat_folder / "tokenizer_config.json").read_text())
    del config["soc_token"], config["eoc_token"]
    (chat_folder / "tokenizer_config.json").write_text(json.dumps(config))
    outcome = g4("run", "--model", chat_folder, "--prompt", "x", "--think")
    assert outcome.code == 1
    assert "has no thinking channel" in outcome.err


# The answer


def test_the_answer_is_on_stdout_and_nothing_else(chat: Chat) -> None:
    assert ask(chat, "Paris 🚀") == (0, "Paris 🚀\n", "")
    assert ask(chat, "Paris\n") == (0, "Paris\n", "")


def test_thinking_goes_to_stderr(chat: Chat) -> None:
    code, out, err = ask(chat, "<|channel>thought\nHm.<channel|>Paris")
    assert (code, out, err) == (0, "Paris\n", "Hm.\n")


def test_quiet_gives_the_answer_alone(chat: Chat) -> None:
    assert ask(chat, "<|channel>thought\nHm.<channel|>Paris", "quiet") == (0, "Paris\n", "")


def test_json_is_one_document(chat: Chat) -> None:
    code, out, err = ask(chat, "Paris", "json")
    assert (code, err) == (0, "")
    assert json.loads(out)["text"] == "Paris"


def test_a_cut_answer_is_said_on_stderr(chat: Chat) -> None:
    assert "The answer was cut at --max-new-tokens 1." in ask(chat, "One. Two.", max_new_tokens=1)[2]
    prompt = len(chat.raw_ids("Hi"))
    assert f"the context of {prompt + 2} tokens is full" in ask(chat, "One. Two. Three.", length=prompt + 2)[2]


def test_a_context_that_fills_up_is_said(chat: Chat) -> None:
    used = len(chat.raw_ids("Hi")) + len(chat.tokenizer.encode("One. Two."))
    assert f"({used} of {used + 1} tokens)" in ask(chat, "One. Two.", length=used + 1)[2]
    assert "of the context is used" not in ask(chat, "One. Two.", length=used * 2)[2]


def test_stats_name_what_was_measured(chat: Chat) -> None:
    sampling = SamplingSettings(temperature=0.7, top_k=5, top_p=0.9, seed=42)
    _, out, err = ask(chat, "Paris", "quiet", sampling=sampling, show_stats=True)
    assert out == "Paris\n"
    assert "at 100.0 tok/s" in err
    assert "first token after 0.25 s" in err
    assert f"context {len(chat.raw_ids('Hi')) + len(chat.tokenizer.encode('Paris'))}/256" in err
    assert "temperature 0.7, top-k 5, top-p 0.9, min-p 0, seed 42" in err
    assert "ended by stop" in err


def test_ctrl_c_ends_the_answer_and_exits_with_130(chat: Chat) -> None:
    engine = FakeEngine([chat.tokenizer.encode("One. Two. Three.")])
    engine.before_token = lambda said: os.kill(os.getpid(), signal.SIGINT) if said == 2 else None
    out, err = io.StringIO(), io.StringIO()
    settings = AnswerSettings(GREEDY)
    before = signal.getsignal(signal.SIGINT)
    code = answer_once(Console("human", out, err), engine, chat, chat.raw_ids("Hi"), settings, show_stats=False)
    assert code == 130
    assert out.getvalue().startswith("One")
    assert "(stopped)" in err.getvalue()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_a_stuck_engine(chat: Chat) -> None:
    def twice(said: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    engine = FakeEngine([chat.tokenizer.encode("One. Two. Three.")], before_token=twice)
    console = Console("human", io.StringIO(), io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        answer_once(console, engine, chat, chat.raw_ids("Hi"), AnswerSettings(GREEDY), show_stats=False)


def test_a_tokenizer_of_another_model_is_refused(g4: RunG4, chat_folder: Path) -> None:
    config = json.loads((chat_folder / "config.json").read_text())
    config["text_config" if "text_config" in config else "vocab_size"] = (
        {**config["text_config"], "vocab_size": 100} if "text_config" in config else 100
    )
    (chat_folder / "config.json").write_text(json.dumps(config))
    outcome = g4("run", "--model", chat_folder, "--prompt", "x")
    assert outcome.code == 1
    assert "the model's vocabulary has 100 entries: they do not belong together" in outcome.err
