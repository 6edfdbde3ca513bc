"""`g4 quantize`: make a smaller checkpoint by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4cli.commands.options import DeviceOption, DryRunOption, ForceOption, JsonOption, OutputOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.files import format_bytes, require_absent
from gemma4cli.quant.recipe import BUILT_IN, Recipe, load_recipe
from gemma4cli.workspace import Workspace, name_of

if TYPE_CHECKING:
    from gemma4cli.quant.manifest import CheckpointManifest
    from gemma4cli.quant.quantize import QuantizationPlan

EXAMPLES = (
    ("Quantize the last model pulled, with the default recipe", "g4 quantize"),
    ("Keep more quality; see first what it will take", "g4 quantize --recipe sensitive --dry-run"),
    ("Print a recipe, to start a file of your own from", "g4 quantize --recipe show:sensitive > mine.toml"),
    ("A recipe of your own, on a GPU", "g4 quantize ~/models/gemma-4-31B-it --recipe mine.toml --device cuda"),
)

_SHOW = "show"
_WORST = 5


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The checkpoint to quantize.", show_default="the last one pulled"),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE|show[:NAME]",
            help=f"A built-in recipe ({', '.join(BUILT_IN)}) or a TOML file; show prints recipes and stops.",
        ),
    ] = "default",
    output: OutputOption = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a smaller checkpoint by a recipe.

    A run that was interrupted continues where it stopped.
    """
    console = open_console(json=json, quiet=quiet)
    workspace = Workspace.from_environment()
    if recipe == _SHOW or recipe.startswith(f"{_SHOW}:"):
        names = [recipe.removeprefix(f"{_SHOW}:")] if ":" in recipe else list(BUILT_IN)
        return _show(console, workspace, model, [load_recipe(name) for name in names])
    chosen = load_recipe(recipe)
    source = workspace.resolve("model", model, console.note)
    name = f"{name_of(source)}-{chosen.name}"
    if dry_run:
        return _dry_run(console, source, output or workspace.folder("checkpoint") / name, chosen)
    target = output or workspace.new_path("checkpoint", name)
    require_absent(target, force)

    from gemma4cli.quant.quantize import quantize_checkpoint

    manifest = quantize_checkpoint(source, target, chosen, device=device, force=force, progress=console.progress())
    workspace.remember("checkpoint", target)
    _report(console, manifest, target)
    console.next("g4 export")
    return None


def _show(console: Console, workspace: Workspace, model: str | None, recipes: list[Recipe]) -> None:
    """Print one recipe as a TOML file, or a table of several; with the bits per weight of the model at hand."""
    at_hand = model is not None or workspace.last("model") is not None
    source = workspace.resolve("model", model, console.note) if at_hand else None
    if source is None:
        console.note("No model was given or pulled, so the bits per weight are not known.")
    plans = [_plan(source, recipe) if source else None for recipe in recipes]
    documents = [_recipe_document(recipe, plan) for recipe, plan in zip(recipes, plans, strict=True)]

    def render_one() -> None:
        document = documents[0]
        if source is not None:
            console.line(f"# {document['bits_per_weight']:.2f} bits per weight for {name_of(source)}")
        console.line(recipes[0].to_toml([_rule_comment(rule) for rule in document["rules"]]))

    def render_all() -> None:
        rows = [(d["name"], d["description"], _two_digits(d.get("bits_per_weight"))) for d in documents]
        console.table(("recipe", "what it does", "bits/weight"), rows, align="llr")

    one = len(documents) == 1
    console.result(documents[0] if one else documents, render_one if one else render_all)


def _plan(source: Path, recipe: Recipe) -> QuantizationPlan:
    from gemma4cli.quant.quantize import plan_quantization

    return plan_quantization(source, recipe)


def _recipe_document(recipe: Recipe, plan: QuantizationPlan | None) -> dict[str, Any]:
    document = recipe.to_json()
    if plan is None:
        return document
    for number, section in enumerate(document["rules"], start=1):
        section["tensors"], section["bits_per_weight"] = plan.bits_of_rule(number)
    return document | {"bits_per_weight": plan.totals.bits_per_weight}


def _rule_comment(rule: dict[str, Any]) -> str | None:
    if "tensors" not in rule:
        return None
    if not rule["tensors"]:
        return "matches nothing in this model"
    tensors = "1 tensor" if rule["tensors"] == 1 else f"{rule['tensors']} tensors"
    return f"{tensors} at {rule['bits_per_weight']:.2f} bits per weight"


def _two_digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _dry_run(console: Console, source: Path, target: Path, recipe: Recipe) -> None:
    from gemma4cli.quant.quantize import Fit

    plan = _plan(source, recipe)
    fit, totals = Fit.of(plan, target), plan.totals
    document = {
        "output": str(target),
        "exists": target.exists(),
        "recipe": recipe.name,
        "files": fit.files,
        "total_bytes": fit.total_bytes,
        "source_bytes": totals.source_bytes,
        "bits_per_weight": totals.bits_per_weight,
        "free_disk_bytes": fit.free_disk_bytes,
        "peak_memory_bytes": fit.peak_memory_bytes,
        "available_memory_bytes": fit.available_memory_bytes,
        "fits": fit.fits,
    }

    def render() -> None:
        console.table(("file", "size"), [(name, format_bytes(size)) for name, size in fit.files.items()], align="lr")
        console.line(f"{target}: {format_bytes(fit.total_bytes)}, {totals.bits_per_weight:.2f} bits per weight")
        console.line(f"disk: {format_bytes(fit.free_disk_bytes)} free")
        peak, free = format_bytes(fit.peak_memory_bytes), format_bytes(fit.available_memory_bytes)
        console.line(f"memory: up to {peak} of {free} available")
        console.line("fits" if fit.fits else "does not fit")

    console.result(document, render, essence="fits" if fit.fits else "does not fit")
    if target.exists():
        console.warn(f"{target} already exists; writing it will need --force.")


def _report(console: Console, manifest: CheckpointManifest, target: Path) -> None:
    totals = manifest.head.totals
    quantized = {name: t for name, t in manifest.tensors.items() if t.relative_error}
    worst = sorted(quantized, key=lambda name: -quantized[name].relative_error)[:_WORST]
    document = {
        "checkpoint": str(target),
        "recipe": manifest.head.recipe["name"],
        "bits_per_weight": totals.bits_per_weight,
        "source_bytes": totals.source_bytes,
        "weight_bytes": totals.weight_bytes,
        "tensors": len(manifest.tensors),
        "worst": [
            {
                "name": name,
                "format": quantized[name].format,
                "bits_per_weight": quantized[name].bits_per_weight,
                "relative_error": quantized[name].relative_error,
                "snr_db": quantized[name].snr_db,
            }
            for name in worst
        ],
    }

    def render() -> None:
        before, after = format_bytes(totals.source_bytes), format_bytes(totals.weight_bytes)
        console.line(f"{target}: {before} -> {after}, {totals.bits_per_weight:.2f} bits per weight")
        console.line("Largest errors, relative to the tensor:")
        rows = [
            (t["name"], t["format"], f"{t['bits_per_weight']:.2f}", f"{t['relative_error']:.4f}", f"{t['snr_db']:.1f}")
            for t in document["worst"]
        ]
        console.table(("tensor", "format", "bits/weight", "error", "SNR dB"), rows, align="llrrr")

    console.result(document, render, essence=str(target))
