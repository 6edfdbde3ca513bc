"""`g4 inspect-pte`: look into a bundle, or any ExecuTorch program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4cli.commands import inspect_views as views
from gemma4cli.commands.options import JsonOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.inspection.artifact import Artifact
    from gemma4cli.inspection.predict import GpuCheck

EXAMPLES = (
    ("What the last bundle is", "g4 inspect-pte"),
    ("Does it fit a GPU, and how is its memory spent?", "g4 inspect-pte --check-gpu 5090 --memory"),
    ("Every GPU kernel of any program, as JSON", "g4 inspect-pte model.pte weights.ptd --delegates --json"),
    ("What differs between two bundles", "g4 inspect-pte --diff demo-default-cpu demo-sensitive-cpu"),
)


def inspect_pte(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BUNDLE|FILE",
            help="A bundle; or a .pte file, followed by the .ptd files it needs.",
            show_default="the last bundle exported",
        ),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Inputs, outputs and constant methods; whether g4 can run it.")
    ] = False,
    delegates: Annotated[
        bool, typer.Option("--delegates", help="Backends, operators outside them, GPU kernels and what those need.")
    ] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Every tensor, by layer and role.")] = False,
    state: Annotated[bool, typer.Option("--state", help="Caches and other buffers; bytes per token.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Predicted memory, over context length.")] = False,
    check_gpu: Annotated[
        str | None,
        typer.Option(
            "--check-gpu", metavar="GPU", help="Does it run there? a100, h100, h200, 3090, 4090, 5090, or this."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which program of a bundle for several GPU architectures.", show_default="the first"
        ),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Compare two bundles or files.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw memory over context length: .png or .svg.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all of large files: compare their SHA-256, or with --diff each weight."),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look into a bundle, or any ExecuTorch program.

    Needs no GPU and loads no weights. With --check-gpu the exit code is 1 when the program does not fit.
    """
    console = open_console(json=json, quiet=quiet)
    workspace = Workspace.from_environment()
    if plot is not None:
        from gemma4cli.inspection.plot import check_plot_path

        check_plot_path(plot)
    if diff:
        return _diff(console, workspace, paths or [], target, verify, others=bool(check_gpu or plot))
    from gemma4cli.inspection import documents
    from gemma4cli.inspection.artifact import open_artifact
    from gemma4cli.inspection.gpus import find_gpu
    from gemma4cli.inspection.predict import check_gpu as check

    gpu = find_gpu(check_gpu) if check_gpu is not None else None
    given = [workspace.resolve("bundle", path, console.note) for path in paths or [None]]
    capability = gpu.capability if gpu else None
    artifact = open_artifact(given, target=target, capability=capability, verify=verify, progress=console.progress())
    found = check(artifact, gpu) if gpu else None
    document: dict[str, Any] = {"overview": documents.overview(artifact)}
    for wanted, name in ((methods, "methods"), (delegates, "delegates"), (weights, "weights"), (state, "state")):
        if wanted:
            document[name] = getattr(documents, name)(artifact)
    if memory:
        document["memory"] = documents.memory(artifact, gpu)
    if found:
        document["check"] = documents.check(found)
    if plot is not None:
        _plot(artifact, documents.memory(artifact, gpu), plot, found)
        console.note(f"Wrote {plot}.")
    essence = views.verdict(document["check"]) if found else str(artifact.path)
    console.result(document, lambda: views.draw(console, document), essence=essence)
    if found and not found.fits:
        raise typer.Exit(1)
    return None


def _diff(
    console: Console, workspace: Workspace, paths: list[str], target: str | None, verify: bool, *, others: bool
) -> None:
    if len(paths) != 2 or others:
        what = "--diff goes with neither --check-gpu nor --plot." if others else f"--diff takes two, not {len(paths)}."
        raise G4Error(what, hint="g4 inspect-pte --diff A B", exit_code=2)
    from gemma4cli.inspection.artifact import open_artifact
    from gemma4cli.inspection.diff import compare

    a, b = (open_artifact([workspace.resolve("bundle", path, console.note)], target=target) for path in paths)
    document = compare(a, b, contents=verify, progress=console.progress())
    essence = "same" if document["same"] else "different"
    console.result(document, lambda: views.draw_diff(console, document), essence=essence)


def _plot(artifact: Artifact, document: dict[str, Any], path: Path, found: GpuCheck | None) -> None:
    from gemma4cli.inspection.plot import plot_memory

    if not document["by_context"]:
        raise G4Error(
            f"{artifact.path} does not say what its context length is, so there is nothing to draw.",
            hint="Only programs with the method get_max_context_len can be drawn.",
        )
    title = artifact.path.resolve().name + (f" on {found.gpu.name}" if found else "")
    plot_memory(document["by_context"], title, found.gpu.memory_bytes if found else None, path)
