"""Launch configurations per target. sm_90 is measured (bench/notes.md), the others take the same."""

from __future__ import annotations

from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class GatedGeluConfig:
    """Groups of 32 columns that a program handles, and its warps."""

    groups: int
    num_warps: int


GATED_GELU: dict[str, GatedGeluConfig] = {
    "sm_80": GatedGeluConfig(4, 1),
    "sm_90": GatedGeluConfig(4, 1),
    "sm_86": GatedGeluConfig(4, 1),
    "sm_120": GatedGeluConfig(4, 1),
}


def gated_gelu_config(target: Target) -> GatedGeluConfig:
    return GATED_GELU[target.name]
