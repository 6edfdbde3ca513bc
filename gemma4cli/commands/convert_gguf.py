"""`g4 convert-gguf`: make a checkpoint of a GGUF file, keeping its integer codes."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4cli.commands.options import DryRunOption, ForceOption, JsonOption, OutputOption, QuietOption
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes, require_absent
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.quant.gguf.convert import ConversionPlan
    from gemma4cli.quant.manifest import CheckpointManifest

EXAMPLES = (
    ("Convert the GGUF file pulled last", "g4 convert-gguf"),
    ("Convert a file; see first what it would take", "g4 convert-gguf gemma-4-31B-it-Q4_K_M.gguf --dry-run"),
    ("A split model: name one part, or all of them", "g4 convert-gguf model-00001-of-00003.gguf -o ~/models/gemma4"),
)
_WORST = 5


def convert_gguf(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="A .gguf file, or the parts of one.", show_default="the last one pulled"),
    ] = None,
    output: OutputOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a quantized checkpoint of a GGUF file.

    Codes and scales are kept exactly; the few types that have no form here are quantized again, and the error is told.
    Config, tokenizer, chat template and sampling defaults come out of the file. g4 export and g4 run take a .gguf file
    directly and do this on the way.
    """
    console = open_console(json=json, quiet=quiet)
    workspace = Workspace.from_environment()
    paths = [path.expanduser() for path in files] if files else [_last_pulled(workspace, console)]

    from gemma4cli.quant.gguf import convert

    gc.freeze()  # what was imported is not looked through for garbage again and again

    if dry_run:
        plan = convert.plan_conversion(paths)
        target = output or workspace.folder("checkpoint") / convert.model_name(paths[0])
        return _dry_run(console, plan, convert.remarks(plan), target)
    target = output or workspace.new_path("checkpoint", convert.model_name(paths[0]))
    require_absent(target, force)
    manifest = convert.convert_gguf(paths, target, force=force, progress=console.progress())
    workspace.remember("checkpoint", target)
    _report(console, manifest, target)
    console.next("g4 export")
    return None


def _last_pulled(workspace: Workspace, console: Console) -> Path:
    path = workspace.resolve("model", None, console.note)
    if path.suffix.lower() != ".gguf":
        raise G4Error(f"The last model pulled, {path}, is not a GGUF file.",
                      hint="Name one, or use g4 quantize for this model.")  # fmt: skip
    return path


def _dry_run(console: Console, plan: ConversionPlan, remarks: list[str], target: Path) -> None:
    from gemma4cli.quant.quantize import Fit

    fit, totals = Fit.of(plan, target), plan.totals
    verdict = "fits" if fit.fits else "does not fit"
    document: dict[str, Any] = {
        "output": str(target),
        "exists": target.exists(),
        "types": plan.types,
        "files": fit.files,
        "total_bytes": fit.total_bytes,
        "source_bytes": totals.source_bytes,
        "bits_per_weight": totals.bits_per_weight,
        "free_disk_bytes": fit.free_disk_bytes,
        "peak_memory_bytes": fit.peak_memory_bytes,
        "available_memory_bytes": fit.available_memory_bytes,
        "fits": fit.fits,
        "remarks": remarks,
    }

    def render() -> None:
        console.table(("file", "size"), [(name, format_bytes(size)) for name, size in fit.files.items()], align="lr")
        console.line(f"{target}: {format_bytes(fit.total_bytes)}, {totals.bits_per_weight:.2f} bits per weight")
        console.line(", ".join(f"{count} tensors {kind}" for kind, count in plan.types.items()))
        console.line(f"disk: {format_bytes(fit.free_disk_bytes)} free")
        peak, available = format_bytes(fit.peak_memory_bytes), format_bytes(fit.available_memory_bytes)
        console.line(f"memory: up to {peak} of {available} available")
        console.line(verdict)

    console.result(document, render, essence=verdict)
    for sentence in remarks:
        console.note(sentence)
    if target.exists():
        console.warn(f"{target} already exists; writing it will need --force.")


def _report(console: Console, manifest: CheckpointManifest, target: Path) -> None:
    totals = manifest.head.totals
    by_error = sorted(manifest.tensors, key=lambda name: -(manifest.tensors[name].relative_error or 0.0))
    worst = [name for name in by_error[:_WORST] if manifest.tensors[name].relative_error]
    exact = sum(1 for record in manifest.tensors.values() if not record.relative_error)
    document = {
        "checkpoint": str(target),
        "types": manifest.head.recipe["types"],
        "bits_per_weight": totals.bits_per_weight,
        "source_bytes": totals.source_bytes,
        "weight_bytes": totals.weight_bytes,
        "tensors": len(manifest.tensors),
        "exact_tensors": exact,
        "worst": [{"name": name, **asdict(manifest.tensors[name])} for name in worst],
    }

    def render() -> None:
        before, after = format_bytes(totals.source_bytes), format_bytes(totals.weight_bytes)
        console.line(f"{target}: {before} -> {after}, {totals.bits_per_weight:.2f} bits per weight")
        console.line(f"{exact} of {len(manifest.tensors)} tensors have exactly the file's values.")
        if worst:
            console.line("Largest errors, relative to the tensor:")
            rows = [
                (name, t.method, t.format, f"{t.relative_error:.4f}", f"{t.snr_db:.1f}")
                for name, t in ((name, manifest.tensors[name]) for name in worst)
            ]
            console.table(("tensor", "was", "is", "error", "SNR dB"), rows, align="lllrr")

    console.result(document, render, essence=str(target))
