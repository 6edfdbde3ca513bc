"""How `g4 bench` shows its documents to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma4cli.benchmark.report import plural, rate, versus_rows
from gemma4cli.console import Console
from gemma4cli.files import format_bytes

Record = Mapping[str, Any]

_TEXT_TITLE = "With tokenizer, sampling and detokenizer, as in g4 run:"


def draw_speed(console: Console, document: Record) -> None:
    """Draw the tables of a finished benchmark."""
    tests: Sequence[Record] = document["tests"]
    if model := [record for record in tests if record["path"] == "model"]:
        console.line()
        rows = [_model_row(record) for record in model]
        columns = ["test", "t/s", "p10", "p90", "TTFT", "bound", "of bound", "J/token", "n"]
        console.table(*_without_empty(columns, rows), align="lrrrrrrrr")
    if text := [record for record in tests if record["path"] == "text"]:
        console.line()
        console.line(_TEXT_TITLE)
        rows = [_text_row(record) for record in text]
        console.table(("test", "TTFT", "decode t/s", "p10", "p90", "n"), rows, align="lrrrrr")
    memory = document["memory"]
    for name, key in (("host", "peak_host_bytes"), ("device", "peak_device_bytes")):
        if memory[key] is not None:
            console.line(f"peak {name} memory: {format_bytes(memory[key])}")
    if document["versus"]:
        _draw_versus(console, document["versus"])
    if document.get("baseline"):
        _draw_baseline(console, document["baseline"])


def _model_row(record: Record) -> list[str]:
    joules = record["joules_per_token"]
    return [
        record["test"],
        rate(record["median_ts"]),
        rate(record["p10_ts"]),
        rate(record["p90_ts"]),
        _seconds(record["ttft_s"]["median"]),
        "" if record["bound_ts"] is None else rate(record["bound_ts"]),
        "" if record["of_bound"] is None else f"{record['of_bound']:.0%}",
        "" if joules is None else f"{joules:.2f}",
        str(len(record["samples_ns"])),
    ]


def _text_row(record: Record) -> list[str]:
    decode = record["decode_ts"]
    return [
        record["test"],
        _seconds(record["ttft_s"]["median"]),
        *(rate(decode[name]) for name in ("median", "p10", "p90")),
        str(len(record["samples_ns"])),
    ]


def _draw_versus(console: Console, versus: Record) -> None:
    console.line()
    kv = dict.fromkeys((versus["type_k"], versus["type_v"]))
    console.line(
        f"llama.cpp {versus['build_commit']} ({versus['backends']}, {plural(versus['n_threads'], 'thread')}, "
        f"cache {' and '.join(map(str, kv))}) on {versus['gguf']}:"
    )
    console.table(("test", "g4 t/s", "llama.cpp t/s", "g4 / llama.cpp"), versus_rows(versus), align="lrrr")


def _draw_baseline(console: Console, baseline: Record) -> None:
    console.line()
    console.line("Compared with the baseline:")
    rows = [
        [
            row["test"] + (" (text)" if row["path"] == "text" else ""),
            rate(row["before"]),
            rate(row["now"]),
            f"{row['change']:+.1%}",
            "slower" if row["regressed"] else "",
        ]
        for row in baseline["tests"]
    ]
    console.table(("test", "before", "now", "change", ""), rows, align="lrrrl")


def draw_quality(console: Console, document: dict[str, Any]) -> None:
    """Draw the comparison as a table."""
    text, result, floor = document["text"], document["result"], document["floor"]
    console.line(
        f"{text['counted']:,} of {text['tokens']:,} tokens of {text['name']}, against {document['reference']['name']} "
        f"in {document['reference']['dtype']}:"
    )
    rows = [
        ("the original", f"{result['reference_perplexity']:.4f}", "", "", "", ""),
        _quality_row("this model", result),
        _quality_row("noise floor", floor),
    ]
    console.table(("", "perplexity", "KL mean", "KL p99", "KL max", "same top token"), rows, align="lrrrrr")
    console.line(f"Noise floor: {floor['method']}.")
    if receipt := document.get("receipt"):
        console.line(f"Stored in {receipt}.")


def _quality_row(name: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    kl = numbers["kl"]
    agreement = f"{numbers['top1_agreement']:.2%}"
    return name, f"{numbers['perplexity']:.4f}", f"{kl['mean']:.3g}", f"{kl['p99']:.3g}", f"{kl['max']:.3g}", agreement


def draw_profile(console: Console, document: Mapping[str, Any]) -> None:
    """Draw each step as a table of groups, and what took longest in it."""
    for step in document["steps"]:
        console.line(
            f"{step['test']}: one step of {step['tokens']} {'token' if step['tokens'] == 1 else 'tokens'} takes "
            f"{step['seconds'] * 1000:.2f} ms, {step['launches']:,} {step['launched']}"
        )
        rows = [(name, *_cells(seconds, step["seconds"])) for name, seconds in step["groups"].items()]
        console.table(("", "ms", "share"), [*rows, ("gaps", *_cells(step["gap_s"], step["seconds"]))], align="lrr")
        rows = [(top["name"], top["group"], top["count"], *_cells(top["seconds"], step["seconds"]))
                for top in step["top"]]  # fmt: skip
        console.table(("longest", "of", "n", "ms", "share"), rows, align="llrrr")
        console.line()


def _without_empty(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns in which nothing stands."""
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _cells(seconds: float, whole: float) -> tuple[str, str]:
    return f"{seconds * 1000:.3f}", f"{seconds / whole:.0%}"
