"""What backends keep in their blobs: the weights they name, and what else can be told without running them.

XNNPACK: `executorch/backends/xnnpack/serialization/schema.fbs` after a header ("XH00"). CUDA: the list of weights that
`executorch/backends/cuda/cuda_weight_collector.py` writes ("ETCUDAFQN3"), which also names the compiled library.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

from gemma4cli.inspection.flatbuffer import Buffer, Malformed, Table
from gemma4cli.inspection.tensors import device_name, dtype_name, nbytes_of, sound_shape

XNNPACK = "XnnpackBackend"
CUDA = "CudaBackend"

_CUDA_MAGIC = b"ETCUDAFQN3"
_XNNPACK_MAGIC = b"XH00"
_XNNPACK_HEADER = struct.Struct("<HIIIQ")
# XNNDatatype -> name; the quantized ones say how they are scaled.
_XNNPACK_TYPES = {
    1: "float32", 2: "float16", 3: "qint8", 4: "quint8", 5: "qint32", 6: "int8 per row", 7: "int32 per row",
    8: "int4 per row", 9: "int8 dynamic", 10: "int4", 11: "int8 packed", 12: "int32", 13: "float32 packed",
    14: "bfloat16",
}  # fmt: skip
# XNodeUnion in order, without the prefix XNN.
_XNNPACK_NODES = (
    "Add", "FullyConnected", "Softmax", "Sigmoid", "StaticTranspose", "Clamp", "Conv2d", "Div",
    "StaticResizeBilinear2D", "StaticConstantPad", "AvgPooling2d", "Minimum", "DepthwiseConv2d", "MaxPooling2d",
    "Multiply", "Subtract", "Floor", "Convert", "GlobalAvgPooling2d", "StaticReshape", "ArgMaxPooling2d",
    "SquareRoot", "Ceiling", "Hardswish", "LeakyReLU", "Maximum", "Negate", "Square", "ELU", "Abs", "PReLU",
    "Concatenate2", "Concatenate3", "Concatenate4", "StaticSlice", "ScaledDotProductAttention", "BatchMatrixMultiply",
    "Concatenate5", "ConvTranspose2d", "ReciprocalSquareRoot", "Log", "Gelu", "Tanh", "Exp", "Sin", "Copy", "Cos",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlobWeight:
    """A weight that a blob refers to: `key` is its name among the named data, None when it lies in the blob."""

    name: str
    key: str | None
    format: str
    shape: tuple[int, ...] | None
    nbytes: int
    device: str


@dataclass(frozen=True)
class Blob:
    """What was understood of a delegate's blob; `operators` counts a graph's nodes, `library` names a compiled one."""

    weights: tuple[BlobWeight, ...] = ()
    operators: dict[str, int] = field(default_factory=dict)
    library: str | None = None


def read_blob(backend: str, data: memoryview) -> Blob:
    """Read what is known of a backend's blob; that of an unknown backend stays closed."""
    if backend == CUDA and bytes(data[: len(_CUDA_MAGIC)]) == _CUDA_MAGIC:
        return _cuda(data)
    if backend == CUDA:
        return Blob(library=_first_line(data))
    if backend == XNNPACK and bytes(data[4:8]) == _XNNPACK_MAGIC:
        return _xnnpack(data)
    return Blob()


def _first_line(data: memoryview) -> str | None:
    """Blobs of ExecuTorch before 1.5.1 hold the keys of library and weights, one per line."""
    line = bytes(data[:256]).split(b"\n")[0]
    return line.decode() if line.isascii() and line.decode().isprintable() and line else None


class _Cursor:
    """Reads one number or string after the other."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data, self._position = data, position

    def numbers(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + layout)
        if self._position + size > len(self._data):
            raise Malformed("the list of weights of a CUDA delegate ends early")
        self._position += size
        return struct.unpack_from("<" + layout, self._data, self._position - size)

    def text(self) -> str:
        (size,) = self.numbers("I")
        if self._position + size > len(self._data):
            raise Malformed("the list of weights of a CUDA delegate ends early")
        self._position += size
        try:
            return bytes(self._data[self._position - size : self._position]).decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed("a weight of a CUDA delegate has a name that is not text") from None


def _cuda(data: memoryview) -> Blob:
    cursor = _Cursor(data, len(_CUDA_MAGIC))
    library = cursor.text()
    (count,) = cursor.numbers("I")
    weights = []
    for _ in range(count):
        name, key = cursor.text(), cursor.text()
        nbytes, dtype, device, _, dimensions = cursor.numbers("QiiqI")
        if dimensions > len(data) // 8:  # before that many numbers are asked for
            raise Malformed(f"a weight of a CUDA delegate has {dimensions:,} dimensions")
        shape = sound_shape(cursor.numbers(f"{dimensions}q"))
        cursor.numbers(f"{dimensions}q")  # strides
        weights.append(BlobWeight(name, key, dtype_name(dtype), shape, nbytes, device_name(device, 0)))
    return Blob(tuple(weights), library=library)


def _xnnpack(data: memoryview) -> Blob:
    if len(data) < 8 + _XNNPACK_HEADER.size:
        raise Malformed("an XNNPACK blob ends in its header")
    _, start, size, base, constant_bytes = _XNNPACK_HEADER.unpack_from(data, 8)
    if start + size > len(data) or base + constant_bytes > len(data):
        raise Malformed("an XNNPACK blob is shorter than its header says")
    root = Buffer(data[start : start + size]).root()
    places = root.tables(8, lambda t: (t.scalar(1, "Q"), t.text(2) or None))
    nodes = Counter(root.tables(1, _node_name))
    weights = []
    for tensor, quantization in root.tables(2, _value):
        index = tensor.scalar(3, "I")
        if not index:
            continue
        if index >= len(places):
            raise Malformed(f"an XNNPACK tensor refers to constant {index} of {len(places)}")
        nbytes, key = places[index]
        shape = sound_shape(tensor.numbers(2, "I"))
        kind = tensor.scalar(0, "h")
        format_, scales = _format(kind, quantization, places)
        weights.append(BlobWeight(key or f"constant {index}", key, format_, shape, nbytes, "cpu"))
        if scales is not None:
            weights.append(scales)
    return Blob(tuple(weights), dict(nodes))


def _node_name(table: Table) -> str:
    kind = table.scalar(0, "B")
    if not 1 <= kind <= len(_XNNPACK_NODES):
        raise Malformed(f"an XNNPACK graph has a node of the unknown kind {kind}")
    return _XNNPACK_NODES[kind - 1]


def _value(table: Table) -> tuple[Table, tuple[int, Table] | None]:
    """Return a value's tensor and, if it is quantized, the kind of its parameters with them."""
    kind, content = table.scalar(0, "B"), table.table(1)
    if content is None or kind not in (1, 2):
        raise Malformed(f"an XNNPACK graph has a value of the unknown kind {kind}")
    if kind == 1:
        return content, None
    tensor, parameters = content.table(0), content.table(2)
    if tensor is None:
        raise Malformed("an XNNPACK graph has a quantized value without a tensor")
    return tensor, (content.scalar(1, "B"), parameters) if parameters else None


_PER_CHANNEL, _PER_GROUP = 1, 4


def _format(
    kind: int, quantization: tuple[int, Table] | None, places: list[tuple[int, str | None]]
) -> tuple[str, BlobWeight | None]:
    """Name a weight's format, and return the tensor of its scales when that is kept by name."""
    if kind not in _XNNPACK_TYPES:
        raise Malformed(f"an XNNPACK tensor has the unknown data type {kind}")
    name = _XNNPACK_TYPES[kind]
    if quantization is None or quantization[0] not in (_PER_CHANNEL, _PER_GROUP):
        return name, None
    union, parameters = quantization
    group = parameters.scalar(2, "i") if union == _PER_GROUP else 0
    first = 4 if union == _PER_GROUP else 2
    index, count = parameters.scalar(first, "I"), parameters.scalar(first + 1, "I")
    name = f"{name} g{group}" if group else name
    if not index:
        return name, None
    if index >= len(places):
        raise Malformed(f"an XNNPACK tensor's scales refer to constant {index} of {len(places)}")
    nbytes, key = places[index]
    dtype = "bfloat16" if nbytes == nbytes_of("bfloat16", (count,)) else "float32"
    return name, BlobWeight(key or f"constant {index}", key, dtype, (count,), nbytes, "cpu")
