"""`g4`: the subcommands, and the one place where a failure becomes a sentence and an exit code.

Exit codes: 0 done, 1 a failure the user can act on, 2 wrong usage, 70 a bug of ours, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from gemma4cli import __version__, console
from gemma4cli.errors import G4Error

# Modules of gemma4cli.commands, in the order people use them.
COMMANDS = ("pull", "quantize", "convert_gguf", "export", "inspect_pte", "run", "bench", "doctor")
_PINNED = ("torch", "torchao", "executorch", "triton", "tokenizers", "safetensors", "gguf", "huggingface-hub")
# What only running a bundle does without: the container's runtime image has none of these.
_HEAVY = {"torch", "torchao", "executorch", "triton", "safetensors", "gguf", "huggingface_hub", "httpx2"}
_EXIT_BUG = 70
_EXIT_INTERRUPTED = 130


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    from gemma4cli.benchmark.device import source_commit

    typer.echo(f"g4 {__version__}")
    if commit := source_commit():
        typer.echo(f"commit {commit}")
    typer.echo(f"python {sys.version.split()[0]}")
    for package in _PINNED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            typer.echo(f"{package} {metadata.version(package)}")
    raise typer.Exit


def _print_help(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit


def g4(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Show the versions of all parts.")
    ] = False,
    help: Annotated[
        bool, typer.Option("--help", "-h", callback=_print_help, is_eager=True, help="Show this message and exit.")
    ] = False,
) -> None:
    """Gemma 4 on your own machine: pull, quantize, export to ExecuTorch, run."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _examples(examples: Sequence[tuple[str, str]]) -> str:
    r"""Lay examples out for the end of a --help page; the \b keeps Typer from joining the lines."""
    return "\n\n".join(["Examples:", *(f"\b\n# {what}\n{command}" for what, command in examples)])


def build_app(*, completion: bool = True) -> typer.Typer:
    """Assemble the command line.

    Typer imports pydantic (100 ms) to coerce a value that is not there, such as that of its own --help and completion
    options of the top level. So --help is ours there, and completion is left out where it cannot be meant.
    """
    app = typer.Typer(
        name="g4",
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True, add_help_option=False)(g4)
    for name in COMMANDS:
        module = importlib.import_module(f"gemma4cli.commands.{name}")
        app.command(name.replace("_", "-"), epilog=_examples(module.EXAMPLES))(getattr(module, name))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Nothing but this function catches errors to print them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _repair_streams()
    console.reset_console()
    try:
        app = build_app(completion=not arguments or arguments[0].startswith("-"))
        code = app(args=arguments, prog_name="g4", standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _abandon_stdout()
    except SystemExit as leaving:
        return _exit_code(leaving)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except Exception as error:  # this is the one boundary; unknown errors keep their traceback
        return _report(error, arguments)


def _report(error: Exception, arguments: Sequence[str]) -> int:
    out = console.active_console() or console.Console("json" if "--json" in arguments else "human")
    known = _explain(error)
    try:
        if known is None or os.environ.get("G4_DEBUG") == "1":
            traceback.print_exception(error)
        if known is None:
            known = G4Error(
                f"This is a bug in g4: {type(error).__name__}: {error}.",
                hint="Please report it with the text above and the output of g4 --version.",
                exit_code=_EXIT_BUG,
            )
        out.error(known)
    except BrokenPipeError:
        _abandon_stdout()
    return known.exit_code


def _explain(error: Exception) -> G4Error | None:
    """Turn what is known to be the user's or the machine's into a G4Error; None means a bug."""
    if isinstance(error, G4Error):
        return error
    if isinstance(error, typer.TyperException):
        usage = getattr(error, "ctx", None)
        message = error.format_message().replace("Value error, ", "")  # pydantic's prefix
        return G4Error(
            message if message.endswith((".", "?")) else f"{message}.",
            hint=f"See {usage.command_path} --help." if usage is not None else None,
            exit_code=error.exit_code,
        )
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in _HEAVY:
        return G4Error(
            f"This needs {package}, which is not installed here.",
            hint="Running a bundle does without; for the rest, use the full image, or pip install gemma4cli.",
        )
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        where = "GPU" if not isinstance(error, MemoryError) else "machine"
        return G4Error(f"The {where} ran out of memory.", hint="Use a smaller context (--ctx) or a smaller model.")
    return None


def _explain_os_error(error: OSError) -> G4Error | None:
    causes = {
        errno.ENOSPC: ("the disk is full", "Free some space, or choose another place with --output or G4_HOME."),
        errno.EDQUOT: (
            "your disk quota is used up",
            "Free some space, or choose another place with --output or G4_HOME.",
        ),
        errno.EROFS: ("the file system is read-only", "Choose another place with --output or G4_HOME."),
        errno.EACCES: ("permission denied", "Check who owns it, or choose another place with --output or G4_HOME."),
        errno.EPERM: ("permission denied", "Check who owns it, or choose another place with --output or G4_HOME."),
        errno.EIO: ("the disk reported an I/O error", "Check the disk; the system log says more."),
    }
    if error.errno not in causes:
        return None
    cause, hint = causes[error.errno]
    return G4Error(f"{error.filename}: {cause}." if error.filename else f"{cause[0].upper()}{cause[1:]}.", hint=hint)


def _exit_code(leaving: SystemExit) -> int:
    """Completion scripts and a pipe closed inside a command leave through sys.exit."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    return leaving.code if isinstance(leaving.code, int) else 0


def _abandon_stdout() -> int:
    """The reader of our output left (`g4 … | head`): point stdout at nothing so that the final flush is silent too."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    return 1


def _repair_streams() -> None:
    """Make the three standard streams usable whatever the shell did.

    A descriptor closed by the shell (`>&-`) would be handed to the next file we open, and our output would go into a
    checkpoint; text that the terminal's encoding lacks is shown as a question mark instead of failing.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, mode)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
