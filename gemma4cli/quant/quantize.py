"""Quantize a checkpoint by a recipe: plan it from shapes, then stream it tensor by tensor into a new folder.

    source folder -> Recipe.assign -> layout on the meta device -> files and sizes, known exactly        (plan)
                  -> for each tensor: rows -> codes -> torchao tensor -> its place in a shard            (run)

Peak memory is one tensor as read, the same one quantized, and a few buffers for some rows of it.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from gemma4cli import __version__
from gemma4cli.errors import G4Error
from gemma4cli.files import read_json, require_absent
from gemma4cli.model.weights import LM_HEAD
from gemma4cli.progress import SILENT, Progress, Task
from gemma4cli.quant.checkpoint import (
    INDEX_FILE,
    SHARD_BYTES,
    CheckpointPlan,
    PlainCheckpoint,
    open_checkpoint,
    require_space,
    write_checkpoint,
)
from gemma4cli.quant.groupwise import quantize
from gemma4cli.quant.manifest import (
    CheckpointManifest,
    ManifestHead,
    SourceRecord,
    TensorRecord,
    Totals,
    identify_source,
)
from gemma4cli.quant.recipe import Assignment, QuantSpec, Recipe
from gemma4cli.quant.shards import ShardWriter, stored_bytes
from gemma4cli.quant.tensors import MatrixBuilder

REQUIRED_ASSETS = ("config.json", "generation_config.json", "tokenizer.json")
OPTIONAL_ASSETS = ("chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json")

# Weights quantized at a time. A slab's buffers are about 20 times this in float32 at their most, for HQQ.
_SLAB = {"cpu": 1 << 21, "cuda": 1 << 26}
_SCRATCH_BYTES = 20 * 4 * _SLAB["cpu"]
_LIBRARIES_BYTES = 400 << 20


@dataclass(frozen=True)
class QuantizationPlan:
    """What quantizing will write, exact in every byte but the manifest's."""

    reader: PlainCheckpoint
    recipe: Recipe
    assignments: tuple[Assignment, ...]
    checkpoint: CheckpointPlan

    @property
    def totals(self) -> Totals:
        parameters = sum(math.prod(shape) for shape in self.reader.config.parameter_shapes().values())
        weight_bytes = self.checkpoint.weight_bytes
        return Totals(parameters, self.reader.nbytes, weight_bytes, round(weight_bytes * 8 / parameters, 4))

    @property
    def peak_bytes(self) -> int:
        """An upper estimate of the process's resident memory on the CPU."""
        return (
            _LIBRARIES_BYTES
            + _SCRATCH_BYTES
            + max(
                math.prod(a.shape) * self.reader.dtype(a.source).itemsize
                + stored_bytes(a.name, self.checkpoint.layout[a.name])
                for a in self.assignments
            )
        )

    def bits_of_rule(self, number: int) -> tuple[int, float]:
        """Return how many tensors a rule (counted from 1) decided about, and their mean bits per weight."""
        mine = [a for a in self.assignments if a.rule == number]
        bits = sum(stored_bytes(a.name, self.checkpoint.layout[a.name]) * 8 for a in mine)
        return len(mine), round(bits / max(1, sum(math.prod(a.shape) for a in mine)), 4)


@dataclass(frozen=True)
class Fit:
    """Whether a planned checkpoint fits this machine. `files` lacks only the manifest."""

    files: dict[str, int]
    total_bytes: int
    free_disk_bytes: int
    peak_memory_bytes: int
    available_memory_bytes: int

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_disk_bytes and self.peak_memory_bytes <= self.available_memory_bytes

    @classmethod
    def of(cls, plan: QuantizationPlan, target: Path) -> Fit:
        """Compare a plan with the disk that will hold `target` and the memory there is now."""
        files = plan.checkpoint.files
        existing = next(folder for folder in target.absolute().parents if folder.exists())
        free = shutil.disk_usage(existing).free
        return cls(files, sum(files.values()), free, plan.peak_bytes, available_memory())


def available_memory() -> int:
    """Return the bytes of memory that a process can take now; all there is where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_quantization(
    source: Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES, progress: Progress = SILENT
) -> QuantizationPlan:
    """Check source and recipe against each other and lay the result out; reads headers and small files only.

    Raises: G4Error when the source is no plain checkpoint or incomplete, or the recipe does not fit it.
    """
    reader = open_checkpoint(source, progress)
    if reader.is_quantized:
        raise G4Error(f"{source} is quantized already.", hint="Quantize the original checkpoint instead.")
    assignments = recipe.assign(reader.config, separate_head=LM_HEAD in reader.names())
    layout = {a.name: stored_layout(a, reader.dtype(a.source)) for a in assignments}
    plan = CheckpointPlan(layout, _assets(source), shard_bytes)
    return QuantizationPlan(reader, recipe, tuple(assignments), plan)


def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = SILENT,
) -> CheckpointManifest:
    """Quantize a plain checkpoint folder into `target`; continues an earlier run that was cut short.

    Raises: G4Error for anything wrong with source, recipe, target, device or disk; `target` is then as it was.
    """
    require_absent(target, force)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise G4Error(f"{target} would replace the model that is being quantized.", hint="Choose another --output.")
    compute = find_device(device)
    plan = plan_quantization(source, recipe, shard_bytes=shard_bytes, progress=progress)
    require_space(target, plan.checkpoint)
    for number in recipe.unused_rules(plan.assignments):
        progress.note(f"Rule {number} of recipe {recipe.name} matches no tensor of this model.")
    by_name = {a.name: a for a in plan.assignments}

    def produce(name: str, shard: ShardWriter, task: Task) -> TensorRecord:
        tensor, record = _produce(plan, by_name[name], compute, task)
        shard.put(name, tensor)
        return record

    head = ManifestHead(_created_with(compute), _identify(source, plan, progress), recipe.to_json(), plan.totals)
    return write_checkpoint(target, plan.checkpoint, head, produce, force=force, progress=progress)


def find_device(name: str) -> torch.device:
    """Return cpu, cuda or cuda:N.

    Raises: G4Error when the name is none of these or this machine lacks the device.
    """
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise G4Error(f"{name!r} is not a device; use cpu, cuda or cuda:1.", exit_code=2)
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise G4Error(f"This machine has no device {name} that PyTorch can use.", hint="Use --device cpu.")
    return torch.device(name)


def quantize_tensor(weight: Tensor, spec: QuantSpec, device: torch.device) -> tuple[Tensor, float]:
    """Quantize a matrix some rows at a time.

    Args:
        weight: [N, K] on the CPU, finite, any float type.
    Returns: the torchao tensor on the CPU, and |stored - weight| / |weight| (0 for a matrix of zeros).
    """
    rows = max(1, _SLAB[device.type] // weight.shape[1])
    builder = MatrixBuilder(tuple(weight.shape), spec)
    error = norm = 0.0
    for row in range(0, weight.shape[0], rows):
        slab = weight[row : row + rows].to(device).float()
        quantized = quantize(slab, spec)
        builder.put(row, quantized.to("cpu"))
        norm = math.hypot(norm, _norm(slab))
        error = math.hypot(error, _norm(quantized.dequantize().sub_(slab)))
    return builder.finish(), error / norm if norm else 0.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _produce(plan: QuantizationPlan, what: Assignment, device: torch.device, task: Task) -> tuple[Tensor, TensorRecord]:
    weight = plan.reader.tensor(what.source)
    stored = stored_bytes(what.name, plan.checkpoint.layout[what.name])
    bits = round(stored * 8 / math.prod(what.shape), 4)
    if what.spec is None:
        task.advance(stored, what.name)
        return weight, TensorRecord(str(weight.dtype).removeprefix("torch."), what.shape, bits, None, "keep", 0.0, None)
    tensor, error = quantize_tensor(weight, what.spec, device)
    task.advance(stored, what.name)
    return tensor, TensorRecord(
        f"int{what.spec.bits}",
        what.shape,
        bits,
        what.spec.group_of(what.shape[1]),
        what.spec.method,
        float(f"{error:.6g}"),
        round(-20 * math.log10(error), 3) if error else None,
    )


def stored_layout(what: Assignment, dtype: torch.dtype) -> Tensor:
    """Return what will be stored for a tensor of `dtype`, on the meta device."""
    if what.spec is None:
        return torch.empty(what.shape, dtype=dtype, device="meta")
    return MatrixBuilder(what.shape, what.spec, "meta").finish()


def _assets(source: Path) -> dict[str, Path]:
    """Find the files to copy; damaged JSON is found now rather than after hours of work."""
    for name in REQUIRED_ASSETS:
        if not (source / name).is_file():
            raise G4Error(f"{source} has no {name}.", hint="Fetch the whole model again: g4 pull")
    found = [source / name for name in (*REQUIRED_ASSETS, *OPTIONAL_ASSETS) if (source / name).is_file()]
    for path in found:
        if path.suffix == ".json":
            read_json(path)
    return {path.name: path for path in found}


def _identify(source: Path, plan: QuantizationPlan, progress: Progress) -> SourceRecord:
    index = source / INDEX_FILE
    files = [*plan.reader.files, *plan.checkpoint.assets.values(), *([index] if index.is_file() else [])]
    return identify_source("safetensors", source, files, progress)


def _created_with(device: torch.device) -> dict[str, str]:
    return {
        "g4": __version__,
        "torch": torch.__version__,
        "torchao": version("torchao"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
