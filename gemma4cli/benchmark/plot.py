"""Speed over depth as a picture: prefill above, decoding with its bound below. Needs the optional matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error

FORMATS = (".png", ".svg", ".pdf")
_TOO_HIGH = 5
"""Times the fastest measurement, above which the bound is told and not drawn."""


def check_plot(target: Path) -> None:
    """Refuse before anything is measured.

    Raises: G4Error when matplotlib is missing, or the file name is not that of a picture.
    """
    if target.suffix.lower() not in FORMATS:
        raise G4Error(f"{target} is not a picture file.", hint=f"Use one of {', '.join(FORMATS)}.", exit_code=2)
    if not target.absolute().parent.is_dir():
        raise G4Error(f"{target.absolute().parent} does not exist.", hint="Make the folder first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise G4Error(
            "--plot needs matplotlib, which is not installed.", hint="pip install 'gemma4cli[plot]'"
        ) from None


def plot(document: Mapping[str, Any], target: Path) -> None:
    """Write the picture of a finished benchmark."""
    from matplotlib.figure import Figure

    records = [record for record in document["tests"] if record["path"] == "model"]
    figure = Figure(figsize=(7, 6), layout="constrained")
    prefill, decode = figure.subplots(2, 1, sharex=True)
    model, environment = document["model"], document["environment"]
    prefill.set_title(f"{model['type']} on {environment['gpu_info'] or environment['cpu_info']}", fontsize=10)
    for axes, size, verb in ((prefill, "n_prompt", "prefill"), (decode, "n_gen", "decode")):
        for count in sorted({record[size] for record in records if record[size]}):
            _line(axes, [record for record in records if record[size] == count], f"{verb}, {count} tokens")
        axes.set_ylabel(f"{verb} tokens/s")
        axes.grid(alpha=0.3)
    _bound(decode, [record for record in records if record["bound_ts"]])
    decode.set_xlabel(f"depth: tokens in the cache ({model['context_length']:,} allocated)")
    for axes in (prefill, decode):
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(target)


def _bound(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """The bound as a dashed line; only its number where it would press everything else to the ground."""
    if not records:
        return
    points = sorted((record["n_depth"], record["bound_ts"]) for record in records)
    highest, fastest = max(bound for _, bound in points), max(record["p90_ts"] for record in records)
    label = "bound: memory bandwidth"
    if highest > _TOO_HIGH * fastest:
        axes.plot([], [], "--", color="grey", label=f"{label}, {points[-1][1]:,.0f} to {highest:,.0f}, not drawn")
    else:
        axes.plot(*zip(*points, strict=True), "--", marker=".", color="grey", label=label)


def _line(axes: Any, records: Sequence[Mapping[str, Any]], label: str) -> None:
    """Medians joined by a line, with bars from p10 to p90."""
    ordered = sorted(records, key=lambda record: record["n_depth"])
    medians = [record["median_ts"] for record in ordered]
    below = [record["median_ts"] - record["p10_ts"] for record in ordered]
    above = [record["p90_ts"] - record["median_ts"] for record in ordered]
    axes.errorbar(
        [record["n_depth"] for record in ordered], medians, yerr=(below, above), marker="o", capsize=3, label=label
    )
