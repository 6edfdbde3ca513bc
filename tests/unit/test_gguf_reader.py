"""The GGUF reader: what it reads, what it refuses, and 2,400 damaged files."""

from __future__ import annotations

import random
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.errors import G4Error
from gemma4cli.quant.gguf.convert import plan_conversion
from gemma4cli.quant.gguf.reader import GGUFFile, open_gguf
from tests.support.gguf_writer import describe, key, pack, string, tensor, write, write_split
from tests.support.tiny import write_checkpoint

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
ARCHITECTURE = key("general.architecture", STRING, string("gemma4"))
HUGE = 1 << 63


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("gguf") / "tiny",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", describe(folder, GGML.Q8_0))


def test_reads_what_gguf_py_reads(file: Path) -> None:
    ours, theirs = open_gguf([file]), GGUFReader(file)
    assert [*ours.metadata] == [name for name in theirs.fields if not name.startswith("GGUF.")]
    for name, value in ours.metadata.items():
        expected = theirs.fields[name].contents()
        assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected, name
    assert [*ours.tensors] == [t.name for t in theirs.tensors]
    for other in theirs.tensors:
        mine = ours.tensors[other.name]
        assert mine.shape == tuple(int(n) for n in reversed(other.shape))
        assert mine.type == other.tensor_type
        assert np.array_equal(mine.blocks().reshape(-1), other.data.reshape(-1).view(np.uint8))
        assert np.array_equal(mine.blocks(0, 1)[0], mine.blocks()[0])


def test_version_2_and_every_scalar_type(tmp_path: Path) -> None:
    scalars = {0: ("<B", 200), 1: ("<b", -3), 2: ("<H", 60_000), 3: ("<h", -4), 4: ("<I", 1 << 31), 5: ("<i", -5),
               6: ("<f", 0.5), 7: ("<?", True), 10: ("<Q", HUGE), 11: ("<q", -6), 12: ("<d", 0.1)}  # fmt: skip
    keys = [key(f"k{kind}", kind, struct.pack(code, value)) for kind, (code, value) in scalars.items()]
    keys += [key(f"a{kind}", ARRAY, u32(kind) + u64(2) + struct.pack(code, value) * 2)
             for kind, (code, value) in scalars.items()]  # fmt: skip
    keys.append(key("texts", ARRAY, u32(STRING) + u64(2) + string("") + string("é\n")))
    path = tmp_path / "v2.gguf"
    path.write_bytes(pack(keys, version=2))
    metadata = GGUFFile(path).metadata
    for kind, (_, value) in scalars.items():
        assert (metadata[f"k{kind}"], metadata[f"a{kind}"]) == (value, [value, value])
    assert metadata["texts"] == ["", "é\n"]


def test_alignment_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = np.arange(4, dtype="<f4").tobytes()
    align = key("general.alignment", U32, u32(256))
    path.write_bytes(pack([align], [tensor("t", [4], 0, 0)], data, alignment=256))
    assert GGUFFile(path).tensors["t"].blocks().view("<f4").ravel().tolist() == [0, 1, 2, 3]


F32_16 = tensor("t", [16], 0, 0)
BAD_FILES = {
    "magic": (b"GGML" + bytes(60), "is not a GGUF file"),
    "short": (b"GGUF\3\0\0\0", "too short to be a GGUF file"),
    "version 1": (pack(version=1) + bytes(64), "GGUF version 1; g4 reads versions 2 and 3"),
    "big-endian": (pack(version=3 << 24) + bytes(64), "is a big-endian GGUF file"),
    "key count": (pack(counts=(0, HUGE)), f"{HUGE} metadata keys are more than a model has"),
    "tensor count": (pack(counts=(HUGE, 0)), f"{HUGE} tensors are more than a model has"),
    "keys end": (pack([ARCHITECTURE], counts=(0, 2), alignment=1), "the name of metadata key 1 ends beyond"),
    "key name": (pack([u64(HUGE) + b"abc" + bytes(64)]), "the name of metadata key 0 ends beyond the end of the file"),
    "key not UTF-8": (pack([key(b"\xff\xfe", U8, b"\0")]), "the name of metadata key 0 is not UTF-8"),
    "key twice": (pack([ARCHITECTURE] * 2), "metadata key general.architecture appears twice"),
    "value type": (pack([key("k", 13, bytes(8))]), "metadata key k has value type 13, which GGUF does not define"),
    "string length": (pack([key("k", STRING, u64(HUGE))]), "metadata key k ends beyond the end of the file"),
    "string not UTF-8": (pack([key("k", STRING, string(b"\x80"))]), "metadata key k is not UTF-8"),
    "array of arrays": (pack([key("k", ARRAY, u32(ARRAY) + u64(1) + bytes(64))]), "an array of value type 9"),
    "array count": (pack([key("k", ARRAY, u32(U8) + u64(HUGE))]), f"k has {HUGE} items, more than any list"),
    "array end": (pack([key("k", ARRAY, u32(U64) + u64(1000) + bytes(64))]), "key k ends beyond the end of the file"),
    "strings end": (pack([key("k", ARRAY, u32(STRING) + u64(1000))]), "key k ends beyond the end of the file"),
    "string in list": (pack([key("k", ARRAY, u32(STRING) + u64(2) + string("a") + u64(HUGE))]), "key k[1] ends beyond"),
    "list cut off": (pack([key("k", ARRAY, u32(STRING) + u64(3) + string("a") * 2)], alignment=1)[:-1] + b"x",
                     "metadata key k"),
    "list not UTF-8": (pack([key("k", ARRAY, u32(STRING) + u64(1) + string(b"\xc3"))]), "key k[0] is not UTF-8"),
    "odd name": (pack([key("a\nb" + "c" * 80, 99, b"")]), "metadata key a?b" + "c" * 57 + "… has value type 99"),
    "alignment 0": (pack([key("general.alignment", U32, u32(0))]), "general.alignment is 0; it must be a power of two"),
    "alignment 48": (pack([key("general.alignment", U32, u32(48))]), "general.alignment is 48"),
    "alignment text": (pack([key("general.alignment", STRING, string("32"))]), "general.alignment is '32'"),
    "tensor name": (pack([], [u64(HUGE)], bytes(64)), "the name of tensor 0 ends beyond the end of the file"),
    "tensor twice": (pack([], [F32_16, F32_16], bytes(64)), "tensor t appears twice"),
    "no dimensions": (pack([], [tensor("t", [], 0, 0)], bytes(64)), "tensor t has 0 dimensions"),
    "five dimensions": (pack([], [tensor("t", [1] * 5, 0, 0)], bytes(64)), "tensor t has 5 dimensions"),
    "empty dimension": (pack([], [tensor("t", [16, 0], 0, 0)], bytes(64)), "tensor t has an empty dimension"),
    "tensor type": (pack([], [tensor("t", [16], 5, 0)], bytes(64)), "tensor t has type 5, which GGUF does not define"),
    "block": (pack([], [tensor("t", [16, 2], 8, 0)], bytes(64)), "rows of 16 values, not a multiple of Q8_0's block"),
    "offset": (pack([], [tensor("t", [4], 0, 8)], bytes(64)), "offset 8, not a multiple of the alignment 32"),
    "offset beyond": (pack([], [tensor("t", [4], 0, 1 << 62)], bytes(64)), "tensor t ends beyond the end of the file"),
    "size beyond": (pack([], [tensor("t", [HUGE, HUGE], 0, 0)], bytes(64)), "tensor t ends beyond the end of the file"),
    "overlap": (pack([], [tensor("a", [16], 0, 0), tensor("b", [4], 0, 32)], bytes(64)), "tensors a and b overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_one_sentence_for_each_way_to_be_wrong(tmp_path: Path, name: str) -> None:
    contents, sentence = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(contents)
    with pytest.raises(G4Error) as error:
        GGUFFile(path)
    assert sentence in error.value.message
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint


def test_a_string_longer_than_any_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(pack([key("k", STRING, u64((1 << 24) + 1))], data=bytes((1 << 24) + 64)))
    with pytest.raises(G4Error, match=f"k has {(1 << 24) + 1} bytes, more than any text"):
        GGUFFile(path)


def test_not_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(G4Error, match="is not a file"):
            open_gguf([path])


def test_truncated_anywhere(tmp_path: Path) -> None:
    keys = [ARCHITECTURE, key("n", U32, u32(7)), key("l", ARRAY, u32(STRING) + u64(2) + string("ab") + string("c"))]
    whole = pack(keys, [tensor("a", [8], 0, 0), tensor("b", [32, 2], 8, 32)], bytes(32 + 68))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    assert len(open_gguf([path]).tensors) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(G4Error):
            open_gguf([path])


def test_split_model(folder: Path, file: Path, tmp_path: Path) -> None:
    whole = open_gguf([file])
    parts = write_split(tmp_path / "s.gguf", describe(folder, GGML.Q8_0), 3)
    for given in ([parts[0]], [parts[2]], parts, parts[::-1]):
        joined = open_gguf(given)
        assert [*joined.paths] == parts
        assert joined.metadata["general.name"] == "Test"
        assert joined.tensors.keys() == whole.tensors.keys()
        for name, one in whole.tensors.items():
            assert np.array_equal(one.blocks(), joined.tensors[name].blocks()), name


def test_split_model_with_a_part_missing(folder: Path, tmp_path: Path) -> None:
    parts = write_split(tmp_path / "s.gguf", describe(folder, GGML.Q8_0), 3)
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(G4Error, match=r"Part s-00002-of-00003\.gguf of the split model is missing beside s-00001"):
        open_gguf([parts[0]])
    with pytest.raises(G4Error, match=r"Part 2 of 3 of the split model s-00001-of-00003\.gguf is missing"):
        open_gguf([parts[0], parts[2]])
    renamed = parts[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(G4Error, match=r"Part 2 of 3 of the split model whole\.gguf is missing"):
        open_gguf([renamed])


def test_split_model_with_a_foreign_part(folder: Path, file: Path, tmp_path: Path) -> None:
    parts = write_split(tmp_path / "s.gguf", describe(folder, GGML.Q8_0), 3)
    with pytest.raises(G4Error, match=r"is not a part of a split model: split\.no is missing"):
        open_gguf([parts[0], file])
    for wrong in ([parts[0], parts[0], parts[1]], [*parts[:2], *write_split(tmp_path / "o.gguf", describe(folder), 2)]):
        with pytest.raises(G4Error, match=r"is not a part of the same model as s-00001-of-00003\.gguf"):
            open_gguf(wrong)
    fewer = write_split(tmp_path / "f.gguf", describe(folder).without("output_norm.weight"), 3)
    shorter = fewer[2].read_bytes()
    counted = write_split(tmp_path / "s.gguf", describe(folder, GGML.Q8_0), 3)
    total = len(open_gguf(counted).tensors)
    parts[2].write_bytes(shorter.replace(
        string("split.tensors.count") + u32(5) + u32(total - 1), string("split.tensors.count") + u32(5) + u32(total)
    ))  # fmt: skip
    with pytest.raises(G4Error, match=f"hold {total - 1} tensors, but split.tensors.count is {total}"):
        open_gguf([parts[0]])


def test_split_model_that_repeats_a_tensor(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for number, path in enumerate(paths):
        split = [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", 2)),
                 key("split.tensors.count", 5, u32(2))]  # fmt: skip
        path.write_bytes(pack(split, [F32_16], bytes(64)))
    with pytest.raises(G4Error, match=r"b\.gguf repeats tensor t of a\.gguf"):
        open_gguf(paths)


def test_split_model_of_two_names(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for number, path in enumerate(paths):
        split = [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", 2)),
                 key("split.tensors.count", 5, u32(0)), key("general.name", STRING, string(path.name))]  # fmt: skip
        path.write_bytes(pack(split))
    with pytest.raises(G4Error, match=r"b\.gguf is of another model: general\.name is 'b\.gguf', in a\.gguf it is"):
        open_gguf(paths)


def test_fingerprint_follows_the_contents_not_the_path(folder: Path, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert open_gguf([copy]).fingerprint == open_gguf([file]).fingerprint
    other = write(tmp_path / "other.gguf", describe(folder, GGML.Q8_0, seed=1).set("general.name", "Other"))
    assert open_gguf([other]).fingerprint != open_gguf([file]).fingerprint
    changed = bytearray(file.read_bytes())
    changed[open_gguf([file]).tensors["blk.1.ffn_up.weight"].offset + 5] ^= 1
    copy.write_bytes(changed)
    assert open_gguf([copy]).fingerprint != open_gguf([file]).fingerprint


EXTREMES = [0, 1, 7, 31, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, HUGE - 1, HUGE,
            (1 << 64) - 1]  # fmt: skip


def mutate(original: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """Damage a file in one to four places, mostly where its structure is."""
    data = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(header_bytes, len(data)) if rng.random() < 0.9 else len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 8] = u64(rng.choice([*EXTREMES, len(data) - at, len(data)]))
            case 2:
                data[at : at + 4] = u32(rng.choice(EXTREMES) & 0xFFFFFFFF)
            case 3:
                del data[at : at + rng.randint(1, 64)]
            case 4:
                other = rng.randrange(header_bytes)
                data[at:at] = original[other : other + rng.randint(1, 64)]
            case 5:
                del data[rng.randrange(8, len(data)) :]
            case 6:
                data[at : at + 16] = rng.randbytes(16)
        if len(data) < 32:
            break
    return bytes(data)


def test_thousands_of_damaged_files(folder: Path, file: Path, tmp_path: Path) -> None:
    """Every one is read or refused with one sentence, in little time and memory; most of them are refused."""
    original, header_bytes = file.read_bytes(), open_gguf([file]).tensors["token_embd.weight"].offset
    path = tmp_path / "fuzzed.gguf"
    plan_conversion([file])
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest, sentences = 0, 0.0, set()
    for seed in range(2400):
        path.write_bytes(mutate(original, header_bytes, random.Random(seed)))
        started = time.process_time()
        try:
            plan_conversion([path])
        except G4Error as error:
            refused += 1
            sentences.add(error.message)
        slowest = max(slowest, time.process_time() - started)
    assert refused > 2000
    assert not any("\n" in sentence for sentence in sentences)
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 << 10
