"""The result as text: facts for people, and CSV, JSON lines and Markdown for everything else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma4cli.files import format_bytes

if TYPE_CHECKING:
    from gemma4cli.benchmark.run import Head

Record = Mapping[str, Any]

_GB = 1e9


def head_lines(head: Head) -> list[str]:
    """What is printed before the tests run: what is measured, and how fast decoding could be."""
    model, engine, roofline = head.subject, head.engine, head.roofline
    traffic = roofline.traffic
    facts = [
        ("model", f"{model['type']}, {format_bytes(model['weight_bytes'])} of weights: {model['path']}"),
        ("engine", f"{engine['name']}, {engine['backends']}, {plural(engine['threads'], 'thread')}"),
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
        facts.append(("", f"so at most {rate(band.best / (traffic.weight_bytes + traffic.kv_bytes(0)))} tokens/s"))
    return [f"{name + ':' if name else '':11}{text}" for name, text in facts]


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
        lines += ["| " + " | ".join(row) + " |" for row in versus_rows(versus)]
    environment, engine = document["environment"], document["engine"]
    machine = environment["gpu_info"] or environment["cpu_info"]
    lines += ["", f"{machine}; context {document['model']['context_length']:,}; g4 {environment['g4']} "
              f"({environment['commit'] or 'installed'}), torch {environment['torch']}, executorch "
              f"{environment['executorch']}; {engine['name']}; {environment['test_time']}"]  # fmt: skip
    return "\n".join(lines)


def essence(document: Record) -> str:
    """The one line of --quiet: each test and its median."""
    return ", ".join(f"{record['test']} {rate(record['median_ts'])}" for record in document["tests"])


def versus_rows(versus: Record) -> list[list[str]]:
    """Test, both rates and their ratio."""
    return [
        [
            row["test"],
            "" if row["g4_ts"] is None else rate(row["g4_ts"]),
            rate(row["median"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        ]
        for row in versus["tests"]
    ]


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


def rate(value: float) -> str:
    """Render tokens per second with three significant digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plural(count: int, noun: str) -> str:
    """Render a count of things."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
