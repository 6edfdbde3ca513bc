"""Data types and tensors as ExecuTorch's files describe them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma4cli.inspection.flatbuffer import Malformed

# ScalarType of executorch/schema/scalar_type.fbs -> name, bits of one element.
_TYPES = {
    0: ("uint8", 8), 1: ("int8", 8), 2: ("int16", 16), 3: ("int32", 32), 4: ("int64", 64), 5: ("float16", 16),
    6: ("float32", 32), 7: ("float64", 64), 11: ("bool", 8), 12: ("qint8", 8), 13: ("quint8", 8), 14: ("qint32", 32),
    15: ("bfloat16", 16), 16: ("quint4x2", 4), 17: ("quint2x4", 2), 22: ("bits16", 16), 23: ("float8_e5m2", 8),
    24: ("float8_e4m3fn", 8), 25: ("float8_e5m2fnuz", 8), 26: ("float8_e4m3fnuz", 8), 27: ("uint16", 16),
    28: ("uint32", 32), 29: ("uint64", 64),
}  # fmt: skip
_BITS = dict(_TYPES.values())
_MOST_DIMENSIONS = 16  # kTensorDimensionLimit of ExecuTorch's runtime
_DEVICES = {0: "cpu", 1: "cuda"}

STRUCT_CODES = {
    "uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float16": "e", "float32": "f",
    "float64": "d", "bool": "?", "uint16": "H", "uint32": "I", "uint64": "Q",
}  # fmt: skip
"""How the struct module reads one element, for the types it knows."""


def dtype_name(code: int) -> str:
    """Name a ScalarType; an unknown one is ``Malformed``."""
    if code not in _TYPES:
        raise Malformed(f"it has a tensor of the unknown data type {code}")
    return _TYPES[code][0]


def device_name(kind: int, index: int) -> str:
    """Name a DeviceType with its index: "cpu", "cuda:0"."""
    if kind not in _DEVICES:
        raise Malformed(f"it has a tensor on the unknown device type {kind}")
    return "cpu" if kind == 0 else f"{_DEVICES[kind]}:{index}"


def sound_shape(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return a shape after checking that ExecuTorch could have it."""
    if len(sizes) > _MOST_DIMENSIONS:
        raise Malformed(f"it has a tensor of {len(sizes):,} dimensions")
    if any(size < 0 for size in sizes):
        raise Malformed(f"it has a tensor with a dimension of {min(sizes)}")
    return tuple(sizes)


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor; packed types round up."""
    return (math.prod(shape) * _BITS[dtype] + 7) // 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a method.

    Attributes:
        shape: upper bounds when `is_dynamic`; the file does not say which dimensions vary, nor their lower bounds.
        name: the fully qualified name of a weight or buffer, where it was kept.
        data_index: its entry in the table of constants, 0 for none.
        is_external: its data lies in a `.ptd` file, under `name`.
        memory: (buffer, byte offset) when it was planned ahead.
    """

    dtype: str
    shape: tuple[int, ...]
    is_dynamic: bool
    name: str | None
    data_index: int
    is_external: bool
    memory: tuple[int, int] | None
    device: str

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def is_constant(self) -> bool:
        return self.memory is None and (self.data_index > 0 or self.is_external)

    @property
    def is_state(self) -> bool:
        """A mutable buffer that outlives a call: named, or with a value to start from."""
        return self.memory is not None and (self.name is not None or self.data_index > 0)
