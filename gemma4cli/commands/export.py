"""`g4 export`: make a bundle that ExecuTorch runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4cli.commands.options import (
    ContextOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    OutputOption,
    QuietOption,
    parse_count,
    parse_gibibytes,
)
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import BundleManifest, describe
from gemma4cli.files import format_bytes, require_absent
from gemma4cli.inspection.gpus import this_gpu
from gemma4cli.kernels.targets import target_for_capability
from gemma4cli.quant.recipe import BUILT_IN, load_recipe
from gemma4cli.quant.torchao_format import is_quantized_folder
from gemma4cli.workspace import Workspace, name_of

if TYPE_CHECKING:
    from gemma4cli.export.export import ExportPlan, ExportSpec
    from gemma4cli.progress import Progress
    from gemma4cli.quant.gguf.convert import ConversionPlan
    from gemma4cli.quant.quantize import QuantizationPlan

EXAMPLES = (
    ("Export the last model pulled or quantized for the CPU", "g4 export"),
    ("A longer context; see first what it will take", "g4 export --ctx 32k --dry-run"),
    ("A checkpoint by name, in 8 GB of memory", "g4 export gemma-4-31B-it-default --low-memory"),
    ("For a 24 GB GPU, at the full 128k; no GPU is needed", "g4 export --ctx 128k --target sm_86 --vram 24"),
    ("A model that was not quantized, in full precision", "g4 export demo --recipe none -o demo-float32"),
)

_NO_RECIPE = "none"
_WORST = 5


def export(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, a plain model or a GGUF file.",
            show_default="the last one pulled or quantized",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What will run it: cpu or cuda.", show_default="cuda with --target or a GPU, else cpu"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH,…",
            help="GPU architectures to compile for: sm_80, sm_86, sm_90, sm_120; no GPU is needed for it.",
            show_default="that of the GPU here, else all",
        ),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="CUDA: cache of the full layers: auto, bf16, q8, tq4, or folded, folded-q8, folded-tq4.",
        ),
    ] = "auto",
    vram: Annotated[
        int | None,
        typer.Option(
            metavar="GIB",
            parser=parse_gibibytes,
            help="CUDA: memory that weights, caches and all must fit into.",
            show_default="that of the GPU here, else 24",
        ),
    ] = None,
    ctx: ContextOption = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            metavar="TOKENS",
            parser=parse_count,
            help="Most prompt tokens per step.",
            show_default="256, CUDA 512",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|none",
            help=f"How to quantize a model that is not ({', '.join(BUILT_IN)}, a TOML file), or none to keep it.",
            show_default="default",
        ),
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="What every export does: weights pass through memory piece by piece.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="CUDA: run the program on this machine's GPU and compare it with the model."),
    ] = False,
    output: OutputOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a bundle that ExecuTorch runs.

    One folder with program, weights, tokenizer, chat template and manifest.
    """
    console = open_console(json=json, quiet=quiet)
    workspace = Workspace.from_environment()
    wanted = None if recipe == _NO_RECIPE else load_recipe(recipe or BUILT_IN[0])
    source = workspace.resolve_source(model, console.note)
    is_quantized = _is_quantized(source)
    if is_quantized and recipe is not None:
        raise G4Error(f"{source} is quantized already.", hint="Leave --recipe away, or name the original model.")
    if backend == "cpu" and target:
        raise G4Error("--target names GPU architectures.", hint="Leave it away, or use --backend cuda.", exit_code=2)
    backend = backend or ("cuda" if target or has_gpu() else "cpu")
    if backend == "cpu" and (kv != "auto" or vram is not None):
        raise G4Error(
            f"{'--kv' if kv != 'auto' else '--vram'} is about GPUs.",
            hint="Leave it away, or name a --target.",
            exit_code=2,
        )
    if verify and backend != "cuda":
        raise G4Error("--verify checks compiled CUDA code.", hint="Leave it away, or name a --target.", exit_code=2)
    if verify and not has_gpu():
        raise G4Error(
            "--verify needs a GPU, and this machine has none.", hint="Export without it, verify where one is."
        )
    if verify and target:
        require_own_target(target, target_for_capability(this_gpu().capability).name)
    first = None if is_quantized else wanted
    name = "-".join(filter(None, (name_of(source), first and first.name, backend, _short(ctx))))
    bundle = output or workspace.folder("bundle") / name
    if not dry_run:
        require_absent(bundle, force)

    from gemma4cli.export.export import ExportSpec, export_bundle, find_backend, plan_export
    from gemma4cli.export.sources import ensure_quantized, plan_quantization, planned

    find_backend(backend)
    checkpoints, progress = workspace.folder("checkpoint"), console.progress()
    conversion = None
    if source.is_file() and first is not None:  # weights that are quantized already are packed straight from the file
        source, conversion = _converted(source, checkpoints, progress, plan_only=dry_run, quantize=first is not None)
    spec = ExportSpec(
        source,
        bundle,
        backend,
        ctx,
        chunk,
        force,
        targets=tuple(target.split(",")) if target else (),
        kv=kv,
        vram=vram,
        programs=workspace.root / "programs",
        verify=verify,
    )
    # Refuses what cannot work before anything is quantized.
    before = plan_quantization(source, first) if first else conversion
    plan = plan_export(spec, planned(before) if before else None)
    if dry_run:
        return _dry_run(console, spec, plan, before)
    if first:
        spec = replace(spec, checkpoint=ensure_quantized(source, first, checkpoints, progress))
    bundle.parent.mkdir(parents=True, exist_ok=True)
    manifest = export_bundle(spec, progress)
    workspace.remember("bundle", bundle)
    _report(console, manifest, bundle)
    console.next("g4 run --prompt 'What is the capital of France?'")
    return None


def require_own_target(targets: str, own: str) -> None:
    """Refuse to verify an export that holds nothing for this machine's GPU, before hours of work.

    Args: targets: as given, separated by commas; own: the target of the GPU at hand.
    """
    if own not in targets.split(","):
        raise G4Error(
            f"--verify runs the program on this machine's GPU, which takes {own}; the export is for {targets}.",
            hint=f"Add it: --target {targets},{own}",
        )


def has_gpu() -> bool:
    """Tell whether an NVIDIA driver is loaded, without asking torch, which takes seconds."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _is_quantized(source: Path) -> bool:
    if source.is_dir():
        return is_quantized_folder(source)
    from gemma4cli.quant.gguf.reader import is_quantized_gguf

    return is_quantized_gguf(source)


def _converted(
    source: Path, checkpoints: Path, progress: Progress, *, plan_only: bool, quantize: bool
) -> tuple[Path, ConversionPlan | None]:
    """Return a GGUF file's checkpoint; with `plan_only`, when there is none yet, the file and what would be made."""
    from gemma4cli.export.sources import converted_path, ensure_converted, plan_conversion

    if not plan_only or converted_path(source, checkpoints).is_dir():
        return ensure_converted(source, checkpoints, progress), None
    if quantize:
        raise G4Error(
            f"{source} is not quantized; quantizing is planned from a checkpoint, and there is none of it yet.",
            hint=f"Convert it first: g4 convert-gguf {source}",
        )
    return source, plan_conversion([source])


def _short(tokens: int | None) -> str:
    if tokens is None:
        return ""
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)


def _dry_run(
    console: Console, spec: ExportSpec, plan: ExportPlan, first: QuantizationPlan | ConversionPlan | None
) -> None:
    peak = max(plan.peak_memory_bytes, first.peak_bytes if first else 0)
    checkpoint_bytes = sum(first.checkpoint.files.values()) if first else 0
    fits = plan.total_bytes + checkpoint_bytes <= plan.free_disk_bytes and peak <= plan.available_memory_bytes
    document: dict[str, Any] = {
        "output": str(spec.target),
        "exists": spec.target.exists(),
        "backend": spec.backend,
        "context_length": plan.contract.context_length,
        "prefill_chunk": plan.contract.prefill_chunk,
        "files": plan.files,
        "total_bytes": plan.total_bytes,
        "checkpoint_first_bytes": checkpoint_bytes,
        "free_disk_bytes": plan.free_disk_bytes,
        "peak_memory_bytes": peak,
        "available_memory_bytes": plan.available_memory_bytes,
        "run_memory_bytes": plan.memory.total_bytes,
        "fits": fits,
    }
    verdict = "fits" if fits else "does not fit"

    def render() -> None:
        console.table(("file", "size"), [(name, format_bytes(size)) for name, size in plan.files.items()], align="lr")
        console.line(f"{spec.target}: {format_bytes(plan.total_bytes)}")
        if first:
            console.line(f"a checkpoint is made first: {format_bytes(checkpoint_bytes)}")
        console.line(f"disk: {format_bytes(plan.free_disk_bytes)} free")
        console.line(f"memory: up to {format_bytes(peak)} of {format_bytes(plan.available_memory_bytes)} available")
        console.line(f"memory to run it: {format_bytes(plan.memory.total_bytes)}")
        console.line(verdict)

    console.result(document, render, essence=verdict)
    if spec.target.exists():
        console.warn(f"{spec.target} already exists; writing it will need --force.")


def _report(console: Console, manifest: BundleManifest, target: Path) -> None:
    worst = sorted(manifest.reencoded, key=lambda name: -manifest.reencoded[name].relative_error)[:_WORST]
    document = {
        "bundle": str(target),
        "backend": manifest.backend,
        "targets": list(manifest.targets),
        "context_length": manifest.contract.context_length,
        "prefill_chunk": manifest.contract.prefill_chunk,
        "total_bytes": sum(record.bytes for record in manifest.files.values()),
        "run_memory_bytes": manifest.memory.total_bytes,
        "verified": manifest.verified,
        "reencoded": len(manifest.reencoded),
        "worst": [{"name": name, **vars(manifest.reencoded[name])} for name in worst],
    }

    def render() -> None:
        console.line(str(target))
        for what, value in describe(manifest):
            console.line(f"{what + ':':18} {value}")
        if checked := manifest.verified:
            console.line(
                f"{'verified:':18} {checked['equal_tokens']} of {checked['decoded_tokens']} tokens equal after "
                f"{checked['prefilled_tokens']:,}, worst cosine {checked['worst_cosine']:.6f}"
            )
        if worst:
            console.line(f"{len(worst)} of {len(manifest.reencoded)} matrices that had to change, relative errors:")
            rows = [(r["name"], r["stored"], r["becomes"], f"{r['relative_error']:.4f}") for r in document["worst"]]
            console.table(("tensor", "was", "is", "error"), rows, align="lllr")

    console.result(document, render, essence=str(target))
