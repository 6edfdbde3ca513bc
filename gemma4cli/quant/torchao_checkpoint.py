"""A checkpoint that torchao wrote for another program: as good as one of ours, but without a manifest."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.names import FLOAT_TYPES, LM_HEAD, expected_shapes
from gemma4cli.model.weights import weight_files
from gemma4cli.quant.manifest import CheckpointManifest, ManifestHead, TensorRecord, Totals, identify_source
from gemma4cli.quant.stored import StoredCheckpoint, StoredTensor, check_stored, read_stored


class TorchaoCheckpoint(StoredCheckpoint):
    """A folder of torchao tensors without a manifest, as ExecuTorch's gemma4_31b example writes and publishes it.

    `Int4Tensor` has no mark of its convention. ExecuTorch's and ours is value = scale * (code - zero point); torchao's
    own quantizer for GPUs stores signed codes and an offset in units of the weights, and is recognized by those.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Gemma4Config.from_dir(path)
        found = read_stored(weight_files(path))
        check_stored(path, self.config, found)
        self._stored = {name: found[name] for name in expected_shapes(self.config, untied=LM_HEAD in found)}
        self._check_convention()

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self._stored.values())

    @cached_property
    def manifest(self) -> CheckpointManifest:
        """What can be said of a checkpoint that does not say it: hashed now, unless the Hugging Face cache did."""
        files = sorted({part.file for stored in self._stored.values() for part in stored.parts.values()})
        assets = [self.path / "config.json", self.path / "tokenizer.json"]
        source = identify_source("torchao", self.path, [*files, *(file for file in assets if file.is_file())])
        tensors = {name: _record(stored) for name, stored in self._stored.items()}
        parameters = sum(math.prod(shape) for shape in self.config.parameter_shapes().values())
        totals = Totals(parameters, self.nbytes, self.nbytes, round(self.nbytes * 8 / parameters, 4))
        types = dict(sorted(Counter(record.format for record in tensors.values()).items()))
        return CheckpointManifest(ManifestHead({}, source, {"name": "torchao", "types": types}, totals), tensors)

    def _check_convention(self) -> None:
        """Look at one 4-bit matrix: the middle of 16 unsigned codes is near 8, that of weights near 0."""
        stored = next((s for s in self._stored.values() if s.description.kind == "Int4Tensor"), None)
        if stored is not None and float(stored.part("zero_point").map().float().abs().mean()) < 1:
            raise G4Error(
                f"{stored.file}: the zero points of {stored.description.name} are in units of the weights, as "
                "torchao's own 4-bit quantizer for GPUs writes them; g4 reads zero points in units of the codes.",
                hint="Quantize the original model instead: g4 quantize",
            )


def _record(stored: StoredTensor) -> TensorRecord:
    bits, description = round(stored.nbytes * 8 / math.prod(stored.shape), 4), stored.description
    if not description.is_quantized:
        return TensorRecord(FLOAT_TYPES[stored.part("").dtype], stored.shape, bits, None, "keep", None, None)
    return TensorRecord(f"int{description.bits}", stored.shape, bits, description.group_size, "torchao", None, None)
