"""`g4 pull`: get a model and make it the one the next command uses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4cli.commands.options import JsonOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.hub.catalog import CATALOG, DEFAULT_NAME, Entry, Variant
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.hub.headers import Contents
    from gemma4cli.hub.machine import Machine
    from gemma4cli.hub.pull import Plan
    from gemma4cli.hub.resolve import HubModel

EXAMPLES = (
    ("The small model that comes with g4", "g4 pull demo"),
    ("Gemma 4 31B-IT, quantized by llama.cpp; see what it would cost first", "g4 pull 31b-gguf:Q4_K_M --dry-run"),
    ("Any repository, at a branch, tag or commit", "g4 pull owner/repo@v1.0"),
    ("A checkpoint you already have; nothing is copied", "g4 pull ~/models/gemma-4-31B-it"),
)
_NEXT = {"safetensors": "g4 quantize", "torchao": "g4 export", "gguf": "g4 convert-gguf"}
_EXIT_INTERRUPTED = 130


def pull(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A short name (--list), owner/repo[:QUANT][@REVISION], or a path."),
    ] = DEFAULT_NAME,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of the repository.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="Show the short names, their sizes, and what fits this machine.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no server: use only what the cache holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Fetch nothing: show files, bytes, free disk, and whether it fits.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch or copy again what is already there.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Get a model and make it the one the next command uses.

    Files go into the Hugging Face cache (HF_HOME), where other tools find them too; an interrupted pull goes on where
    it stopped. HF_TOKEN, HF_ENDPOINT and proxies are respected.
    """
    console = open_console(json=json, quiet=quiet)
    if list_models:
        _list(console)
        return

    from gemma4cli.hub.resolve import DemoModel, LocalModel, resolve

    name = resolve(model, revision)
    if isinstance(name, DemoModel):
        _pull_demo(console, dry_run, force)
    elif isinstance(name, LocalModel):
        _register(console, name.path, dry_run)
    else:
        _pull_from_hub(console, name, offline=offline, dry_run=dry_run, force=force)


def _pull_from_hub(console: Console, model: HubModel, *, offline: bool, dry_run: bool, force: bool) -> None:
    from huggingface_hub import constants

    from gemma4cli.hub import pull as hub_pull
    from gemma4cli.hub.client import Hub
    from gemma4cli.hub.machine import Machine

    progress = console.progress()
    hub = Hub(say=progress.note)
    try:
        if offline or constants.is_offline_mode():
            plan = hub_pull.plan_offline(model)
        else:
            plan = hub_pull.plan(hub, model, force=force)
        machine = Machine.probe(plan.main.cache.root)
        workspace = Workspace.from_environment()
        if not dry_run:
            console.note(_sentence(plan))
            hub_pull.execute(hub, plan, workspace.folder("model"), progress, force=force)
    except KeyboardInterrupt:
        raise G4Error(
            "Interrupted.",
            hint=f"g4 pull {model} goes on where this stopped.",
            exit_code=_EXIT_INTERRUPTED,
        ) from None
    path = plan.path(workspace.folder("model"))
    if plan.absent:
        console.warn(f"{plan.model} has no {' and no '.join(plan.absent)}; g4 run will ask for them.")
    if not dry_run:
        workspace.remember("model", path, plan.origin)
    document = _document(plan, path, machine, dry_run)
    console.result(document, lambda: _render(console, plan, path, machine, dry_run), essence=str(path))
    if not dry_run:
        console.next(_NEXT[plan.contents.format])


def _sentence(plan: Plan) -> str:
    cached = plan.total_bytes - plan.download_bytes
    there = f", {format_bytes(cached)} are here already" if cached else ""
    return (
        f"{plan.model} at {plan.main.source.commit[:8]}: {plan.contents.precision}, "
        f"{sum(len(portion.files) for portion in plan.portions)} files, "
        f"{format_bytes(plan.total_bytes)}{there}."
    )


def _document(plan: Plan, path: Path, machine: Machine, dry_run: bool) -> dict[str, Any]:
    return {
        "model": str(plan.model),
        **plan.origin,
        "path": str(path),
        **asdict(plan.contents),
        "files": [
            {
                "repo": portion.source.repo,
                "name": file.name,
                "bytes": file.size,
                "missing_bytes": portion.missing[file.name],
                "hash": file.etag,
            }
            for portion in plan.portions
            for file in portion.files
        ],
        "skipped": list(plan.selection.skipped),
        "total_bytes": plan.total_bytes,
        "download_bytes": plan.download_bytes,
        "disk_free_bytes": machine.disk_free_bytes,
        "fits_disk": plan.download_bytes <= machine.disk_free_bytes,
        "runs": machine.runs(plan.run_bytes),
        "dry_run": dry_run,
    }


def _render(console: Console, plan: Plan, path: Path, machine: Machine, dry_run: bool) -> None:
    if not dry_run:
        console.line(f"{plan.model} is at {path}")
        return
    rows = [
        (file.name, format_bytes(file.size), format_bytes(portion.missing[file.name]))
        for portion in plan.portions
        for file in portion.files
    ]
    rows.append(("total", format_bytes(plan.total_bytes), format_bytes(plan.download_bytes)))
    console.table(("file", "size", "to fetch"), rows, align="lrr", title=_sentence(plan))
    if plan.selection.skipped:
        console.line(f"not needed for text: {', '.join(plan.selection.skipped)}")
    verdict = machine.disk_verdict(plan.download_bytes)
    console.line(f"disk: {verdict} ({format_bytes(machine.disk_free_bytes)} free at {plan.main.cache.root})")
    console.line(f"runs on: {machine.runs(plan.run_bytes)}")


def _pull_demo(console: Console, dry_run: bool, force: bool) -> None:
    """Copy the packaged model into the workspace; an equal copy that is already there is kept."""
    import filecmp
    import shutil

    from gemma4cli.files import atomic_directory

    source = _demo_folder()
    if not source.is_dir():
        raise G4Error("The demo model is missing from this installation of g4.", hint="Install g4 again.")
    workspace = Workspace.from_environment()
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    target = workspace.folder("model") / "demo"
    equal = target.is_dir() and filecmp.cmpfiles(source, target, names, shallow=False)[0] == names
    if not dry_run and (force or not equal):
        workspace.new_path("model", "demo")
        with atomic_directory(target, force=True) as folder:
            for name in names:
                shutil.copyfile(source / name, folder / name)
    _finish_local(console, "demo", target, source, dry_run)


def _register(console: Console, path: Path, dry_run: bool) -> None:
    _finish_local(console, str(path), path, path, dry_run)


def _finish_local(console: Console, model: str, path: Path, read_from: Path, dry_run: bool) -> None:
    """Check a model on this machine and remember it."""
    from gemma4cli.hub.headers import inspect

    contents: Contents = inspect(read_from)
    if not dry_run:
        Workspace.from_environment().remember("model", path)
    size = _size_of(read_from)
    document = {"model": model, "path": str(path), **asdict(contents), "total_bytes": size, "dry_run": dry_run}
    text = f"{model} {'would be' if dry_run else 'is'} at {path}: {contents.precision}, {format_bytes(size)}"
    console.result(document, lambda: console.line(text), essence=str(path))
    if not dry_run:
        console.next(_NEXT[contents.format])


def _demo_folder() -> Path:
    return Path(__file__).parent.parent / "data" / "demo"


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _list(console: Console) -> None:
    from huggingface_hub import constants

    from gemma4cli.hub.machine import Machine

    machine = Machine.probe(Path(constants.HF_HUB_CACHE))
    models = [_listed(entry, variant, machine) for entry in CATALOG for variant in entry.variants]
    document = {"models": models, "machine": asdict(machine), "default": DEFAULT_NAME}

    def render() -> None:
        rows = [
            (m["name"], m["format"], _size_text(m), m["disk"], m["runs"], m["repo"] or "comes with g4") for m in models
        ]
        console.table(("name", "format", "download", "disk", "runs on", "from"), rows, align="llrlll")
        gpu = f"{machine.gpu_name} {format_bytes(machine.gpu_bytes)}" if machine.gpu_bytes else "no GPU"
        console.line(
            f"this machine: {format_bytes(machine.disk_free_bytes)} free disk, "
            f"{format_bytes(machine.memory_bytes)} memory, {gpu}"
        )

    console.result(document, render, essence="\n".join(m["name"] for m in models))


def _listed(entry: Entry, variant: Variant, machine: Machine) -> dict[str, Any]:
    size = variant.download_bytes
    if size is None:
        folder = _demo_folder()
        size = _size_of(folder) if folder.is_dir() else 0
    return {
        "name": f"{entry.name}:{variant.selector}" if variant.selector else entry.name,
        "about": entry.about,
        "format": entry.format,
        "download_bytes": size,
        "exact": variant.exact or variant.download_bytes is None,
        "size_source": variant.source,
        "disk": machine.disk_verdict(size),
        "runs": machine.runs(variant.run_bytes),
        "repo": entry.repo,
    }


def _size_text(model: dict[str, Any]) -> str:
    return ("" if model["exact"] else "~") + format_bytes(model["download_bytes"])
