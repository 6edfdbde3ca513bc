"""Launch configurations of the low-bit matmul kernels, per target.

sm_90 is measured on an H200 (bench/results/matmul-h200.json, matmul-prefill-h200.json and occupancy-h200.json; the limit
of registers: bench/notes.md).

The others are not measured. The model of kernels/occupancy.py chose them among candidates that fit the target without
spills, from what compiling them told (bench/results/occupancy-facts.json):

    python tools/choose_configs.py rank --target sm_86

Asked about sm_90 it chooses the fastest of both products, one configuration for all shapes but the narrow ones (there
what is 8 % slower); for one shape alone what is 0 to 15 % slower (matvec, 3 % in the mean) or the fastest (matmul). It
knows nothing of 8-bit weights.
tests/kernels/test_occupancy.py holds the entries to the model, and test_quantized_matmul.py compiles each for its target.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class MatvecConfig:
    """A program of ``matvec``: warps side by side with `rows` rows each, and `warps_k` warps that share each row.

    registers: the most a thread may have, 0 for the assembler's own choice.
    """

    rows: int
    warps: int
    warps_k: int
    registers: int

    @property
    def program_rows(self) -> int:
        return self.rows * self.warps


@dataclass(frozen=True)
class Int8MatvecConfig:
    """Rows and 32-wide groups that a program of ``matvec_int8`` holds at a time."""

    block_n: int
    block_g: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of the prefill product and its launch parameters."""

    block_n: int
    block_m: int
    group_m: int
    num_warps: int
    num_stages: int


MATVEC: dict[str, MatvecConfig] = {
    "sm_80": MatvecConfig(2, 1, 1, 0),
    "sm_90": MatvecConfig(2, 1, 1, 80),  # measured
    "sm_86": MatvecConfig(2, 1, 1, 0),
    "sm_120": MatvecConfig(2, 1, 1, 0),
}
# Where few long rows make so few programs that all fit at once, warps share rows.
_NARROW_ROWS, _NARROW_COLUMNS = 8192, range(8192, 16385)
MATVEC_NARROW: dict[str, MatvecConfig] = {
    "sm_90": MatvecConfig(2, 1, 4, 72),  # measured
    "sm_86": MatvecConfig(2, 1, 4, 72),
}
MATVEC_INT8: dict[str, Int8MatvecConfig] = {
    "sm_80": Int8MatvecConfig(4, 32, 2, 2),
    "sm_90": Int8MatvecConfig(2, 16, 1, 2),
    "sm_86": Int8MatvecConfig(2, 16, 1, 2),
    "sm_120": Int8MatvecConfig(2, 16, 1, 2),
}
MATMUL: dict[str, MatmulConfig] = {
    "sm_80": MatmulConfig(128, 128, 2, 8, 3),
    "sm_90": MatmulConfig(128, 256, 2, 8, 3),  # measured
    "sm_86": MatmulConfig(128, 64, 4, 8, 3),
    "sm_120": MatmulConfig(128, 64, 4, 8, 3),
}
# 6-bit weights take more registers to unpack: where the tile above would spill.
MATMUL_6BIT: dict[str, MatmulConfig] = {"sm_80": MatmulConfig(128, 64, 4, 8, 3)}
# Activation groups of 32 that one program of ``quantize_rows`` handles.
QUANTIZE_ROWS_GROUPS = 8


def matvec_config(target: Target, n: int, k: int) -> MatvecConfig:
    """For a weight [n, k] of 4 or 6 bits."""
    if n <= _NARROW_ROWS and k in _NARROW_COLUMNS and target.name in MATVEC_NARROW:
        return MATVEC_NARROW[target.name]
    return MATVEC[target.name]


def matmul_config(target: Target, bits: int) -> MatmulConfig:
    config = MATMUL[target.name]
    return MATMUL_6BIT.get(target.name, config) if bits == 6 else config
