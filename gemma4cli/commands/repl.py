"""The chat of `g4 run`: lines in, streamed answers out, slash commands between."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma4cli.commands.speech import Speaker, describe_stats, say_how_it_ended, speak
from gemma4cli.console import Console
from gemma4cli.engine.answer import Answer, Answering, AnswerSettings
from gemma4cli.engine.base import Engine
from gemma4cli.errors import G4Error
from gemma4cli.files import read_json, write_json
from gemma4cli.model.chat import Chat, Message

_FENCE = '"""'
_FORMAT = "g4-conversation"
_FORMAT_VERSION = 1
_HISTORY_LINES = 1000
_ROLES = ("user", "assistant")

HELP = f"""\
/help            this list
/clear           forget the conversation; the system prompt stays
/system [TEXT]   set the system prompt; without TEXT, show it; - removes it
/think [on|off]  let the model think first; without a word, switch
/save FILE       write the conversation as JSON
/load FILE       continue a saved conversation
/stats           speed, memory and settings of the last answer
/exit            leave (also Ctrl-D)
{_FENCE}              begin and end a text of several lines
Ctrl-C stops an answer. Put a space in front of a text that begins with /."""


class _Leave(Exception):
    """Ends the chat."""


class Repl:
    """A conversation with its settings. `read` asks for a line, as `input` does."""

    def __init__(
        self,
        console: Console,
        engine: Engine,
        chat: Chat,
        settings: AnswerSettings,
        *,
        system: str | None = None,
        thinking: bool = False,
        fixed_seed: bool = False,
        show_stats: bool = False,
        history_file: Path | None = None,
        read: Callable[[str], str] = input,
    ) -> None:
        self._console = console
        self._engine = engine
        self._chat = chat
        self._settings = settings
        self._system = system
        self._thinking = thinking
        self._fixed_seed = fixed_seed
        self._show_stats = show_stats
        self._history_file = history_file
        self._read = read
        self._messages: list[Message] = []
        self._used = 0
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "clear": self._clear,
            "system": self._set_system,
            "think": self._think,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
            "exit": self._exit,
        }

    def run(self) -> int:
        """Chat until /exit or Ctrl-D; returns the exit code."""
        self._open_history()
        self._console.note("Chat with the model. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                self._turn()
            except EOFError:
                self._console.note("")  # Ctrl-D leaves the cursor behind the prompt
                return 0
            except _Leave:
                return 0
            except KeyboardInterrupt:
                self._console.note("\n(Ctrl-D or /exit leaves)")
            except UnicodeDecodeError:
                self._console.warn("That line is not UTF-8 text; it was not sent.")
            except G4Error as error:
                self._console.error(error)

    def _turn(self) -> None:
        line = self._read(f"[ctx {self._used}/{self._engine.context_length}] > ")
        if line.startswith("/"):
            self._command(line)
        elif text := self._whole(line).strip():
            self._ask(text)

    def _whole(self, line: str) -> str:
        """Return the line, or all lines up to the closing fence when it opens one."""
        if not line.startswith(_FENCE):
            return line
        lines = [line.removeprefix(_FENCE)]
        while not lines[-1].rstrip().endswith(_FENCE):
            lines.append(self._read("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
        return "\n".join(lines)

    def _ask(self, text: str) -> None:
        asked: list[Message] = [*self._messages, {"role": "user", "content": text}]
        ids = self._chat.prompt_ids(self._with_system(asked), thinking=self._thinking)
        settings = self._settings if self._fixed_seed else self._settings.with_fresh_seed()
        speaker = Speaker(self._console, thinking_to_stdout=True)
        answer = speak(Answering(self._engine, self._chat, ids, settings), speaker.say)
        speaker.end()
        say_how_it_ended(self._console, answer)
        self._last, self._used = answer, answer.context_used
        if answer.text:
            self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        if self._show_stats:
            self._stats("")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return messages if self._system is None else [{"role": "system", "content": self._system}, *messages]

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self._commands.get(name.strip())
        if command is None:
            self._console.warn(f"/{name.strip()} is not a command; /help lists them. Nothing was sent.")
        else:
            command(rest.strip())

    def _help(self, rest: str) -> None:
        self._console.note(HELP)

    def _clear(self, rest: str) -> None:
        self._messages, self._used, self._last = [], 0, None
        self._console.note("The conversation is empty.")

    def _set_system(self, rest: str) -> None:
        if rest:
            self._system = None if rest == "-" else rest
        self._console.note("No system prompt." if self._system is None else f"System prompt: {self._system}")

    def _think(self, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise G4Error(f"/think takes on or off, not {rest}.")
        wanted = not self._thinking if rest == "" else rest == "on"
        if wanted and self._chat.markers is None:
            raise G4Error("This model has no thinking channel.")
        self._thinking = wanted
        self._console.note(f"Thinking is {'on' if wanted else 'off'}.")

    def _stats(self, rest: str) -> None:
        if self._last is None:
            self._console.note("Nothing has been answered yet.")
            return
        for line in describe_stats(self._last):
            self._console.report(line)

    def _exit(self, rest: str) -> None:
        raise _Leave

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        if path.exists() and not _is_conversation(path):
            raise G4Error(f"{path} exists and is not a saved conversation.", hint="Choose another name.")
        try:
            write_json(
                path,
                {
                    "format": _FORMAT,
                    "version": _FORMAT_VERSION,
                    "system": self._system,
                    "thinking": self._thinking,
                    "messages": self._messages,
                },
            )
        except OSError as error:
            raise G4Error(f"{path} cannot be written: {error.strerror}.") from None
        self._console.note(f"Saved {len(self._messages)} messages to {path}.")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        try:
            document = read_json(path)
        except OSError as error:
            raise G4Error(f"{path} cannot be read: {error.strerror}.") from None
        messages, system, thinking = _check_conversation(document, path)
        if thinking and self._chat.markers is None:
            raise G4Error(f"{path} was saved with thinking on, but this model has no thinking channel.")
        self._messages, self._system, self._thinking = messages, system, thinking
        self._last = None
        self._used = len(self._chat.prompt_ids(self._with_system(messages), thinking=thinking)) if messages else 0
        self._console.note(f"Loaded {len(messages)} messages from {path}.")

    def _open_history(self) -> None:
        """Keep the lines typed between chats; without readline (a minimal Python) there is just no history."""
        if self._history_file is None:
            return
        try:
            import readline
        except ImportError:
            return
        with contextlib.suppress(OSError):
            readline.read_history_file(self._history_file)
        readline.set_history_length(_HISTORY_LINES)
        atexit.register(_write_history, self._history_file)


def _path(text: str, command: str) -> Path:
    if not text:
        raise G4Error(f"{command} needs a file name.", hint=f"{command} chat.json")
    return Path(text).expanduser()


def _is_conversation(path: Path) -> bool:
    try:
        document = read_json(path)
    except (G4Error, OSError):
        return False
    return isinstance(document, dict) and document.get("format") == _FORMAT


def _check_conversation(document: Any, path: Path) -> tuple[list[Message], str | None, bool]:
    """Return (messages, system prompt, thinking) of a saved file, or refuse it whole."""
    wrong = G4Error(f"{path} is not a conversation saved by /save.", hint="Nothing was loaded.")
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise wrong
    if document.get("version") != _FORMAT_VERSION:
        raise G4Error(f"{path} has version {document.get('version')!r}; this g4 reads version {_FORMAT_VERSION}.")
    messages, system, thinking = document.get("messages"), document.get("system"), document.get("thinking")
    if not isinstance(messages, list) or not isinstance(thinking, bool) or not isinstance(system, str | None):
        raise wrong
    for index, message in enumerate(messages):
        whole = isinstance(message, dict) and set(message) == {"role", "content"}
        if not whole or message["role"] != _ROLES[index % 2] or not isinstance(message["content"], str):
            raise wrong
    return messages, system, thinking


def _write_history(path: Path) -> None:
    import readline

    # A history that cannot be kept (read-only home, full disk) must not turn a finished chat into a failure.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
