"""Compare with an earlier result: what became slower than a limit allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error

DEFAULT_LIMIT = 0.05
_SAME = ("cpu_info", "gpu_info", "n_threads", "backends", "model_size", "n_ctx")


@dataclass(frozen=True)
class Change:
    """One test then and now: medians in tokens per second; `change` is -0.1 for ten percent slower."""

    test: str
    path: str
    before: float
    now: float
    change: float
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    """All changes, tests of the baseline that were not run now, and settings that differ: (name, before, now)."""

    limit: float
    changes: list[Change]
    missing: list[str]
    different: list[tuple[str, Any, Any]]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regressed]

    def to_json(self) -> dict[str, Any]:
        return {
            "fail_below": self.limit,
            "regressed": bool(self.regressions),
            "tests": [asdict(change) for change in self.changes],
            "not_run": self.missing,
            "different": [{"name": name, "before": before, "now": now} for name, before, now in self.different],
        }


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """Read the records of an earlier `g4 bench --json` or `--jsonl`.

    Raises: G4Error when the file is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise G4Error(f"{path} does not exist.", hint="Make a baseline: g4 bench --json > FILE") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise G4Error(f"{path} is not a result of g4 bench.", hint="Make one: g4 bench --json > FILE") from None
    records = _parse(text)
    if not records or not all(_is_record(record) for record in records):
        raise G4Error(f"{path} is not a result of g4 bench.", hint="Make one: g4 bench --json > FILE")
    return records


def compare(before: list[dict[str, Any]], now: list[dict[str, Any]], limit: float) -> Comparison:
    """Match tests by name and path.

    Raises: G4Error when the two have no test in common: a gate that compares nothing must not pass.
    """
    then = {_key(record): record for record in before}
    today = {_key(record): record for record in now}
    shared = [key for key in today if key in then]
    if not shared:
        raise G4Error(
            "The baseline has no test in common with this run.",
            hint=f"It has {', '.join(sorted({name for _, name in then}))}.",
        )
    changes = []
    for key in shared:
        old, new = then[key]["median_ts"], today[key]["median_ts"]
        changes.append(Change(key[1], key[0], old, new, new / old - 1, regressed=new < old * (1 - limit)))
    first_then, first_now = then[shared[0]], today[shared[0]]
    different = [
        (name, first_then.get(name), first_now.get(name))
        for name in _SAME
        if first_then.get(name) != first_now.get(name)
    ]
    return Comparison(limit, changes, [name for path, name in then if (path, name) not in today], different)


def parse_limit(text: str) -> float:
    """Read `5%` or `0.05`."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise G4Error(f"{text!r} is not a share to fail below.", hint="Write 5% or 0.05.", exit_code=2)
    return value


def _parse(text: str) -> list[Any]:
    """Parse one document or one per line; nothing at all when it is neither."""
    try:
        document = json.loads(text)
    except ValueError:
        pass
    else:
        tests = document.get("tests", [document]) if isinstance(document, dict) else None
        return tests if isinstance(tests, list) else []
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        return []


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("test"), str):
        return False
    median = record.get("median_ts")
    return isinstance(median, int | float) and median > 0


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record.get("path", "model")), str(record["test"])
