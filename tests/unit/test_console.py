"""The console: data on stdout, the rest on stderr, one document with --json, progress that suits its stream."""

from __future__ import annotations

import io
import json
import os
import pty
from collections.abc import Callable

import pytest

from gemma4cli import console as console_module
from gemma4cli.console import Console, Mode, format_duration, open_console
from gemma4cli.errors import G4Error


def make(mode: Mode) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(mode, out, err), out, err


@pytest.mark.parametrize(
    ("mode", "expected"), [("human", "drawn\n"), ("json", '{\n  "a": "é"\n}\n'), ("quiet", "path\n")]
)
def test_one_result_in_three_modes(mode: Mode, expected: str) -> None:
    console, out, err = make(mode)
    console.result({"a": "é"}, lambda: console.line("drawn"), essence="path")
    assert out.getvalue() == expected
    assert err.getvalue() == ""


def test_a_second_document_is_a_bug() -> None:
    console, _, _ = make("json")
    console.result({})
    with pytest.raises(AssertionError):
        console.result({})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("human", "n\nwarning: w\nr\nNext: g4 run\nerror: e\nhint: h\n"),
        ("json", "n\nwarning: w\nr\nerror: e\nhint: h\n"),
        ("quiet", "warning: w\nr\nerror: e\nhint: h\n"),
    ],
)
def test_what_each_mode_says_on_stderr(mode: Mode, expected: str) -> None:
    console, out, err = make(mode)
    console.note("n")
    console.warn("w")
    console.report("r")
    console.next("g4 run")
    console.error(G4Error("e", hint="h", exit_code=2))
    assert err.getvalue() == expected
    if mode == "json":
        assert json.loads(out.getvalue()) == {"error": {"message": "e", "hint": "h", "exit_code": 2}}
    else:
        assert out.getvalue() == ""


def test_an_error_after_the_document_does_not_print_a_second_one() -> None:
    console, out, _ = make("json")
    console.result({"a": 1})
    console.error(G4Error("e"))
    assert json.loads(out.getvalue()) == {"a": 1}


def test_a_table_shows_data_as_it_is_and_aligns_numbers() -> None:
    console, out, _ = make("human")
    console.table(["tensor", "bits"], [["model.[bold]norm", 4.5], ["x", 16]], align="lr")
    lines = out.getvalue().splitlines()
    assert "model.[bold]norm" in out.getvalue(), "markup in data must stay data"
    assert lines[2].endswith(" 4.5")
    assert lines[3].endswith("  16")


def test_json_and_quiet_exclude_each_other() -> None:
    with pytest.raises(G4Error, match="--json and --quiet exclude each other") as caught:
        open_console(json=True, quiet=True)
    assert caught.value.exit_code == 2


def test_progress_in_a_log_says_long_phases_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: clock[0])
    console, out, err = make("human")
    progress = console.progress()
    with progress.phase("hash", 100) as task:
        clock[0] += 0.5
        task.advance(100)
    assert err.getvalue() == "", "half a second is not worth a line"
    with progress.phase("quantize", 4096, "B") as task:
        for _ in range(4):
            clock[0] += 20
            task.advance(1024)
    progress.note("done")
    assert err.getvalue().splitlines() == [
        "quantize: 2.00 KiB/4.00 KiB 51 B/s, ETA 40.0 s",
        "quantize: 4.00 KiB/4.00 KiB 51 B/s, ETA 0.00 s",
        "quantize: 4.00 KiB in 1 min 20 s (51 B/s)",
        "done",
    ]
    assert out.getvalue() == ""


def test_progress_of_unknown_size_and_of_counted_things(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: clock[0])
    console, _, err = make("human")
    with console.progress().phase("layers", None, "layers") as task:
        clock[0] += 31
        task.advance(62)
    assert err.getvalue().splitlines() == [
        "layers: 62 layers 2.0/s, ETA unknown",
        "layers: 62 layers in 31.0 s (2.0/s)",
    ]


def test_quiet_progress_says_nothing() -> None:
    console, out, err = make("quiet")
    with console.progress().phase("x", 10) as task:
        task.advance(10)
    console.progress().note("n")
    assert out.getvalue() + err.getvalue() == ""


def on_terminal(action: Callable[[Console], object]) -> str:
    """Run `action(console)` with stderr on a pseudo terminal; return what the terminal got."""
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8") as stream:
        action(Console("human", io.StringIO(), stream))
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    return text


def test_progress_on_a_terminal_draws_bars_with_rate_and_nested_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def action(console: Console) -> None:
        progress = console.progress()
        with progress.phase("outer", 2048) as outer:
            outer.advance(1024, "model.norm")
            with progress.phase("inner", 3, "layers") as inner:
                inner.advance(1)
            console.note("a note [bold]in between[/bold]")
            console._bars.refresh()

    text = on_terminal(action)
    assert "outer model.norm" in text
    assert "1.00 KiB/2.00 KiB" in text
    assert "a note [bold]in between[/bold]" in text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_style_only_where_it_is_wanted(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen: list[bool] = []
    on_terminal(lambda console: (seen.append(console.allows_style(console.stderr)), console.note("x")))
    assert seen == [expected]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.042, "0.04 s"), (12.34, "12.3 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
