"""The regression gate: what counts as slower, and that it never passes by comparing nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma4cli.benchmark.baseline import compare, parse_limit, read_baseline
from gemma4cli.errors import G4Error


def record(test: str, median: float, path: str = "model", **more) -> dict:
    return {"test": test, "path": path, "median_ts": median, "n_threads": 2, "cpu_info": "A CPU", **more}


def test_slower_than_the_limit_is_a_regression_and_exactly_the_limit_is_not() -> None:
    before = [record("tg128", 100.0), record("pp512", 1000.0), record("tg128", 80.0, "text")]
    now = [record("tg128", 94.9), record("pp512", 950.0), record("tg128", 90.0, "text")]
    comparison = compare(before, now, 0.05)
    assert [(change.test, change.path) for change in comparison.regressions] == [("tg128", "model")]
    assert comparison.regressions[0].change == pytest.approx(-0.051)
    assert compare(before, now, 0.06).regressions == []
    assert comparison.to_json()["regressed"] is True


def test_what_differs_and_what_is_missing_is_told() -> None:
    before = [record("tg128", 100.0), record("tg128 @ d8192", 90.0)]
    comparison = compare(before, [record("tg128", 100.0, n_threads=4), record("pp512", 1.0)], 0.05)
    assert comparison.different == [("n_threads", 2, 4)]
    assert comparison.missing == ["tg128 @ d8192"]
    assert [change.test for change in comparison.changes] == ["tg128"]


def test_a_gate_that_compares_nothing_does_not_pass() -> None:
    with pytest.raises(G4Error, match="no test in common") as caught:
        compare([record("pp512", 1.0), record("tg64", 2.0)], [record("tg128", 1.0)], 0.05)
    assert caught.value.hint == "It has pp512, tg64."


def test_json_and_jsonl_are_read(tmp_path: Path) -> None:
    records = [record("tg128", 1.5), record("pp512", 2.5)]
    (tmp_path / "a.json").write_text(json.dumps({"environment": {}, "tests": records}, indent=2))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "one.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert read_baseline(tmp_path / "a.json") == read_baseline(tmp_path / "a.jsonl") == records
    assert read_baseline(tmp_path / "one.jsonl") == records[:1]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"5", b"tg128 5\n", b"\xff\xfe", b'{"tests": 5}', b'{"tests": []}', b'{"tests": [5]}',
     b'{"test": "a", "median_ts": null}', b'{"test": "a", "median_ts": 0}', b'{"test": 1, "median_ts": 2}',
     b'{"test": "a", "median_ts": 1}\n{"test": "b"}\n'],
)  # fmt: skip
def test_anything_else_is_no_baseline(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(G4Error, match=r"x is not a result of g4 bench\."):
        read_baseline(tmp_path / "x")


def test_a_baseline_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(G4Error, match="does not exist"):
        read_baseline(tmp_path / "none.json")
    with pytest.raises(G4Error, match="is not a result"):
        read_baseline(tmp_path)


@pytest.mark.parametrize(("text", "limit"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), (" 12.5 %", 0.125)])
def test_limits_are_shares(text: str, limit: float) -> None:
    assert parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["5", "-1%", "100%", "nan", "five", "", "%"])
def test_anything_else_is_no_limit(text: str) -> None:
    with pytest.raises(G4Error, match="is not a share to fail below"):
        parse_limit(text)
