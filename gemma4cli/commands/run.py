"""`g4 run`: ask a model once, or chat with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma4cli.commands.options import CompileOption, ContextOption, DeviceOption, JsonOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.engine.answer import AnswerSettings
    from gemma4cli.engine.base import Engine
    from gemma4cli.model.chat import Chat

EXAMPLES = (
    ("Chat with the last exported model", "g4 run"),
    ("One answer, repeatable", 'g4 run --prompt "What is the capital of France?" --temperature 0'),
    ("Ask about a file, as JSON", "g4 run --prompt-file notes.txt --system 'Answer in one word.' --json"),
    ("A checkpoint in PyTorch, without any export", 'g4 run --model checkpoints/demo --prompt "Hello"'),
)

_EAGER_CONTEXT = 4096
_EXIT_INTERRUPTED = 130


def run(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="The bundle to run; a GGUF file or, with --engine eager, a checkpoint.",
            show_default="the last one exported",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="CHECKPOINT", help="Run a checkpoint, plain, quantized or GGUF; means --engine eager."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to ask.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Let the model think before it answers.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            min=1,
            help="Stop after this many tokens.",
            show_default="until the context is full",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 is greedy.", show_default="the model's")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="0 is off.", show_default="the model's")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="1 is off.", show_default="the model's")] = None,
    min_p: Annotated[float | None, typer.Option(metavar="P", help="0 is off.", show_default="0")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed gives the same text.", show_default="random")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeatable.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Report speed, memory and settings on stderr.")] = False,
    engine: Annotated[
        Literal["runner", "eager", "torch"] | None,
        typer.Option(
            "--engine",
            help="runner: a bundle in C++. torch: a CUDA bundle in PyTorch. eager: a checkpoint in PyTorch.",
            show_default="runner; eager for a GGUF file and with --model",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    compile: CompileOption = False,
    ctx: ContextOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Ask a model once, or chat with it when no prompt is given."""
    console = open_console(json=json, quiet=quiet)
    eager_options = EagerOptions(device, compile, ctx)
    name = _choose_engine(engine, target, model, eager_options)
    if raw and (think or system is not None):
        raise _usage("--raw uses no chat template, so --think and --system mean nothing with it.")
    text = read_prompt(prompt, prompt_file)
    if text is None and (json or raw):
        raise _usage(
            f"{'--json' if json else '--raw'} needs a prompt.", "Give --prompt, --prompt-file, or pipe one in."
        )
    system = None if system is None else valid_text(system, "--system")
    workspace = Workspace.from_environment()
    if name != "eager":
        source = _open_bundle(workspace.resolve("bundle", target, console.note), name, console)
    else:
        folder = workspace.resolve_source(model or target, console.note)
        source = _open_checkpoint(folder, eager_options, workspace, console)

    from gemma4cli.engine.answer import AnswerSettings
    from gemma4cli.model.chat import Chat, Message

    chat = Chat.from_dir(source.folder)
    chat.tokenizer.check_vocabulary(source)
    if think and chat.markers is None:
        raise G4Error(f"{source.folder} has no thinking channel.", hint="Run without --think.")
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    settings = AnswerSettings(
        sampling=chat.defaults.sampling(**{key: value for key, value in changes.items() if value is not None}),
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop or ()),
    )
    if text is None:
        from gemma4cli.commands.repl import Repl

        with source.load() as loaded:
            repl = Repl(
                console,
                loaded,
                chat,
                settings,
                system=system,
                thinking=think,
                fixed_seed=seed is not None,
                show_stats=stats,
                history_file=workspace.root / "history",
            )
            return repl.run()
    if raw:
        ids = chat.raw_ids(text)
    else:
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        ids = chat.prompt_ids([*messages, {"role": "user", "content": text}], thinking=think)
    settings = settings if seed is not None else settings.with_fresh_seed()
    with source.load() as loaded:
        return answer_once(console, loaded, chat, ids, settings, show_stats=stats)


@dataclass(frozen=True)
class EagerOptions:
    """What only the eager engine takes; a bundle's is fixed when it is exported."""

    device: str = "cpu"
    compile: bool = False
    ctx: int | None = None

    def given(self) -> list[str]:
        """Name the flags that differ from their defaults."""
        return [f"--{field.name}" for field in fields(self) if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Source:
    """Something to run: checked so far as is cheap, and loaded when everything else is known to be right."""

    folder: Path
    vocab_size: int
    load: Callable[[], Engine]


def _open_bundle(folder: Path, engine: str, console: Console) -> Source:
    from gemma4cli.export.bundle import open_bundle

    bundle = open_bundle(folder)
    if engine == "torch" and bundle.manifest.backend != "cuda":
        raise G4Error(
            f"--engine torch runs compiled CUDA code; {folder} is for the {bundle.manifest.backend}.",
            hint="Leave --engine away.",
        )

    def load() -> Engine:
        if engine == "torch":
            from gemma4cli.engine.compiled import CompiledEngine

            return CompiledEngine.from_bundle(folder, console.progress())
        from gemma4cli.engine.runner import RunnerEngine

        return RunnerEngine(folder)

    return Source(folder, bundle.contract.vocab_size, load)


def _open_checkpoint(folder: Path, options: EagerOptions, workspace: Workspace, console: Console) -> Source:
    from gemma4cli.model.config import Gemma4Config

    if folder.is_file():  # a GGUF file: converted once, then found again by its hash
        from gemma4cli.quant.gguf.convert import ensure_converted

        folder = ensure_converted(folder, workspace.folder("checkpoint"), console.progress())
    config = Gemma4Config.from_dir(folder)

    def load() -> Engine:
        from gemma4cli.engine.eager import EagerEngine

        return EagerEngine.from_checkpoint(
            folder,
            context_length=options.ctx or min(_EAGER_CONTEXT, config.max_position_embeddings),
            device=options.device,
            compile=options.compile,
            progress=console.progress(),
        )

    return Source(folder, config.vocab_size, load)


def answer_once(
    console: Console, engine: Engine, chat: Chat, ids: list[int], settings: AnswerSettings, *, show_stats: bool
) -> int:
    """Answer one prompt: streamed text, or one JSON document. Returns the exit code."""
    from gemma4cli.commands.speech import Speaker, describe_stats, say_how_it_ended, speak
    from gemma4cli.engine.answer import Answering, to_json

    speaker = Speaker(console)
    answering = Answering(engine, chat, ids, settings)
    answer = speak(answering, (lambda piece: None) if console.mode == "json" else speaker.say)
    if console.mode == "json":
        console.result(to_json(answer))
    else:
        speaker.end()
    say_how_it_ended(console, answer)
    if show_stats:
        for line in describe_stats(answer):
            console.report(line)
    return _EXIT_INTERRUPTED if answer.finish_reason == "cancelled" else 0


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    """Return the one prompt that was given: --prompt, --prompt-file, or piped stdin; None means chat."""
    if prompt is not None and prompt_file is not None:
        raise _usage("--prompt and --prompt-file exclude each other.")
    if prompt is not None:
        text = valid_text(prompt, "--prompt")
    elif prompt_file is not None and str(prompt_file) != "-":
        text = _decode(_read_file(prompt_file), str(prompt_file))
    elif prompt_file is not None or not sys.stdin.isatty():
        text = _decode(sys.stdin.buffer.read(), "The text on stdin")
    else:
        return None
    if not text.strip():
        raise G4Error("The prompt is empty.", hint="Give --prompt or --prompt-file, or run in a terminal to chat.")
    return text


def valid_text(text: str, option: str) -> str:
    """Refuse an argument that is not UTF-8: Python hides its bytes in surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise G4Error(f"{option} is not UTF-8 text.", hint="Convert it first, e.g. with iconv.") from None
    return text


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise G4Error(f"{path} does not exist.", hint="Check the path given to --prompt-file.") from None
    except IsADirectoryError:
        raise G4Error(f"{path} is a folder.", hint="Give --prompt-file a text file.") from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise G4Error(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}.",
            hint="Convert it first, e.g. iconv -f latin1 -t utf-8.",
        ) from None


def _choose_engine(name: str | None, target: Path | None, model: Path | None, eager_options: EagerOptions) -> str:
    if model is not None and target is not None:
        raise _usage("Give either BUNDLE or --model, not both.")
    if model is not None and name in ("runner", "torch"):
        raise _usage(f"--model runs a checkpoint in PyTorch; --engine {name} takes a bundle.", "Leave --engine away.")
    is_gguf = target is not None and target.suffix.lower() == ".gguf"
    name = name or ("eager" if model is not None or is_gguf else "runner")
    if name != "eager" and (given := eager_options.given()):
        raise _usage(f"Only --engine eager takes {', '.join(given)}; a bundle's is fixed when it is exported.")
    return name


def _usage(message: str, hint: str | None = None) -> G4Error:
    return G4Error(message, hint=hint or "See g4 run --help.", exit_code=2)
