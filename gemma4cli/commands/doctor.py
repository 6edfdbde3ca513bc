"""`g4 doctor`: what this machine has, and what it lacks for a bundle or an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma4cli.commands.options import JsonOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.doctor.examine import Report

EXAMPLES = (
    ("Can this machine run the last bundle?", "g4 doctor"),
    ("Can it export for an H100?", "g4 doctor --target sm_90"),
    ("In a script", "g4 doctor demo-default-cpu --json"),
)


def doctor(
    target_bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE", help="What should run here.", show_default="the last one exported, if there is one"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Export for: cpu, sm_80, sm_86, sm_90, sm_120; several with commas."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Check driver, GPU, memory and compilers, and say what to do.

    Exits with 0 when everything is there that running the bundle takes (or exporting, with --target), else with 1.
    What is missing and not needed for that is listed, too.
    """
    console = open_console(json=json, quiet=quiet)
    targets = _parse_targets(target)
    workspace = Workspace.from_environment()
    bundle = _find_bundle(workspace, target_bundle, console, look=not targets)

    from gemma4cli.doctor.examine import examine

    report = examine(bundle, targets, workspace.root)
    failing = ", ".join(check.name for check in report.failing)
    console.result(report.to_json(), lambda: _draw(console, report), essence=failing or "ok")
    return 1 if report.failing else 0


def _parse_targets(text: str | None) -> tuple[str, ...]:
    from gemma4cli.kernels.targets import TARGETS

    names = () if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ("cpu", *TARGETS):
            raise G4Error(f"Unknown target {name!r}.", hint=f"Choose from cpu, {', '.join(TARGETS)}.", exit_code=2)
    return names


def _find_bundle(workspace: Workspace, given: Path | None, console: Console, *, look: bool) -> Path | None:
    """Return the bundle that was named, else the last one; none is no failure, nor is one that is gone."""
    if given is not None:
        return workspace.resolve("bundle", given, console.note)
    last = workspace.last("bundle") if look else None
    if last is None or not last.path.exists():
        return None
    return workspace.resolve("bundle", None, console.note)


def _draw(console: Console, report: Report) -> None:
    rows = [
        (check.name, f"{check.state}, needed" if check.fails else check.state, check.found, check.do)
        for check in report.checks
    ]
    console.table(("check", "state", "found", "what to do"), rows)
    wanted = f"run {report.bundle}" if report.bundle is not None else "work"
    if report.targets:
        wanted = f"export for {', '.join(report.targets)}"
    failing = report.failing
    console.line()
    if failing:
        console.line(f"To {wanted}, this lacks: {', '.join(check.name for check in failing)}.")
    else:
        console.line(f"Ready to {wanted}.")
