"""A GGUF file read as a checkpoint, without writing one: what packing for a GPU needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gemma4cli.model.config import Gemma4Config
from gemma4cli.quant.gguf.blocks import FLOAT_TYPES
from gemma4cli.quant.gguf.convert import plan_conversion
from gemma4cli.quant.gguf.convert_tensor import convert_tensor
from gemma4cli.quant.gguf.reader import GGUFTensor

_MAX_THREADS = 8


class GGUFCheckpoint:
    """The tensors that `convert_gguf` would write, made when asked for.

    Attributes:
        assets: the files of a model that its metadata make: file name -> bytes.
        files: the file, or all parts of a split one.
        recipe, totals: as a checkpoint's manifest has them; `weight_bytes` are the file's.
    """

    manifest = None

    def __init__(self, paths: list[Path]) -> None:
        """Validate the files; reads metadata only.

        Raises: G4Error as `plan_conversion` does.
        """
        plan = plan_conversion(paths)
        self.config: Gemma4Config = plan.config
        self.assets: Mapping[str, bytes | Path] = plan.checkpoint.assets
        self.files = list(plan.gguf.paths)
        self.recipe = plan.recipe
        bits = round(8 * plan.totals.source_bytes / plan.totals.parameters, 4)
        self.totals = replace(plan.totals, weight_bytes=plan.totals.source_bytes, bits_per_weight=bits)
        self._tensors = plan.tensors

    @property
    def is_quantized(self) -> bool:
        return any(tensor.type not in FLOAT_TYPES for tensor in self._tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as the file has them."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def names(self) -> list[str]:
        return list(self._tensors)

    def source(self, name: str) -> GGUFTensor:
        """Return where a tensor lies."""
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """Convert one tensor, all of it in memory."""
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            return convert_tensor(self._tensors[name], pool)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._tensors:
            yield name, self.tensor(name)

    def first_rows(self) -> FirstRows:
        """Return what tells the formats of all matrices without converting them."""
        return FirstRows(self)


class FirstRows(GGUFCheckpoint):
    """The same checkpoint with one row of every matrix: its classes, dtypes and formats, not its shapes."""

    def __init__(self, whole: GGUFCheckpoint) -> None:
        self.config, self.assets, self._tensors = whole.config, whole.assets, whole._tensors

    def tensor(self, name: str) -> Tensor:
        source = self._tensors[name]
        return convert_tensor(source if len(source.shape) == 1 else source.slice(0, 1), None)
