"""`g4 pull`: make a model known to the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma4cli.commands.options import ForceOption, JsonOption, QuietOption
from gemma4cli.console import open_console
from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace

EXAMPLES = (
    ("The small model that comes with g4", "g4 pull demo"),
    ("A checkpoint you already have; nothing is copied", "g4 pull ~/models/gemma-4-31B-it"),
)


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo, or the path of a checkpoint.")],
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Get a model and make it the one the next command uses."""
    console = open_console(json=json, quiet=quiet)
    workspace = Workspace.from_environment()
    path = _copy_demo(workspace, force) if model == "demo" else _local(model)
    workspace.remember("model", path)
    console.result(
        {"model": model, "path": str(path)}, lambda: console.line(f"{model} is at {path}"), essence=str(path)
    )
    console.next("g4 quantize")


def _copy_demo(workspace: Workspace, force: bool) -> Path:
    """Copy the packaged model into the workspace; a copy that is already there is kept unless forced."""
    import shutil

    from gemma4cli.files import atomic_directory

    source = Path(__file__).parent.parent / "data" / "demo"
    if not source.is_dir():
        raise G4Error("The demo model is missing from this installation of g4.", hint="Install g4 again.")
    target = workspace.new_path("model", "demo")
    if target.exists() and not force:
        return target
    with atomic_directory(target, force=force) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return target


def _local(model: str) -> Path:
    path = Path(model).expanduser()
    if not path.exists():
        raise G4Error(
            f"{model} is neither a known model nor an existing path.", hint="g4 pull demo gets the small model."
        )
    return path.absolute()
