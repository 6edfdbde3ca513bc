"""GGUF -> quantized checkpoint: metadata becomes the model's files, tensors keep their codes.

    metadata -> config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja  (plan)
    tensors  -> layout on the meta device -> files and sizes, known exactly
    blocks   -> codes and scales -> their places in a shard, some rows at a time                                  (run)

What is kept exactly, and what is not, is in docs/gguf.md. Every tensor's error against gguf-py's decoder is measured
and put into the manifest: on some rows where codes and scales are kept, on all of them where they are not.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf.constants import LlamaFileType

from gemma4cli import __version__
from gemma4cli.errors import G4Error
from gemma4cli.files import require_absent
from gemma4cli.model.config import Gemma4Config
from gemma4cli.progress import SILENT, Progress, Task
from gemma4cli.quant.checkpoint import CheckpointPlan, write_checkpoint
from gemma4cli.quant.gguf.blocks import FLOAT_TYPES, FORMATS, REQUANTIZED_TYPES, SUPPORTED_TYPES
from gemma4cli.quant.gguf.convert_tensor import (
    BYTES_PER_THREAD,
    REQUANTIZED_AS,
    bytes_in_memory,
    empty_tensor,
    write_tensor,
)
from gemma4cli.quant.gguf.keymap import match_tensors
from gemma4cli.quant.gguf.metadata import chat_template, read_config, read_generation_config
from gemma4cli.quant.gguf.reader import GGUF, GGUFTensor, Value, open_gguf
from gemma4cli.quant.gguf.tokenizer import read_vocabulary, tokenizer_config, tokenizer_json
from gemma4cli.quant.manifest import (
    GGUF_RECIPE,
    CheckpointManifest,
    ManifestHead,
    TensorRecord,
    Totals,
    identify_source,
)
from gemma4cli.quant.shards import ShardWriter, stored_bytes

SHARD_BYTES = 2_000_000_000
# Libraries, the vocabulary and the tokenizer made of it; measured with 262,144 tokens.
_LIBRARIES_BYTES = 750 << 20
_MAX_THREADS = 8
# The next tensor keeps the threads busy while the last rows of one are written.
_AT_ONCE = 2
_FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write, exact in every byte but the manifest's."""

    gguf: GGUF
    config: Gemma4Config
    tensors: Mapping[str, GGUFTensor]
    checkpoint: CheckpointPlan
    own_sampling: bool
    useless_merges: int

    @property
    def types(self) -> dict[str, int]:
        """GGUF type -> number of tensors."""
        counts = Counter(tensor.type.name for tensor in self.tensors.values())
        return dict(sorted(counts.items()))

    @property
    def recipe(self) -> dict[str, Any]:
        """What the file says and holds: its mix by name (None when it names none), tensors and weights of each type."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.type.name] += math.prod(tensor.shape)
        return {
            "name": GGUF_RECIPE,
            "file_type": _file_type(self.gguf.metadata.get("general.file_type")),
            "types": self.types,
            "weights": dict(sorted(weights.items())),
            "fingerprint": self.gguf.fingerprint,
        }

    @property
    def totals(self) -> Totals:
        parameters = sum(math.prod(shape) for shape in self.config.parameter_shapes().values())
        weight_bytes = self.checkpoint.weight_bytes
        source_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return Totals(parameters, source_bytes, weight_bytes, round(weight_bytes * 8 / parameters, 4))

    @property
    def peak_bytes(self) -> int:
        """An upper estimate of the process's resident memory."""
        sizes = [bytes_in_memory(source) for source in self.tensors.values()]
        return _LIBRARIES_BYTES + _threads() * BYTES_PER_THREAD + sum(sorted(sizes)[-_AT_ONCE:])


def plan_conversion(paths: list[Path], *, shard_bytes: int = SHARD_BYTES) -> ConversionPlan:
    """Validate the files and lay the result out; reads metadata only.

    Raises: G4Error for a file that is damaged, incomplete, of another architecture or with a type we cannot decode.
    """
    gguf = open_gguf(paths)
    _check_types(gguf)
    vocabulary = read_vocabulary(gguf)
    document = read_config(gguf, vocabulary)
    try:
        config = Gemma4Config.from_json(document)
    except G4Error as error:
        raise G4Error(f"{paths[0]}: {error.message}", hint=error.hint) from None
    tensors = match_tensors(gguf, config)
    generation, own_sampling = read_generation_config(gguf, vocabulary)
    assets: dict[str, bytes | Path] = {
        "config.json": _json(document),
        "generation_config.json": _json(generation),
        "tokenizer.json": tokenizer_json(vocabulary),
        "tokenizer_config.json": _json(tokenizer_config(vocabulary)),
    }
    template = chat_template(gguf)
    if template is not None:
        assets["chat_template.jinja"] = template.encode()
    layout = {name: empty_tensor(tensor) for name, tensor in tensors.items()}
    checkpoint = CheckpointPlan(layout, assets, shard_bytes)
    return ConversionPlan(gguf, config, tensors, checkpoint, own_sampling, vocabulary.useless_merges)


def convert_gguf(
    paths: list[Path],
    target: Path,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = SILENT,
) -> CheckpointManifest:
    """Convert a GGUF model into the checkpoint folder `target`; continues an earlier run that was cut short.

    Raises: G4Error for anything wrong with the files, the target or the disk; `target` is then as it was.
    """
    require_absent(target, force)
    plan = plan_conversion(paths, shard_bytes=shard_bytes)
    for sentence in remarks(plan):
        progress.note(sentence)
    head = ManifestHead(
        {"g4": __version__, "torch": torch.__version__, "torchao": version("torchao"), "gguf": version("gguf")},
        identify_source("gguf", plan.gguf.paths[0], list(plan.gguf.paths), known_hashes_only=True),
        plan.recipe,
        plan.totals,
    )
    with ThreadPoolExecutor(_threads()) as pool:
        return write_checkpoint(
            target,
            plan.checkpoint,
            head,
            _Producer(plan, pool).produce,
            force=force,
            progress=progress,
            label="convert",
            fast=True,
            at_once=_AT_ONCE,
        )


def ensure_converted(path: Path, checkpoints: Path, progress: Progress = SILENT) -> Path:
    """Return the checkpoint of a GGUF file under `checkpoints`, converting it there the first time.

    The folder's name carries the file's fingerprint, so that another file of the same name is another checkpoint, and
    the same file elsewhere is the same one.
    """
    target = converted_path(path, checkpoints)
    if target.is_dir():
        progress.note(f"Using {target}, converted from {path.name} earlier.")
    else:
        progress.note(f"Converting {path.name} to {target}.")
        convert_gguf([path], target, progress=progress)
    return target


def converted_path(path: Path, checkpoints: Path) -> Path:
    """Return where `ensure_converted` keeps a file's checkpoint."""
    gguf = open_gguf([path])
    target = checkpoints / f"{model_name(path)}-{gguf.fingerprint[:12]}"
    gguf.close()
    return target


def model_name(path: Path) -> str:
    """Return what to call a conversion: the file's name without .gguf and without the part's number."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name, flags=re.IGNORECASE)


def remarks(plan: ConversionPlan) -> list[str]:
    """What the user should know about this file before it is converted."""
    said = []
    for kind in REQUANTIZED_TYPES:
        if kind.name in plan.types:
            said.append(
                f"{plan.types[kind.name]} {kind.name} tensors have no form of their own here: they are quantized again "
                f"to {REQUANTIZED_AS.bits} bits in groups of {REQUANTIZED_AS.group_size}, and the error is measured."
            )
    if plan.useless_merges:
        said.append(f"{plan.useless_merges} of the tokenizer's merges make no token and are left out.")
    if "chat_template.jinja" not in plan.checkpoint.assets:
        said.append("The file has no chat template; g4 run can use this model with --raw only.")
    if not plan.own_sampling:
        said.append("The file has no sampling defaults; Gemma 4's are used (temperature 1, top-k 64, top-p 0.95).")
    return said


class _Producer:
    """Converts tensors, each on all threads."""

    def __init__(self, plan: ConversionPlan, pool: ThreadPoolExecutor) -> None:
        self._plan, self._pool = plan, pool

    def produce(self, name: str, shard: ShardWriter, task: Task) -> TensorRecord:
        """Write one tensor and return its record."""
        source = self._plan.tensors[name]
        error = write_tensor(source, shard, name, self._pool)
        stored = stored_bytes(name, self._plan.checkpoint.layout[name])
        task.advance(stored, name)
        return _record(source, stored, error)


def _threads() -> int:
    """Two more than cores: while one writes, another computes."""
    return min(_MAX_THREADS, (os.cpu_count() or 1) + 2)


def _record(source: GGUFTensor, stored: int, error: float) -> TensorRecord:
    if source.type in FORMATS:
        kept = FORMATS[source.type]
        name, group = f"int{kept.bits}", kept.group_size
    elif source.type in FLOAT_TYPES:
        name, group = _FLOAT_NAMES[source.type.name], None
    else:
        name, group = f"int{REQUANTIZED_AS.bits}", REQUANTIZED_AS.group_size
    return TensorRecord(
        name,
        source.shape,
        round(stored * 8 / math.prod(source.shape), 4),
        group,
        source.type.name,
        float(f"{error:.6g}"),
        round(-20 * math.log10(error), 3) if error else None,
    )


def _file_type(number: Value | None) -> str | None:
    """`general.file_type` as people write it: 15 -> Q4_K_M."""
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None


def _check_types(gguf: GGUF) -> None:
    for tensor in gguf.tensors.values():
        if tensor.type not in SUPPORTED_TYPES:
            raise G4Error(
                f"Tensor {tensor.name} of {tensor.file.path} has type {tensor.type.name}, which g4 does not decode.",
                hint=f"Use a file with {', '.join(kind.name for kind in SUPPORTED_TYPES)}.",
            )


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
