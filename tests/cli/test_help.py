"""Help: every command has it, with examples that parse, quickly and without torch."""

from __future__ import annotations

import importlib
import itertools
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import pytest
import typer

from gemma4cli import __version__, cli
from gemma4cli.cli import COMMANDS
from tests.conftest import Outcome

HEAVY = {"torch", "transformers", "executorch", "tokenizers", "jinja2", "rich", "pydantic", "numpy", "huggingface_hub"}
RunG4 = Callable[..., Outcome]


def name_of(module: str) -> str:
    return module.replace("_", "-")


def test_the_commands_are_listed_in_the_order_people_use_them(g4: RunG4) -> None:
    outcome = g4("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.out.partition("Commands:\n")[2].splitlines() if line[2:3].strip()]
    assert listed == [name_of(module) for module in COMMANDS]
    assert "..." not in outcome.out.partition("Commands:")[2], "a purpose is too long for its line"


def test_no_command_prints_help_and_means_wrong_usage(g4: RunG4) -> None:
    outcome = g4()
    assert (outcome.code, outcome.out) == (2, "")
    assert "Commands:" in outcome.err


@pytest.mark.parametrize("module", COMMANDS)
def test_every_help_reads_well(g4: RunG4, module: str) -> None:
    outcome = g4(name_of(module), "--help")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.strip().startswith(f"g4 {name_of(module)}") for line in lines) >= 2, "two examples"
    assert "--json" in outcome.out
    assert "--quiet" in outcome.out


@pytest.mark.parametrize("module", COMMANDS)
def test_every_example_parses(module: str) -> None:
    examples = importlib.import_module(f"gemma4cli.commands.{module}").EXAMPLES
    assert len(examples) >= 2
    for what, command in examples:
        program, *arguments = itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(command))
        assert program == "g4", what
        assert_parses(arguments)


def assert_parses(arguments: list[str]) -> None:
    """Parse a command line as Typer does, without running it."""
    group = typer.main.get_command(cli.build_app(completion=False))
    context = group.make_context("g4", [])
    name, command, rest = group.resolve_command(context, arguments)
    command.make_context(name, rest, parent=context)


def cpu_seconds(command: list[str]) -> tuple[float, str]:
    """Run a command; return its CPU time, which is what starting costs and grows less with load, and its stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


@pytest.mark.parametrize("arguments", [[], *([name_of(module)] for module in COMMANDS)])
def test_help_is_fast_and_imports_nothing_heavy(arguments: list[str]) -> None:
    """Below 0.3 s; where a busy machine slows everything, less than four times what importing Typer takes."""
    probe = (
        "import sys; from gemma4cli.cli import main; code = main(sys.argv[1:]); "
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    ours, theirs = [], []
    for _ in range(5):
        spent, heavy = cpu_seconds([sys.executable, "-c", probe, *arguments, "--help"])
        assert heavy.strip() == "[]"
        ours.append(spent)
        if min(ours) < 0.3:
            break
        theirs.append(cpu_seconds([sys.executable, "-c", "import typer"])[0])
    else:
        ours, theirs = median(ours), median(theirs)
        assert ours < 4 * theirs, f"{ours:.3f} s of CPU; typer alone takes {theirs:.3f} s"


def test_version_names_every_part(g4: RunG4, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from gemma4cli.benchmark import device

    outcome = g4("--version")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == f"g4 {__version__}"
    for package in ("torch", "torchao", "executorch", "triton", "tokenizers", "safetensors", "gguf", "huggingface-hub"):
        assert f"{package} {metadata.version(package)}" in lines
    monkeypatch.setattr(device, "_SOURCE_TREE", device._SOURCE_TREE / "installed")
    monkeypatch.delenv("G4_COMMIT", raising=False)
    assert "commit" not in g4("--version").out
    monkeypatch.setenv("G4_COMMIT", "0123abcd")
    assert "commit 0123abcd" in g4("--version").out.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(g4: RunG4, shell: str) -> None:
    outcome = g4("--show-completion", shell)
    assert outcome.code == 0
    assert "_G4_COMPLETE" in outcome.out


@pytest.mark.parametrize(("words", "expected"), [("g4 ru", "run"), ("g4 run --max-n", "--max-new-tokens")])
def test_completion_completes(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_G4_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gemma4cli"], capture_output=True, text=True, env=environment, check=True
    )
    assert expected in done.stdout.split()
