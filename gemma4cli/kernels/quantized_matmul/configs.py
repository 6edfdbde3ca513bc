"""Launch configurations of the low-bit matmul kernels, per target.

sm_90 is measured on an H200 (bench/results/matmul-h200.json, matmul-prefill-h200.json and occupancy-h200.json; the limit
of registers: bench/notes.md).

The others are not measured. The model of kernels/occupancy.py chose them among candidates that fit the target without
spills, from what compiling them told (bench/results/occupancy-facts.json):

    python tools/choose_configs.py rank --target sm_86

Asked about sm_90 it chooses the fastest of both products, one configuration for all shapes; for one shape alone what is
0 to 8 % slower (matvec, 4 % in the mean) or the fastest (matmul). It knows nothing of 8-bit weights.
tests/kernels/test_occupancy.py holds the entries to the model, and test_quantized_matmul.py compiles each for its target.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class MatvecConfig:
    """Rows and 64-wide blocks (32-wide groups for 8-bit weights) that a program holds at a time.

    registers: the most a thread may have, 0 for the assembler's own choice; not of 8-bit weights.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of the prefill product and its launch parameters."""

    block_n: int
    block_m: int
    group_m: int
    num_warps: int
    num_stages: int


MATVEC: dict[str, MatvecConfig] = {
    "sm_80": MatvecConfig(4, 32, 2, 2, 0),
    "sm_90": MatvecConfig(2, 16, 1, 2, 80),  # measured
    "sm_86": MatvecConfig(2, 16, 1, 2, 0),
    "sm_120": MatvecConfig(2, 16, 1, 2, 0),
}
# A vocabulary's matrix, which has programs enough to keep the memory busy, is read fastest with what the assembler takes.
_MANY_ROWS = 65536
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


def matvec_config(target: Target, rows: int) -> MatvecConfig:
    config = MATVEC[target.name]
    return dataclasses.replace(config, registers=0) if rows > _MANY_ROWS else config


def matmul_config(target: Target, bits: int) -> MatmulConfig:
    config = MATMUL[target.name]
    return MATMUL_6BIT.get(target.name, config) if bits == 6 else config
