"""The command line of `g4 bench`: what it refuses before anything is loaded, and what goes where."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.support.tiny import write_checkpoint

RunG4 = Callable[..., Outcome]

SMALL = ("--prompt", "16", "--gen", "4", "--repeats", "2", "--threads", "1", "--ctx", "96")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", num_hidden_layers=2,
                            layer_types=["sliding_attention", "full_attention"])  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--csv"], "--json, --csv exclude each other."),
        (["--profile", "--quality"], "--profile and --quality exclude each other."),
        (["--profile", "--csv"], "--profile gives a table or --json."),
        (["--quality", "--baseline", "x", "--plot", "y"], "--quality does not go with --baseline, --plot."),
        (["--reference", "x", "--save-receipt"], "Only --quality takes --reference, --save-receipt."),
        (["--vs", "llama-bench=x"], "--vs and --gguf belong together."),
        (["--gguf", "x"], "--vs and --gguf belong together."),
        (["--fail-below", "5%"], "--fail-below needs a --baseline."),
        (["--depth", "deep"], "'deep' is not a list of token counts."),
        (["--plot", "speed.txt"], "speed.txt is not a picture file."),
        (["--vs", "x", "--gguf", "x"], "'x' is not a program to compare with."),
    ],
)
def test_wrong_usage_is_refused(g4: RunG4, checkpoint: Path, arguments: list[str], message: str) -> None:
    outcome = g4("bench", checkpoint, *arguments)
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "8k"], "pp512 @ d8192 needs a context of 8,705 tokens; this one holds 4,096."),
        (["--baseline", "none.json"], "none.json does not exist."),
        (["--plot", "nowhere/x.png"], "nowhere does not exist."),
        (["--quality", "--save-receipt"], "Only a bundle keeps a receipt."),
        (["--compile", "--profile"], "--profile tells modules apart, which --compile fuses."),
    ],
)
def test_what_cannot_be_done_is_said(g4: RunG4, checkpoint: Path, arguments: list[str], message: str) -> None:
    outcome = g4("bench", checkpoint, *arguments)
    assert outcome.code == 1
    assert message in outcome.err


def test_a_checkpoint_has_no_engine_to_choose(g4: RunG4, checkpoint: Path) -> None:
    outcome = g4("bench", checkpoint, "--engine", "torch")
    assert outcome.code == 2
    assert "is a checkpoint; --engine is for bundles." in outcome.err


def test_a_folder_of_something_else_is_refused(g4: RunG4, tmp_path: Path) -> None:
    assert "is neither a bundle nor a checkpoint." in g4("bench", tmp_path).err


def test_without_anything_exported_there_is_nothing_to_measure(g4: RunG4) -> None:
    outcome = g4("bench")
    assert outcome.code == 1
    assert "No bundle was given and none has been exported yet." in outcome.err


def test_plots_need_matplotlib(g4: RunG4, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = g4("bench", checkpoint, "--plot", "x.png")
    assert outcome.err == (
        "error: --plot needs matplotlib, which is not installed.\nhint: pip install 'gemma4cli[plot]'\n"
    )


def test_a_checkpoint_in_every_format(g4: RunG4, checkpoint: Path) -> None:
    """One document, lines, rows or tables on stdout, with the same tests; everything else on stderr."""
    document = json.loads(g4("bench", checkpoint, *SMALL, "--json").out)
    assert [(record["test"], record["path"]) for record in document["tests"]] == [
        ("pp16", "model"), ("tg4", "model"), ("pp16+tg4", "text")]  # fmt: skip
    for record in document["tests"]:
        assert len(record["samples_ts"]) == len(record["samples_ns"]) == 2
        assert record["p10_ts"] <= record["median_ts"] <= record["p90_ts"]
    assert document["engine"]["backends"] == "PyTorch"
    assert document["complete"] is True

    lines = [json.loads(line) for line in g4("bench", checkpoint, *SMALL, "--no-text", "--jsonl").out.splitlines()]
    assert [line["test"] for line in lines] == ["pp16", "tg4"]
    rows = list(csv.DictReader(io.StringIO(g4("bench", checkpoint, *SMALL, "--no-text", "--csv").out)))
    assert [row["test"] for row in rows] == ["pp16", "tg4"]
    assert float(rows[1]["median_ts"]) > 0
    assert rows[0]["bound_ts"] == ""

    table = g4("bench", checkpoint, *SMALL, "--markdown").out.splitlines()
    assert table[0].startswith("| model | size | params | backend | threads | test | t/s |")
    assert [line.split(" | ")[5] for line in table[2:5]] == ["pp16", "tg4", "pp16+tg4 (text)"]

    human = g4("bench", checkpoint, *SMALL)
    assert "roofline:  a token reads" in human.out
    assert human.out.index("memory delivers") < human.out.index("of bound")
    assert "With tokenizer, sampling and detokenizer" in human.out
    assert max(map(len, human.out.partition("of bound")[2].splitlines())) <= 80
    quiet = g4("bench", checkpoint, *SMALL, "--no-text", "--quiet")
    assert quiet.err == ""
    assert quiet.out.startswith("pp16 ") and ", tg4 " in quiet.out


def test_a_profile_in_both_formats(g4: RunG4, checkpoint: Path) -> None:
    arguments = ("bench", checkpoint, "--profile", *SMALL)
    document = json.loads(g4(*arguments, "--json").out)
    assert [step["test"] for step in document["steps"]] == ["pp16", "tg4"]
    outcome = g4(*arguments)
    assert "tg4: one step of 1 token takes" in outcome.out
    assert [line.split()[0] for line in outcome.out.splitlines()[3:8]] == [
        "matvec", "attention", "norm", "other", "gaps"]  # fmt: skip
    assert "profiler_start" not in outcome.err
