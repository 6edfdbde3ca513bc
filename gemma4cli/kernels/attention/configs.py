"""Launch configurations of the attention kernels, per target, head size and kind of cache.

sm_90 is measured on an H200 (bench/results/attention-prefill-h200.json and occupancy-h200.json), fastest of those that do
not spill registers; but prefill over codes spills some 100 bytes a thread, since tiles without spills take 1.2 to 1.9
times as long.

The others are not measured. The model of kernels/occupancy.py chose them among candidates that fit the target without
spills, from what compiling them told (bench/results/occupancy-facts.json):

    python tools/choose_configs.py rank --target sm_86

Asked about sm_90 it chooses what is 0 to 9 % slower than the fastest for decode, 0 to 5 % for prefill, but 30 % over a
folded cache of int8. ``decode.split``, which takes small heads, was not asked about. tests/kernels/test_occupancy.py holds
the entries to the model, and test_attention.py compiles each for its target.
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
class WideConfig:
    """Shares of the context, warps (16 positions of a tile each) and tiles in shared memory of ``wide.split``."""

    splits: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Rows (tokens times query heads of a group) and positions of a tile of ``prefill.attend``.

    ahead: fetch a folded cache's K_r a step ahead into registers.
    """

    rows: int
    block_s: int
    num_warps: int
    num_stages: int
    ahead: bool = False


COMBINE_BLOCK_D = 64

# Of heads of 512, by kind of cache. Two tiles of plain numbers leave an sm_86 or sm_120 room for one warp alone: there
# ``decode.split`` takes them.
_WIDE: dict[str, dict[str, WideConfig | DecodeConfig]] = {
    "sm_80": {
        "plain": WideConfig(128, 2, 2),
        "folded": WideConfig(32, 2, 2),
        "q8": WideConfig(32, 2, 2),
        "folded-q8": WideConfig(32, 4, 2),
        "tq4": WideConfig(128, 8, 2),
        "folded-tq4": WideConfig(32, 4, 2),
    },
    "sm_90": {  # measured
        "plain": WideConfig(32, 2, 2),
        "folded": WideConfig(32, 4, 2),
        "q8": WideConfig(32, 4, 2),
        "folded-q8": WideConfig(64, 4, 2),
        "tq4": WideConfig(32, 8, 2),
        "folded-tq4": WideConfig(32, 8, 2),
    },
    "sm_86": {
        "plain": DecodeConfig(32, 16, 4, 2),
        "folded": WideConfig(32, 2, 2),
        "q8": WideConfig(32, 2, 2),
        "folded-q8": WideConfig(32, 2, 2),
        "tq4": WideConfig(32, 2, 2),
        "folded-tq4": WideConfig(32, 4, 2),
    },
    "sm_120": {
        "plain": DecodeConfig(32, 32, 4, 2),
        "folded": WideConfig(32, 2, 2),
        "q8": WideConfig(32, 2, 2),
        "folded-q8": WideConfig(32, 4, 2),
        "tq4": WideConfig(64, 2, 2),
        "folded-tq4": WideConfig(64, 4, 2),
    },
}
# Of smaller ones.
_DECODE = {
    "sm_80": DecodeConfig(16, 32, 4, 2),
    "sm_90": DecodeConfig(16, 32, 4, 1),
    "sm_86": DecodeConfig(16, 32, 4, 2),
    "sm_120": DecodeConfig(16, 32, 4, 2),
}

_PREFILL: dict[str, dict[str, PrefillConfig]] = {
    "sm_80": {
        "plain": PrefillConfig(64, 32, 8, 2),
        "folded": PrefillConfig(64, 32, 8, 2),
        "q8": PrefillConfig(32, 32, 8, 1),
        "folded-q8": PrefillConfig(32, 32, 8, 1),
        "tq4": PrefillConfig(32, 32, 4, 2),
        "folded-tq4": PrefillConfig(32, 32, 4, 2),
    },
    "sm_90": {  # measured
        "plain": PrefillConfig(64, 64, 8, 1),
        "folded": PrefillConfig(64, 64, 8, 2, ahead=True),
        "q8": PrefillConfig(64, 64, 8, 1),
        "folded-q8": PrefillConfig(64, 64, 8, 1),
        "tq4": PrefillConfig(64, 64, 8, 1),
        "folded-tq4": PrefillConfig(64, 64, 8, 1),
    },
    "sm_86": {
        "plain": PrefillConfig(32, 32, 4, 2),
        "folded": PrefillConfig(32, 32, 4, 2),
        "q8": PrefillConfig(32, 32, 8, 1),
        "folded-q8": PrefillConfig(32, 32, 8, 1),
        "tq4": PrefillConfig(32, 32, 4, 1),
        "folded-tq4": PrefillConfig(32, 32, 8, 1),
    },
    "sm_120": {
        "plain": PrefillConfig(32, 32, 8, 1),
        "folded": PrefillConfig(32, 16, 8, 1),
        "q8": PrefillConfig(32, 32, 8, 1),
        "folded-q8": PrefillConfig(32, 32, 8, 1),
        "tq4": PrefillConfig(32, 32, 8, 1),
        "folded-tq4": PrefillConfig(32, 32, 8, 1),
    },
}
_PREFILL_RING = {
    "sm_80": PrefillConfig(128, 64, 8, 2),
    "sm_90": PrefillConfig(128, 64, 8, 2),  # measured
    "sm_86": PrefillConfig(64, 64, 8, 1),
    "sm_120": PrefillConfig(64, 64, 8, 1),
}


def decode_config(target: Target) -> DecodeConfig:
    """Return the configuration of ``decode.split``."""
    return _DECODE[target.name]


def wide_config(target: Target, kind: str) -> WideConfig | DecodeConfig:
    """Return the configuration for heads that ``wide.fits`` and a cache of `kind` (``cache.AttentionCache.kind``)."""
    return _WIDE[target.name][kind]


def prefill_config(target: Target, head_dim: int, kind: str) -> PrefillConfig:
    """Return the configuration for heads of `head_dim` and a cache of `kind`."""
    return _PREFILL[target.name][kind] if head_dim > 256 else _PREFILL_RING[target.name]
