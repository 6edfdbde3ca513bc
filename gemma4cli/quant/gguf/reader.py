"""Read GGUF files (versions 2 and 3, little-endian, whole or split) without trusting a single length in them.

Source: the format description in ggml's docs/gguf.md. Every count, length and offset is compared with the bytes that
are really there before anything is allocated for it, so that a damaged or hostile file costs one sentence:

    magic "GGUF", version u32, tensor count u64, key count u64
    keys:     string name, u32 value type, value     (string: u64 length + UTF-8; array: u32 type, u64 count, items)
    tensors:  string name, u32 dimensions, u64 x dims, u32 tensor type, u64 offset from the data section
    padding to `general.alignment` (32), data section
"""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma4cli.errors import G4Error

Scalar = int | float | bool
Value = Scalar | str | list[Any]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Far above any real file (31B: 51 keys, 833 tensors, 514,906 merges); they keep a hostile file's memory small.
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_MAX_ITEMS = 1 << 22
_MAX_STRING_BYTES = 1 << 24
_SCALAR_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_PART_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_FINGERPRINT_BYTES = 4096
_DAMAGED = "The file is damaged or incomplete; fetch it again."


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor's place in a file. `shape` is PyTorch's order: [out, in] for a matrix."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int
    file: GGUFFile

    @property
    def rows(self) -> int:
        """Rows of whole blocks: everything but the last dimension."""
        return math.prod(self.shape[:-1])

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop` as they lie in the file: uint8 [rows, bytes per row], a view of the mapping."""
        row_bytes = self.nbytes // self.rows
        stop = self.rows if stop is None else stop
        count = (stop - start) * row_bytes
        raw = np.frombuffer(self.file.mapping, np.uint8, count, self.offset + start * row_bytes)
        return raw.reshape(stop - start, row_bytes)

    def slice(self, start: int, stop: int) -> GGUFTensor:
        """Return rows `start` to `stop` as a tensor of its own."""
        row_bytes = self.nbytes // self.rows
        place, nbytes = self.offset + start * row_bytes, (stop - start) * row_bytes
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=place, nbytes=nbytes)

    def prefetch(self, start: int, stop: int) -> None:
        """Let the disk read these rows while something else is done."""
        self._advise(mmap.MADV_WILLNEED, start, stop)

    def drop_pages(self, start: int, stop: int) -> None:
        """Tell the kernel that these rows are no longer needed, so that their pages do not count as our memory."""
        self._advise(mmap.MADV_DONTNEED, start, stop)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        row_bytes = self.nbytes // self.rows
        first = (self.offset + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.mapping.madvise(advice, first, self.offset + stop * row_bytes - first)


class GGUFFile:
    """One memory-mapped file: `metadata` (key -> value) and `tensors` (name -> place), fully validated.

    Raises: G4Error naming the file and the structure that is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapping = _map(path)
        parser = _Parser(path, self.mapping)
        tensor_count, key_count = parser.header()
        self.metadata = parser.metadata(key_count)
        alignment = _alignment(path, self.metadata)
        described = parser.tensors(tensor_count)
        data_start = -(-parser.position // alignment) * alignment
        self.data_start = data_start
        self.tensors = _place(self, described, data_start, alignment)


@dataclass(frozen=True)
class GGUF:
    """A model as one or several files: the first file's metadata and the tensors of all of them."""

    paths: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every file's size, metadata and tensor list and of the first bytes of every tensor.

        Tells two models apart in milliseconds, where the hash of a whole file costs as much as converting it.
        """
        digest = hashlib.sha256()
        for file in {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values():
            digest.update(len(file.mapping).to_bytes(8, "little") + file.mapping[: file.data_start])
            for tensor in file.tensors.values():
                digest.update(tensor.blocks().reshape(-1)[:_FINGERPRINT_BYTES])
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the files; views that are still alive keep theirs mapped."""
        for tensor in {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values():
            try:
                tensor.mapping.close()
            except BufferError:
                continue


def open_gguf(paths: list[Path]) -> GGUF:
    """Open a model given as one file, as any one part of a split model, or as all of its parts.

    Raises: G4Error when a file is damaged, a part is missing, or a part belongs to another model.
    """
    files = [GGUFFile(path) for path in _all_parts(paths)]
    if len(files) > 1 or files[0].metadata.get("split.count", 1) != 1:
        files = _check_split(files)
    tensors: dict[str, GGUFTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise G4Error(f"{file.path} repeats tensor {name} of {tensors[name].file.path.name}.", hint=_DAMAGED)
            tensors[name] = tensor
    return GGUF(tuple(file.path for file in files), files[0].metadata, tensors)


def is_quantized_gguf(path: Path) -> bool:
    """Whether a GGUF model has any tensor of another type than a float.

    Raises: G4Error as `open_gguf` does.
    """
    gguf = open_gguf([path])
    is_quantized = any(tensor.type not in _FLOAT_TYPES for tensor in gguf.tensors.values())
    gguf.close()
    return is_quantized


def _map(path: Path) -> mmap.mmap:
    if not path.is_file():
        raise G4Error(f"{path} is not a file.", hint="Give the path of a .gguf file.")
    if path.stat().st_size < len(MAGIC) + 4 + 8 + 8:
        raise G4Error(f"{path} is too short to be a GGUF file.", hint=_DAMAGED)
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Parser:
    """A cursor over the mapped file; every read checks that the bytes are there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def fail(self, what: str) -> G4Error:
        return G4Error(f"{self.path}: {what}.", hint=_DAMAGED)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.fail(f"{what} ends beyond the end of the file")

    def scalar(self, format: str, what: str) -> Scalar:
        self.need(struct.calcsize(format), what)
        (value,) = struct.unpack_from(format, self.data, self.position)
        self.position += struct.calcsize(format)
        return value

    def string(self, what: str) -> str:
        length = self.scalar("<Q", what)
        self.need(length, what)
        if length > _MAX_STRING_BYTES:
            raise self.fail(f"{what} has {length} bytes, more than any text in a model file")
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def header(self) -> tuple[int, int]:
        """Return (tensor count, key count)."""
        if self.data[: len(MAGIC)] != MAGIC:
            raise G4Error(f"{self.path} is not a GGUF file.", hint="Give the path of a .gguf file.")
        self.position = len(MAGIC)
        version = self.scalar("<I", "the version")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise G4Error(f"{self.path} is a big-endian GGUF file.", hint="Use the little-endian file of this model.")
        if version not in _VERSIONS:
            raise G4Error(f"{self.path} has GGUF version {version}; g4 reads versions 2 and 3.",
                          hint="Use a file made by a current llama.cpp.")  # fmt: skip
        tensor_count, key_count = self.scalar("<Q", "the tensor count"), self.scalar("<Q", "the key count")
        if key_count > _MAX_KEYS:
            raise self.fail(f"{key_count} metadata keys are more than a model has")
        if tensor_count > _MAX_TENSORS:
            raise self.fail(f"{tensor_count} tensors are more than a model has")
        return tensor_count, key_count

    def metadata(self, count: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for index in range(count):
            key = self.string(f"the name of metadata key {index}")
            if key in values:
                raise self.fail(f"metadata key {_short(key)} appears twice")
            what = f"metadata key {_short(key)}"
            values[key] = self.value(self.scalar("<I", what), what)
        return values

    def value(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALAR_FORMATS:
            raise self.fail(f"{what} has value type {kind}, which GGUF does not define")
        return self.scalar(_SCALAR_FORMATS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if count > _MAX_ITEMS:
            raise self.fail(f"{what} has {count} items, more than any list in a model file")
        if kind == _STRING:
            self.need(count * 8, what)
            return self.strings(count, what)
        if kind not in _SCALAR_FORMATS:
            raise self.fail(f"{what} is an array of value type {kind}, which no Gemma 4 file has")
        item = np.dtype(_SCALAR_FORMATS[kind])
        self.need(count * item.itemsize, what)
        values = np.frombuffer(self.data, item, count, self.position).tolist()
        self.position += count * item.itemsize
        return values

    def strings(self, count: int, what: str) -> list[str]:
        """Read `count` strings; written out because a vocabulary has 800,000 of them."""
        unpack = struct.Struct("<Q").unpack_from
        data, position, size = self.data, self.position, self.size
        texts: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self.fail(f"{what}[{len(texts)}] ends beyond the end of the file")
                texts.append(data[start:position].decode("utf-8"))
        except struct.error:
            raise self.fail(f"{what}[{len(texts)}] ends beyond the end of the file") from None
        except UnicodeDecodeError:
            raise self.fail(f"{what}[{len(texts)}] is not UTF-8") from None
        self.position = position
        return texts

    def tensors(self, count: int) -> list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
        """Return (name, shape in PyTorch's order, type, offset in the data section) of every tensor."""
        described: dict[str, tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = {}
        for index in range(count):
            name = self.string(f"the name of tensor {index}")
            what = f"tensor {_short(name)}"
            if name in described:
                raise self.fail(f"{what} appears twice")
            dimensions = self.scalar("<I", what)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self.fail(f"{what} has {dimensions} dimensions")
            shape = tuple(self.scalar("<Q", what) for _ in range(dimensions))
            kind, offset = self.scalar("<I", what), self.scalar("<Q", what)
            if 0 in shape:
                raise self.fail(f"{what} has an empty dimension")
            try:
                described[name] = (name, shape[::-1], GGMLQuantizationType(kind), offset)
            except ValueError:
                raise self.fail(f"{what} has type {kind}, which GGUF does not define") from None
        return list(described.values())


def _short(name: str) -> str:
    """A name out of the file, made fit for one line of an error."""
    printable = "".join(c if c.isprintable() else "?" for c in name[:60])
    return printable + ("…" if len(name) > 60 else "") if printable else '""'


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise G4Error(f"{path}: general.alignment is {alignment!r}; it must be a power of two from 8.", hint=_DAMAGED)
    return alignment


def _place(
    file: GGUFFile,
    described: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
    data_start: int,
    alignment: int,
) -> dict[str, GGUFTensor]:
    """Turn descriptions into places inside the file, refusing those outside it or on top of each other."""

    def fail(what: str) -> G4Error:
        return G4Error(f"{file.path}: {what}.", hint=_DAMAGED)

    tensors = {}
    for name, shape, kind, offset in described:
        what = f"tensor {_short(name)}"
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise fail(f"{what} has rows of {shape[-1]} values, not a multiple of {kind.name}'s block of {block_size}")
        if offset % alignment:
            raise fail(f"{what} starts at offset {offset}, not a multiple of the alignment {alignment}")
        nbytes = math.prod(shape) // block_size * block_bytes
        if data_start + offset + nbytes > len(file.mapping):
            raise fail(f"{what} ends beyond the end of the file")
        tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, nbytes, file)
    by_offset = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise fail(f"tensors {_short(before.name)} and {_short(after.name)} overlap")
    return tensors


def _all_parts(paths: list[Path]) -> list[Path]:
    """Complete one part's name to all of them; several paths are taken as they are."""
    if len(paths) > 1:
        return paths
    match = _PART_NAME.match(paths[0].name)
    if match is None:
        return paths
    count = int(match["count"])
    parts = [paths[0].with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]
    for part in parts:
        if not part.is_file():
            raise G4Error(f"Part {part.name} of the split model is missing beside {paths[0].name}.",
                          hint=f"Fetch all {count} parts into one folder.")  # fmt: skip
    return parts


def _check_split(files: list[GGUFFile]) -> list[GGUFFile]:
    """Return the parts in order after checking that they are all there and of one model."""
    count = files[0].metadata.get("split.count")
    total = files[0].metadata.get("split.tensors.count")
    by_number: dict[int, GGUFFile] = {}
    for file in files:
        for key in ("split.no", "split.count", "split.tensors.count"):
            if type(file.metadata.get(key)) is not int:
                raise G4Error(f"{file.path} is not a part of a split model: {key} is missing.",
                              hint="Give one whole file, or the parts of one model.")  # fmt: skip
        same = (file.metadata["split.count"], file.metadata["split.tensors.count"]) == (count, total)
        number = file.metadata["split.no"]
        if not same or not 0 <= number < file.metadata["split.count"] or number in by_number:
            raise G4Error(f"{file.path} is not a part of the same model as {files[0].path.name}.",
                          hint="Give the parts of one model, each once.")  # fmt: skip
        by_number[number] = file
    missing = [number for number in range(count) if number not in by_number] if count <= 4096 else [len(files)]
    if missing:
        raise G4Error(f"Part {missing[0] + 1} of {count} of the split model {files[0].path.name} is missing.",
                      hint="Give all parts, or keep them in one folder under their original names.")  # fmt: skip
    ordered = [by_number[number] for number in range(count)]
    found = sum(len(file.tensors) for file in ordered)
    if found != total:
        raise G4Error(f"The parts of {ordered[0].path.name} hold {found} tensors, but split.tensors.count is {total}.",
                      hint="One of the parts is of another model; fetch them again.")  # fmt: skip
    _check_same_model(ordered)
    return ordered


def _check_same_model(files: list[GGUFFile]) -> None:
    """Later parts usually repeat no metadata; where they do, it must agree with the first part's."""
    for file in files[1:]:
        for key in ("general.architecture", "general.name"):
            if file.metadata.get(key, files[0].metadata.get(key)) != files[0].metadata.get(key):
                raise G4Error(f"{file.path} is of another model: {key} is {file.metadata[key]!r}, in "
                              f"{files[0].path.name} it is {files[0].metadata.get(key)!r}.",
                              hint="Give the parts of one model.")  # fmt: skip
