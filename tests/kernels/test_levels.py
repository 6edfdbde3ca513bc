"""The assembly that makes levels of a cache's codes, carried out here: the interpreter, which has none, takes arithmetic."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from gemma4cli.kernels.attention import decode, operands, turboquant

WORDS = [int(word) for word in np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint64)]
CODEBOOK = turboquant.codebook().tolist()


def halves(word: int) -> np.ndarray:
    return np.frombuffer(struct.pack("<I", word), np.float16).astype(np.float64)


def packed(values: np.ndarray) -> int:
    return struct.unpack("<I", values.astype(np.float16).tobytes())[0]


def permuted(a: int, b: int, selector: int) -> int:
    """PTX's prmt.b32 in its default mode: four bytes of the eight, by the selector's nibbles."""
    both = struct.pack("<II", a, b)
    return struct.unpack("<I", bytes(both[selector >> 4 * i & 7] for i in range(4)))[0]


OPERATIONS = {
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permuted,
    "add.rn.f16x2": lambda a, b: packed(halves(a) + halves(b)),
    "mul.rn.f16x2": lambda a, b: packed(halves(a) * halves(b)),
    "fma.rn.f16x2": lambda a, b, c: packed(halves(a) * halves(b) + halves(c)),
    "mov.b32": lambda a: a,
}


def carried_out(assembly: str, inputs: dict[str, int]) -> dict[str, int]:
    """The registers at the end of straight-line code; outputs of 16 bits by their names."""
    registers = dict(inputs)
    for statement in assembly.strip("{} ").split(";"):
        if not (statement := statement.strip()) or statement.startswith(".reg"):
            continue
        operation, operands_ = statement.split(" ", 1)
        if pair := re.fullmatch(r"\{(\$\d+), (\$\d+)\}, (\w+)", operands_):
            value = registers[pair[3]]
            registers[pair[1]], registers[pair[2]] = value & 0xFFFF, value >> 16
            continue
        result, *sources = operands_.split(", ")
        values = [registers[name] if name in registers else int(name, 0) for name in sources]
        registers[result] = OPERATIONS[operation](*values)
    return registers


def level(word: int, byte: int, nibble: int | None) -> float:
    code = word >> 8 * byte & 255
    if nibble is not None:
        return CODEBOOK[code >> 4 * nibble & 15]
    return (code - 256 * (code > 127)) / 128


def outputs(registers: dict[str, int], count: int) -> list[float]:
    return [float(np.uint16(registers[f"${i}"]).view(np.float16)) for i in range(count)]


@pytest.mark.parametrize(
    ("assembly", "nibbles"), [(operands._FRACTIONS, [None]), (operands._LEVELS, [0, 1])], ids=["int8", "tq4"]
)
def test_of_a_word(assembly: object, nibbles: list[int | None]) -> None:
    count = 4 * len(nibbles)
    for word in WORDS:
        made = outputs(carried_out(assembly.value, {f"${count}": word}), count)
        assert made == [level(word, byte, nibble) for nibble in nibbles for byte in range(4)]


@pytest.mark.parametrize(
    ("assembly", "nibbles"), [(operands._FRACTION_PAIRS, [None]), (operands._LEVEL_PAIRS, [0, 1])], ids=["int8", "tq4"]
)
def test_of_two_words_side_by_side(assembly: object, nibbles: list[int | None]) -> None:
    count = 8 * len(nibbles)
    for first, second in zip(WORDS[::2], WORDS[1::2], strict=True):
        made = outputs(carried_out(assembly.value, {f"${count}": first, f"${count + 1}": second}), count)
        assert made == [
            level(word, byte, nibble) for nibble in nibbles for byte in range(4) for word in (first, second)
        ]


@pytest.mark.parametrize(
    ("assembly", "nibbles"), [(decode._FRACTIONS, [None]), (decode._LEVELS, [0, 1])], ids=["int8", "tq4"]
)
def test_of_four_bytes(assembly: object, nibbles: list[int | None]) -> None:
    """As ``decode.split`` takes them: two levels to an output."""
    count = 2 * len(nibbles)
    for word in WORDS:
        registers = carried_out(assembly.value, {f"${count}": word})
        made = [value for i in range(count) for value in halves(registers[f"${i}"]).tolist()]
        assert made == [level(word, byte, nibble) for nibble in nibbles for byte in range(4)]
