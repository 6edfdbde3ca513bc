"""The chat: turns, slash commands, Ctrl-C and Ctrl-D, saving and loading."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma4cli.commands.repl import Repl
from gemma4cli.console import Console
from gemma4cli.engine.answer import AnswerSettings
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GREEDY
from tests.support.chat_fixture import make_chat_folder
from tests.support.fake_engine import FakeEngine

Line = str | BaseException


class Session:
    """A chat with prepared answers; `type` enters lines and then Ctrl-D."""

    def __init__(self, chat: Chat, answers: list[str], length: int = 256) -> None:
        self.chat = chat
        self.engine = FakeEngine([[*chat.tokenizer.encode(text), chat.stop_ids[1]] for text in answers], length)
        self.out, self.err = io.StringIO(), io.StringIO()
        self.prompts: list[str] = []

    def type(self, *lines: Line, **options: object) -> int:
        entered: Iterator[Line] = iter([*lines, EOFError()])

        def read(prompt: str) -> str:
            self.prompts.append(prompt)
            line = next(entered)
            if isinstance(line, BaseException):
                raise line
            return line

        console = Console("human", self.out, self.err)
        settings = AnswerSettings(GREEDY)
        return Repl(console, self.engine, self.chat, settings, read=read, **options).run()  # type: ignore[arg-type]

    @property
    def said(self) -> str:
        return self.err.getvalue()

    def asked(self, request: int = -1) -> str:
        """What the engine was asked, as text."""
        return self.chat.tokenizer.decode(self.engine.requests[request].tokens, skip_special=False)


@pytest.fixture
def session(chat_folder: Path) -> Callable[..., Session]:
    chat = Chat.from_dir(chat_folder)
    return lambda *answers, length=256: Session(chat, list(answers), length)


def test_a_conversation_keeps_its_history(session: Callable[..., Session]) -> None:
    chat = session("Hello.", "Bye.")
    assert chat.type("Hi", "Good night") == 0
    assert chat.out.getvalue() == "Hello.\nBye.\n"
    assert "user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n<|turn>user\nGood night<turn|>" in chat.asked()


def test_the_prompt_shows_how_much_context_is_used(session: Callable[..., Session]) -> None:
    chat = session("Hello.")
    chat.type("Hi")
    used = len(chat.engine.requests[0].tokens) + len(chat.chat.tokenizer.encode("Hello."))
    assert chat.prompts == ["[ctx 0/256] > ", f"[ctx {used}/256] > "]


def test_empty_lines_ask_nothing(session: Callable[..., Session]) -> None:
    chat = session("Hello.")
    chat.type("", "   ")
    assert chat.engine.requests == []


def test_several_lines_between_fences(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type('"""one', "/two", 'three"""', '"""single"""')
    assert "user\none\n/two\nthree<turn|>" in chat.asked(0)
    assert "user\nsingle<turn|>" in chat.asked(1)
    assert chat.prompts[1:3] == ["... ", "... "]


def test_a_slash_behind_a_space_is_text(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type(" /etc is a folder")
    assert "user\n/etc is a folder" in chat.asked()


def test_an_unknown_command_is_said_and_not_sent(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type("/quit now")
    assert "/quit is not a command; /help lists them. Nothing was sent." in chat.said
    assert chat.engine.requests == []


def test_help_lists_every_command(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type("/help")
    for name in ("help", "clear", "system", "think", "save", "load", "stats", "exit"):
        assert f"\n/{name} " in "\n" + chat.said


def test_exit_leaves_before_the_next_line(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    assert chat.type("/exit", "Hi") == 0
    assert chat.engine.requests == []


def test_clear_forgets_the_conversation_but_not_the_system_prompt(session: Callable[..., Session]) -> None:
    chat = session("Hello.", "Bye.")
    chat.type("Hi", "/clear", "Ho", system="Be kind.")
    assert "Hi" not in chat.asked()
    assert "system\nBe kind.<turn|>" in chat.asked()
    assert chat.prompts[2] == "[ctx 0/256] > "


def test_the_system_prompt_can_be_set_shown_and_removed(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type("/system", "/system Rhyme.", "Hi", "/system", "/system -", "Ho")
    assert "system\nRhyme.<turn|>" in chat.asked(0)
    assert "<|turn>system" not in chat.asked(1)
    assert chat.said.count("No system prompt.") == 2
    assert chat.said.count("System prompt: Rhyme.") == 2


def test_thinking_can_be_switched_and_is_shown_apart(session: Callable[..., Session]) -> None:
    chat = session("<|channel>thought\nHm.<channel|>Four.")
    chat.type("/think maybe", "/think", "2+2?", "/think off", "2+2?")
    assert "/think takes on or off, not maybe" in chat.said
    assert chat.out.getvalue().startswith("Hm.\nFour.\n")
    assert "<|think|>" in chat.asked(0)
    assert "<|think|>" not in chat.asked(1)
    assert "Hm." not in chat.asked(1), "thinking is no part of the history"


def test_thinking_is_refused_where_there_is_none(tmp_path: Path) -> None:
    folder = make_chat_folder(tmp_path / "m", soc_token=None, eoc_token=None)
    text = (folder / "tokenizer.json").read_text().replace("<|channel>", "<unused0>")
    (folder / "tokenizer.json").write_text(text)
    chat = Session(Chat.from_dir(folder), ["Ok."])
    chat.type("/think on")
    assert "This model has no thinking channel" in chat.said


def test_stats_of_the_last_answer(session: Callable[..., Session]) -> None:
    chat = session("Hello.")
    chat.type("/stats", "Hi", "/stats")
    assert "Nothing has been answered yet." in chat.said
    assert "first token after 0.25 s" in chat.said
    always = session("Hello.")
    always.type("Hi", show_stats=True)
    assert "first token after 0.25 s" in always.said


def test_ctrl_c_at_the_prompt_does_not_leave(session: Callable[..., Session]) -> None:
    chat = session("Hello.")
    assert chat.type(KeyboardInterrupt(), "Hi") == 0
    assert "(Ctrl-D or /exit leaves)" in chat.said
    assert chat.out.getvalue() == "Hello.\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(session: Callable[..., Session]) -> None:
    chat = session("One. Two. Three.", "Ok.")
    chat.engine.before_token = lambda said: (
        os.kill(os.getpid(), signal.SIGINT) if said == 2 and len(chat.engine.requests) == 1 else None
    )
    assert chat.type("Count", "Go on") == 0
    begun = chat.out.getvalue().splitlines()[0]
    assert "One. Two. Three.".startswith(begun)
    assert "(stopped)" in chat.said
    assert f"<|turn>model\n{begun.strip()}<turn|>" in chat.asked()


def test_an_answer_stopped_before_its_first_token_leaves_no_trace(session: Callable[..., Session]) -> None:
    chat = session("One.", "Ok.")
    chat.engine.before_token = lambda said: (
        os.kill(os.getpid(), signal.SIGINT) if len(chat.engine.requests) == 1 else None
    )
    chat.type("Count", "Hi")
    assert "Count" not in chat.asked()


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(session: Callable[..., Session]) -> None:
    chat = session("Ok.", length=40)
    assert chat.type("word " * 60, "Hi") == 0
    assert "but the context holds 40 including the answer" in chat.said
    assert "word" not in chat.asked()


def test_a_line_that_is_not_utf_8_is_not_sent(session: Callable[..., Session]) -> None:
    chat = session("Ok.")
    chat.type(UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "x"), "Hi")
    assert "not UTF-8 text; it was not sent" in chat.said
    assert len(chat.engine.requests) == 1


def test_every_turn_draws_its_own_seed_unless_one_is_fixed(session: Callable[..., Session]) -> None:
    free, fixed = session("Ok."), session("Ok.")
    free.type("a", "b")
    fixed.type("a", "b", fixed_seed=True)
    assert free.engine.requests[0].sampling.seed != free.engine.requests[1].sampling.seed
    assert [request.sampling.seed for request in fixed.engine.requests] == [0, 0]


def test_a_saved_conversation_goes_on(session: Callable[..., Session], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    first = session("Noted 🚀.")
    first.type("/system Be kind.", "I am Anna.", f"/save {file}", f"/save {file}")
    assert json.loads(file.read_text())["messages"][1] == {"role": "assistant", "content": "Noted 🚀."}
    second = session("Anna.")
    second.type(f"/load {file}", "Who am I?")
    assert "Loaded 2 messages" in second.said
    assert "I am Anna.<turn|>\n<|turn>model\nNoted 🚀.<turn|>\n<|turn>user\nWho am I?" in second.asked()
    assert "system\nBe kind." in second.asked()
    assert second.prompts[1] != "[ctx 0/256] > "


GOOD = {"format": "g4-conversation", "version": 1, "system": None, "thinking": False, "messages": []}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is not a conversation saved by /save"),
        ({"format": "other"}, "is not a conversation saved by /save"),
        ({**GOOD, "version": 2}, "has version 2; this g4 reads version 1"),
        ({**GOOD, "system": 3}, "is not a conversation saved by /save"),
        ({**GOOD, "messages": [{"role": "assistant", "content": "x"}]}, "is not a conversation saved by /save"),
        ({**GOOD, "messages": [{"role": "user", "content": 1}]}, "is not a conversation saved by /save"),
    ],
)
def test_a_wrong_conversation_changes_nothing(
    session: Callable[..., Session], tmp_path: Path, document: object, message: str
) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(document))
    chat = session("Hello.", "Bye.")
    chat.type("Hi", f"/load {file}", "Ho")
    assert message in chat.said
    assert "Hello." in chat.asked()


def test_save_and_load_say_what_is_wrong(session: Callable[..., Session], tmp_path: Path) -> None:
    foreign = tmp_path / "notes.json"
    foreign.write_text("{}")
    chat = session("Ok.")
    chat.type("/save", "/load", f"/save {foreign}", f"/save {tmp_path}/no/chat.json", f"/load {tmp_path}")
    assert "/save needs a file name" in chat.said
    assert "/load needs a file name" in chat.said
    assert f"{foreign} exists and is not a saved conversation" in chat.said
    assert f"{tmp_path}/no/chat.json cannot be written: No such file or directory" in chat.said
    assert f"{tmp_path} cannot be read: Is a directory" in chat.said
    assert foreign.read_text() == "{}"
