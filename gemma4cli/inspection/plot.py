"""A picture of predicted memory by part over context length. Needs matplotlib, an optional package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error

FORMATS = (".png", ".svg")
_MIB, _GIB = 1 << 20, 1 << 30
_PARTS = (
    ("weights", "weights", "#4477aa"),
    ("workspace", "workspace", "#66ccee"),
    ("device_context", "CUDA context", "#ccbb44"),
    ("state", "caches", "#ee6677"),
)


def check_plot_path(path: Path) -> None:
    """Refuse what cannot be drawn before any work is done: another format, no matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise G4Error(f"{path} is neither a .png nor an .svg file.", exit_code=2)
    if not path.absolute().parent.is_dir():
        raise G4Error(f"{path.absolute().parent} does not exist.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise G4Error("Plots need matplotlib, which is not installed.", hint="pip install 'gemma4cli[plot]'") from None


def plot_memory(rows: list[dict[str, Any]], title: str, limit_bytes: int | None, path: Path) -> None:
    """Draw stacked areas; `rows` are those of documents.memory, `limit_bytes` a GPU's memory.

    The file is written whole or not at all, and is the same for the same numbers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "g4"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        tokens = [row["tokens"] for row in rows]
        parts = [part for part in _PARTS if any(row[part[0]] for row in rows)]
        unit, name = (_GIB, "GiB") if rows[-1]["total"] >= _GIB else (_MIB, "MiB")
        areas = [[row[key] / unit for row in rows] for key, _, _ in parts]
        axes.stackplot(tokens, areas, labels=[label for _, label, _ in parts], colors=[color for _, _, color in parts])
        if limit_bytes is not None:
            axes.axhline(limit_bytes / unit, color="black", linestyle="--", linewidth=1, label="memory of the GPU")
        axes.set_xlabel("context length in tokens")
        axes.set_ylabel(f"memory in {name}")
        ticks = [count for count in tokens if count >= tokens[-1] / 8] or tokens
        axes.set_xticks(ticks, [format_tokens(count) for count in ticks])
        axes.set_xlim(tokens[0], tokens[-1])
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=10)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", frameon=False)
        partial = path.with_name(f".{path.name}.partial")
        try:
            figure.savefig(
                partial, format=path.suffix[1:].lower(), dpi=150, metadata={_UNSTABLE[path.suffix.lower()]: None}
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# What matplotlib writes of itself that changes with its version or the time.
_UNSTABLE = {".png": "Software", ".svg": "Date"}


def format_tokens(count: int) -> str:
    """Write a context length as people do: 4k, 319."""
    return f"{count >> 10}k" if count and count % 1024 == 0 else f"{count:,}"
