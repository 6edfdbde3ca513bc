"""Read any ExecuTorch program (`.pte`) without loading it: methods, values, delegates, segments.

Layout: a flatbuffer (schema `executorch/schema/program.fbs`), optionally with an extended header after its first eight
bytes, followed by segments. Field numbers below are positions in that schema.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.inspection.files import Span, map_file, naming, segment_spans
from gemma4cli.inspection.flatbuffer import Buffer, Malformed, Table
from gemma4cli.inspection.tensors import STRUCT_CODES, Tensor, device_name, dtype_name, sound_shape

IDENTIFIER = b"ET12"
_HEADER = b"eh00"
_HEADER_BYTES = 24
_HEADER_WITH_SIZE_BYTES = 32
_MOST_VALUES = 4096


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a method: kind is "none", "int", "bool", "double", "tensor", "string" or "… list"."""

    kind: str
    value: Any = None


@dataclass(frozen=True)
class Delegate:
    """A part of a method that a backend runs; `blob` is what the backend gets, `calls` how often it is called."""

    backend: str
    specs: tuple[tuple[str, bytes], ...]
    blob: Span
    is_inline: bool
    calls: int


@dataclass(frozen=True)
class PlannedBuffer:
    """Memory that the runtime sets aside for a method's tensors."""

    nbytes: int
    device: str


@dataclass(frozen=True)
class Method:
    """A method. `operators` counts the calls of each operator outside delegates, `instructions` all instructions."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: dict[str, int]
    delegates: tuple[Delegate, ...]
    buffers: tuple[PlannedBuffer, ...]
    instructions: int

    @property
    def is_constant(self) -> bool:
        """A method that takes nothing and computes nothing: a value under a name."""
        return not self.inputs and not self.instructions and bool(self.outputs)

    @property
    def tensors(self) -> list[Tensor]:
        return [value.value for value in self.values if value.kind == "tensor"]


@dataclass(frozen=True)
class Program:
    """A `.pte` file. `code_bytes` is the flatbuffer; `constants` are the entries that ``Tensor.data_index`` counts."""

    path: Path
    data: memoryview
    version: int
    methods: tuple[Method, ...]
    segments: tuple[Span, ...]
    named_data: dict[str, Span]
    constants: tuple[Span, ...]
    code_bytes: int

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, span: Span) -> memoryview:
        return self.data[span.offset : span.offset + span.size]

    def constant(self, tensor: Tensor) -> memoryview | None:
        """Return the bytes of a constant stored in this file; None for one that lies elsewhere."""
        if tensor.is_external or not tensor.data_index:
            return None
        span = self.constants[tensor.data_index]
        if tensor.nbytes > span.size:
            raise Malformed(f"constant {tensor.data_index} has {span.size:,} of {tensor.nbytes:,} bytes")
        return self.read(Span(span.offset, tensor.nbytes))

    def constant_value(self, method: Method) -> Any:
        """Return what a constant method answers: numbers, text, lists; a large tensor is not read (None)."""
        answers = [self._plain(method.values[index]) for index in method.outputs]
        return answers[0] if len(answers) == 1 else answers

    def _plain(self, value: Value) -> Any:
        if value.kind != "tensor":
            return value.value
        tensor: Tensor = value.value
        code = STRUCT_CODES.get(tensor.dtype)
        data = self.constant(tensor) if code and tensor.nbytes <= _MOST_VALUES * 8 else None
        if data is None:
            return None
        return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))


def read_program(path: Path) -> Program:
    """Read a `.pte` file.

    Raises: G4Error naming the file and what is wrong with it.
    """
    data = map_file(path)
    if bytes(data[4:8]) != IDENTIFIER:
        raise G4Error(
            f"{path} is not an ExecuTorch program: bytes 4 to 7 are {bytes(data[4:8])!r} instead of {IDENTIFIER!r}.",
            hint="A program ends in .pte; g4 export makes one.",
        )
    with naming(path):
        return _read(path, data)


def _read(path: Path, data: memoryview) -> Program:
    code_bytes, base = _extended_header(data)
    root = Buffer(data[:code_bytes]).root()
    segments = segment_spans(root.tables(4, lambda t: Span(t.scalar(0, "Q"), t.scalar(1, "Q"))), base, len(data))
    inline = root.tables(3, lambda t: Span(*(t.span(0) or (0, 0))))
    constants = _constants(root, segments)
    named = {}
    for key, index in root.tables(7, lambda t: (t.text(0) or "", t.scalar(1, "I"))):
        named[key] = _item(segments, index, "segment")
    methods = tuple(root.tables(1, lambda t: _method(t, segments, inline, len(constants))))
    return Program(
        path, data, root.scalar(0, "I"), methods, tuple(segments), named, constants, min(code_bytes, len(data))
    )


def _extended_header(data: memoryview) -> tuple[int, int]:
    """Return (bytes of the flatbuffer, first byte of the segments)."""
    if bytes(data[8:12]) != _HEADER or len(data) < 8 + _HEADER_BYTES:
        return len(data), len(data)
    length, code_bytes, base = struct.unpack_from("<IQQ", data, 12)
    if length < _HEADER_BYTES:
        raise Malformed(f"its header says to be {length} bytes long")
    if code_bytes > len(data) or base > len(data):
        raise Malformed(f"it has {len(data):,} of {max(code_bytes, base):,} bytes, so it was cut off")
    if length >= _HEADER_WITH_SIZE_BYTES and len(data) >= 8 + _HEADER_WITH_SIZE_BYTES:
        (segment_bytes,) = struct.unpack_from("<Q", data, 8 + _HEADER_BYTES)
        if segment_bytes and base + segment_bytes > len(data):
            raise Malformed(f"it has {len(data):,} of {base + segment_bytes:,} bytes, so it was cut off")
    return code_bytes, base


def _constants(root: Table, segments: Sequence[Span]) -> tuple[Span, ...]:
    """Locate the constants: in one segment, or (files from before 2024-09) each in the flatbuffer."""
    table = root.table(5)
    offsets = table.numbers(1, "Q") if table else ()
    if not offsets:
        return tuple(root.tables(2, lambda t: Span(*(t.span(0) or (0, 0)))))
    segment = Span(0, 0) if offsets == (0,) else _item(segments, table.scalar(0, "I"), "segment")
    for offset in offsets:
        if offset > segment.size:
            raise Malformed(f"a constant starts at byte {offset:,} of a segment of {segment.size:,} bytes")
    return tuple(Span(segment.offset + offset, segment.size - offset) for offset in offsets)


def _method(table: Table, segments: Sequence[Span], inline: Sequence[Span], constants: int) -> Method:
    values = tuple(table.tables(2, lambda t: _value(t, constants)))
    operators = table.tables(6, _operator)
    calls: Counter[str] = Counter()
    delegate_calls: Counter[int] = Counter()
    instructions = 0
    for chain in table.tables(5, lambda t: t.tables(2, _instruction)):
        for kind, index in chain:
            instructions += 1
            if kind == _KERNEL_CALL:
                calls[_item(operators, index, "operator")] += 1
            elif kind == _DELEGATE_CALL:
                delegate_calls[index] += 1
    parsed = table.tables(7, lambda t: _delegate(t, segments, inline))
    for index in delegate_calls:
        _item(parsed, index, "delegate")
    inputs, outputs = table.numbers(3, "i"), table.numbers(4, "i")
    for index in (*inputs, *outputs):
        _item(values, index, "value")
    delegates = tuple(Delegate(*part, calls=delegate_calls[index]) for index, part in enumerate(parsed))
    return Method(table.text(0) or "", values, inputs, outputs, dict(calls), delegates, _buffers(table), instructions)


_KERNEL_CALL, _DELEGATE_CALL = 1, 2
_LISTS = {7: ("int list", "q"), 8: ("double list", "d"), 9: ("bool list", "?")}
_REFERENCES = {10: "tensor list", 11: "optional tensor list"}
_NUMBERS = {2: ("int", "q"), 3: ("bool", "?"), 4: ("double", "d")}


def _instruction(table: Table) -> tuple[int, int]:
    """Return the kind of an instruction and, of a call, the operator's or delegate's number."""
    kind = table.scalar(0, "B")
    call = table.table(1) if kind in (_KERNEL_CALL, _DELEGATE_CALL) else None
    return kind, call.scalar(0, "i") if call else 0


def _operator(table: Table) -> str:
    name, overload = table.text(0) or "", table.text(1)
    return f"{name}.{overload}" if overload else name


def _value(table: Table, constants: int) -> Value:
    kind = table.scalar(0, "B")
    content = table.table(1)
    if content is None or kind == 1:
        return Value("none")
    if kind in _NUMBERS:
        name, code = _NUMBERS[kind]
        return Value(name, content.scalar(0, code))
    if kind == 5:
        return Value("tensor", _tensor(content, constants))
    if kind == 6:
        return Value("string", content.text(0) or "")
    if kind in _LISTS:
        name, code = _LISTS[kind]
        return Value(name, list(content.numbers(0, code)))
    if kind in _REFERENCES:
        return Value(_REFERENCES[kind], list(content.numbers(0, "i")))
    raise Malformed(f"it has a value of the unknown kind {kind}")


def _tensor(table: Table, constants: int) -> Tensor:
    extra, planned = table.table(9), table.table(6)
    memory = (planned.scalar(0, "I"), planned.scalar(1, "I") | planned.scalar(2, "I") << 32) if planned else None
    tensor = Tensor(
        dtype=dtype_name(table.scalar(0, "b")),
        shape=sound_shape(table.numbers(2, "i")),
        is_dynamic=table.scalar(8, "b") != 0,
        name=extra.text(1) if extra else None,
        data_index=table.scalar(5, "I"),
        is_external=bool(extra and extra.scalar(2, "b") == 1),
        memory=memory,
        device=device_name(extra.scalar(3, "b"), extra.scalar(4, "b")) if extra else "cpu",
    )
    if tensor.is_constant and not tensor.is_external and tensor.data_index >= constants:
        raise Malformed(f"a tensor refers to constant {tensor.data_index} of {constants}")
    return tensor


def _delegate(
    table: Table, segments: Sequence[Span], inline: Sequence[Span]
) -> tuple[str, tuple[tuple[str, bytes], ...], Span, bool]:
    reference = table.table(1)
    specs = tuple(table.tables(2, lambda t: (t.text(0) or "", t.data(1))))
    is_inline = not (reference and reference.scalar(0, "b") == 1)
    index = reference.scalar(1, "I") if reference else 0
    if reference is None:
        raise Malformed("a delegate has no data")
    return table.text(0) or "", specs, _item(inline if is_inline else segments, index, "delegate blob"), is_inline


def _buffers(table: Table) -> tuple[PlannedBuffer, ...]:
    """Buffer 0 is reserved and stays in the list, so that ``Tensor.memory`` counts as the file does."""
    sizes = table.numbers(8, "q")
    devices = dict(table.tables(9, lambda t: (t.scalar(0, "i"), device_name(t.scalar(1, "b"), t.scalar(2, "b")))))
    if any(size < 0 for size in sizes):
        raise Malformed("it plans memory of a negative size")
    return tuple(PlannedBuffer(size, devices.get(index, "cpu")) for index, size in enumerate(sizes))


def _item(items: Sequence[Any], index: int, what: str) -> Any:
    if not 0 <= index < len(items):
        raise Malformed(f"it refers to {what} {index} of {len(items)}")
    return items[index]
