"""Launch configurations of the attention kernels, per target and head size.

Chosen by shared memory (tests compile every entry for its target), not yet tuned on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class DecodeConfig:
    """Shares of the context, positions a step, and launch parameters of ``decode.split``."""

    splits: int
    block_s: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Rows (tokens times query heads of a group) and positions of a tile of ``prefill.attend``."""

    rows: int
    block_s: int
    num_warps: int
    num_stages: int


COMBINE_BLOCK_D = 64


def decode_config(target: Target, head_dim: int) -> DecodeConfig:
    """Return the configuration for heads of `head_dim`: full layers split far, rings of about 2,000 slots less."""
    if head_dim > 256:
        return DecodeConfig(splits=64, block_s=32, num_warps=4, num_stages=2 if target.shared_bytes_per_block > 150_000 else 1)
    return DecodeConfig(splits=16, block_s=32, num_warps=4, num_stages=2)


def prefill_config(target: Target, head_dim: int) -> PrefillConfig:
    """Return the configuration for heads of `head_dim`."""
    roomy = target.shared_bytes_per_block > 150_000
    if head_dim > 256:
        return PrefillConfig(64, 32, 8, 2) if roomy else PrefillConfig(32, 16, 8, 1)
    return PrefillConfig(128, 32, 8, 2) if roomy else PrefillConfig(64, 32, 8, 1)
