"""Launch configurations per target. sm_90 is measured (bench/notes.md), the others take a neighbour of it."""

from __future__ import annotations

from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class ResidualNormConfig:
    """Groups of 32 columns that a program writes, and its warps."""

    groups: int
    num_warps: int


RESIDUAL_NORM: dict[str, ResidualNormConfig] = {
    "sm_80": ResidualNormConfig(8, 8),
    "sm_90": ResidualNormConfig(8, 8),
    "sm_86": ResidualNormConfig(8, 8),
    "sm_120": ResidualNormConfig(8, 8),
}


def residual_norm_config(target: Target) -> ResidualNormConfig:
    return RESIDUAL_NORM[target.name]
