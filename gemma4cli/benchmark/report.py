"""The result as tables for people, and as CSV, JSON lines and Markdown for everything else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma4cli.files import format_bytes

if TYPE_CHECKING:
    from gemma4cli.benchmark.run import Head
    from gemma4cli.console import Console

Record = Mapping[str, Any]

_TEXT_TITLE = "With tokenizer, sampling and detokenizer, as in g4 run:"
_GB = 1e9


def head_lines(head: Head) -> list[str]:
    """What is printed before the tests run: what is measured, and how fast decoding could be."""
    model, engine, roofline = head.subject, head.engine, head.roofline
    traffic = roofline.traffic
    facts = [
        ("model", f"{model['type']}, {format_bytes(model['weight_bytes'])} of weights: {model['path']}"),
        ("engine", f"{engine['name']}, {engine['backends']}, {_plural(engine['threads'], 'thread')}"),
        ("cache", f"{model['context_length']:,} tokens allocated, {model['kv_format']}"),
        ("loaded in", f"{engine['load_s']:.2f} s"),
        ("machine", head.environment["gpu_info"] or head.environment["cpu_info"]),
        ("roofline", f"a token reads {format_bytes(traffic.weight_bytes)} of weights and {_kv(head)}"),
    ]
    if roofline.bandwidth is None:
        facts.append(("", head.bandwidth_note or ""))
    else:
        band = roofline.bandwidth
        facts.append(
            ("", f"memory delivers {band.copy / _GB:.1f} GB/s copied, {band.read / _GB:.1f} GB/s read "
             f"({format_bytes(band.buffer_bytes)} at a time)")
        )  # fmt: skip
        facts.append(("", f"so at most {_rate(band.best / (traffic.weight_bytes + traffic.kv_bytes(0)))} tokens/s"))
    return [f"{name + ':' if name else '':11}{text}" for name, text in facts]


def draw(console: Console, document: Record) -> None:
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


def jsonl(document: Record) -> str:
    """One line per test."""
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in document["tests"])


def csv_text(document: Record) -> str:
    """One row per test; median, p10 and p90 in columns of their own, raw samples left out as llama-bench does."""
    rows = [_flat(record) for record in document["tests"]]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def markdown(document: Record) -> str:
    """A table with llama-bench's columns, mean ± deviation included, and below it where it was measured."""
    lines = [
        "| model | size | params | backend | threads | test | t/s | median | p10 | p90 | of bound |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in document["tests"]:
        name = record["test"] + (" (text)" if record["path"] == "text" else "")
        share = "" if record["of_bound"] is None else f"{record['of_bound']:.0%}"
        cells = (
            record["model_type"], format_bytes(record["model_size"]), f"{record['model_n_params'] / 1e9:.2f} B",
            record["backends"], record["n_threads"], name, f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
            f"{record['median_ts']:.2f}", f"{record['p10_ts']:.2f}", f"{record['p90_ts']:.2f}", share,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if versus := document["versus"]:
        lines += ["", "| test | g4 | llama-bench | ratio |", "| --- | ---: | ---: | ---: |"]
        lines += ["| " + " | ".join(row) + " |" for row in _versus_rows(versus)]
    environment, engine = document["environment"], document["engine"]
    machine = environment["gpu_info"] or environment["cpu_info"]
    lines += ["", f"{machine}; context {document['model']['context_length']:,}; g4 {environment['g4']} "
              f"({environment['commit'] or 'installed'}), torch {environment['torch']}, executorch "
              f"{environment['executorch']}; {engine['name']}; {environment['test_time']}"]  # fmt: skip
    return "\n".join(lines)


def essence(document: Record) -> str:
    """The one line of --quiet: each test and its median."""
    return ", ".join(f"{record['test']} {_rate(record['median_ts'])}" for record in document["tests"])


def _model_row(record: Record) -> list[str]:
    joules = record["joules_per_token"]
    return [
        record["test"],
        _rate(record["median_ts"]),
        _rate(record["p10_ts"]),
        _rate(record["p90_ts"]),
        _seconds(record["ttft_s"]["median"]),
        "" if record["bound_ts"] is None else _rate(record["bound_ts"]),
        "" if record["of_bound"] is None else f"{record['of_bound']:.0%}",
        "" if joules is None else f"{joules:.2f}",
        str(len(record["samples_ns"])),
    ]


def _text_row(record: Record) -> list[str]:
    decode = record["decode_ts"]
    return [
        record["test"],
        _seconds(record["ttft_s"]["median"]),
        *(_rate(decode[name]) for name in ("median", "p10", "p90")),
        str(len(record["samples_ns"])),
    ]


def _draw_versus(console: Console, versus: Record) -> None:
    console.line()
    kv = dict.fromkeys((versus["type_k"], versus["type_v"]))
    console.line(
        f"llama.cpp {versus['build_commit']} ({versus['backends']}, {_plural(versus['n_threads'], 'thread')}, "
        f"cache {' and '.join(map(str, kv))}) on {versus['gguf']}:"
    )
    console.table(("test", "g4 t/s", "llama.cpp t/s", "g4 / llama.cpp"), _versus_rows(versus), align="lrrr")


def _versus_rows(versus: Record) -> list[list[str]]:
    return [
        [
            row["test"],
            "" if row["g4_ts"] is None else _rate(row["g4_ts"]),
            _rate(row["median"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        ]
        for row in versus["tests"]
    ]


def _draw_baseline(console: Console, baseline: Record) -> None:
    console.line()
    console.line("Compared with the baseline:")
    rows = [
        [
            row["test"] + (" (text)" if row["path"] == "text" else ""),
            _rate(row["before"]),
            _rate(row["now"]),
            f"{row['change']:+.1%}",
            "slower" if row["regressed"] else "",
        ]
        for row in baseline["tests"]
    ]
    console.table(("test", "before", "now", "change", ""), rows, align="lrrrl")


def _kv(head: Head) -> str:
    traffic = head.roofline.traffic
    parts = [f"{format_bytes(traffic.kv_bytes(0))} of cache"]
    deepest = max((layer.window or 0) for layer in traffic.kv) if traffic.kv else 0
    growing = sum(layer.bytes_per_position for layer in traffic.kv if layer.window is None)
    if growing:
        parts.append(f"growing by {format_bytes(growing)} per position" + (f" beyond {deepest:,}" if deepest else ""))
    return ", ".join(parts)


def _flat(record: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{part}": number for part, number in value.items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def _without_empty(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns in which nothing stands."""
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
