"""What may be exported: a quantized checkpoint as it is; a plain model and a GGUF file after a step that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.gguf.convert import ConversionPlan, converted_path, ensure_converted, plan_conversion
from gemma4cli.quant.manifest import CheckpointManifest, SourceRecord, identify_source
from gemma4cli.quant.quantize import QuantizationPlan, plan_quantization, quantize_checkpoint
from gemma4cli.quant.recipe import Recipe
from gemma4cli.workspace import name_of


class PlannedCheckpoint:
    """A checkpoint that does not exist yet: names and shapes without data, for planning what comes after it.

    Attributes:
        assets: the model's own files when they do not lie with the source: file name -> bytes.
    """

    is_quantized = True
    manifest = None

    def __init__(
        self, config: Gemma4Config, layout: Mapping[str, Tensor], assets: Mapping[str, bytes | Path] | None = None
    ) -> None:
        self.config, self.assets = config, assets
        self._layout = layout

    def names(self) -> list[str]:
        return list(self._layout)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the meta device."""
        return self._layout[name]


def planned(plan: QuantizationPlan | ConversionPlan) -> PlannedCheckpoint:
    """Return the checkpoint that a quantization or a conversion would write."""
    if isinstance(plan, ConversionPlan):
        return PlannedCheckpoint(plan.config, plan.checkpoint.layout, plan.checkpoint.assets)
    return PlannedCheckpoint(plan.reader.config, plan.checkpoint.layout)


def ensure_quantized(source: Path, recipe: Recipe, checkpoints: Path, progress: Progress = SILENT) -> Path:
    """Return the checkpoint that `recipe` makes of a plain model, under `checkpoints`; quantize the first time.

    Raises: G4Error when a checkpoint of that name is there that was made from something else.
    """
    target = quantized_path(source, recipe, checkpoints)
    if not target.exists():
        progress.note(f"{source.name} is not quantized; quantizing it to {target} with the recipe {recipe.name}.")
        checkpoints.mkdir(parents=True, exist_ok=True)
        quantize_checkpoint(source, target, recipe, progress=progress)
        return target
    head = CheckpointManifest.read(target).head
    if head.recipe != recipe.to_json() or not _is_still(head.source, source, progress):
        raise G4Error(
            f"{target} was not made from {source} with this recipe {recipe.name}.",
            hint="Export that checkpoint by its path, or make it again: g4 quantize --force",
        )
    progress.note(f"{source.name} is not quantized; using {target}, quantized earlier with the recipe {recipe.name}.")
    return target


def quantized_path(source: Path, recipe: Recipe, checkpoints: Path) -> Path:
    """Return where `g4 quantize` puts a model's checkpoint."""
    return checkpoints / f"{name_of(source)}-{recipe.name}"


def _is_still(record: SourceRecord, source: Path, progress: Progress) -> bool:
    files = [source / name for name in record.files]
    if not all(file.is_file() and file.stat().st_size == record.files[file.name].bytes for file in files):
        return False
    return identify_source(record.kind, source, files, progress).files == record.files


__all__ = [
    "PlannedCheckpoint",
    "converted_path",
    "ensure_converted",
    "ensure_quantized",
    "plan_conversion",
    "plan_quantization",
    "planned",
    "quantized_path",
]
