"""The tensors of one layer's cache as the attention kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionCache:
    """One of four kinds, told apart by what is there (docs/cuda-export.md, `--kv`).

    Attributes:
        k: [H_kv, S, D] keys, or [H_kv, S, R] rotated key dims when `folded`; TQ4: uint8, half as wide.
        v: [H_kv, S, D] values; TQ4: uint8 [H_kv, S, D / 2].
        k_scale, v_scale: [H_kv, S] float16, TQ4 only.
        folded: whether scores come from v and the rotated key dims.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    folded: bool = False

    @property
    def kind(self) -> str:
        """Which of the four: "plain", "folded", "tq4" or "folded-tq4"."""
        return cache_kind(self.folded, self.k_scale is not None)


def cache_kind(folded: bool, tq4: bool) -> str:
    """Name one of the four kinds of cache."""
    return {(False, False): "plain", (True, False): "folded", (False, True): "tq4", (True, True): "folded-tq4"}[
        folded, tq4
    ]
