"""Safetensors files mapped tensor by tensor.

The library's PyTorch door maps the whole file copy-on-write, which Linux refuses when the file is larger than the
machine's memory; a shard of the 31B has 50 GB. Here the library checks the header, which it does on a shared mapping,
and each tensor becomes a mapping of its own bytes, gone when the tensor is.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class MappedTensor:
    """Where one tensor lies. `dtype` is safetensors' name, e.g. "BF16"; `start` counts from the file's first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def map(self) -> Tensor:
        """Return the tensor, backed by the file; writing to it changes no file."""
        dtype = _DTYPES[self.dtype]
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        page = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = self.start - page
        with open(self.file, "rb") as file:
            mapping = mmap.mmap(file.fileno(), skipped + self.nbytes, access=mmap.ACCESS_COPY, offset=page)
        return torch.frombuffer(mapping, dtype=dtype, count=self.nbytes // dtype.itemsize, offset=skipped).view(
            self.shape
        )


def read_safetensors_header(path: Path) -> tuple[dict[str, MappedTensor], dict[str, str]]:
    """Return the tensors by key, and the metadata.

    Raises: SafetensorError when the header is damaged or the data do not cover the file exactly.
    """
    with safe_open(path, framework="numpy"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[key] = MappedTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors, metadata
