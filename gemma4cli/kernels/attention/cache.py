"""The tensors of one layer's cache as the attention kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCache:
    """One of six kinds, told apart by what is there (docs/cuda-export.md, `--kv`).

    Attributes:
        k: [H_kv, S, D] keys, or [H_kv, S, R] rotated key dims when `folded`; q8: int8; TQ4: uint8, half as wide.
        v: [H_kv, S, D] values; q8: int8; TQ4: uint8 [H_kv, S, D / 2].
        k_scale, v_scale: [H_kv, S] float16 of codes, otherwise None.
        folded: whether scores come from v and the rotated key dims.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    folded: bool = False

    @property
    def kind(self) -> str:
        """Which of the six: "plain", "q8", "tq4", or "folded", "folded-q8", "folded-tq4"."""
        return cache_kind(self.folded, code_bits(self.k))


def code_bits(stored: Tensor) -> int:
    """Return how many bits the codes of a cache's `k` or `v` have, 0 where it holds numbers."""
    return {torch.int8: 8, torch.uint8: 4}.get(stored.dtype, 0)


def cache_kind(folded: bool, bits: int) -> str:
    """Name the kind of a cache with codes of `bits` (``code_bits``)."""
    codes = {0: "", 8: "q8", 4: "tq4"}[bits]
    return "-".join(["folded"] * folded + [codes] * bool(codes)) or "plain"
