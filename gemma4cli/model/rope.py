"""Rotary position embeddings of both layer kinds.

Sliding layers rotate every pair of the head; full layers use transformers' "proportional" RoPE: the first
``int(partial_rotary_factor * D // 2)`` frequencies are those of the whole head (the exponent's denominator is D, not
the rotated part), all others are 0, so those pairs pass through. Dimension i is paired with i + D/2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4cli.model.config import LayerConfig


class RotaryEmbedding(nn.Module):
    """Angles of one layer kind: ``forward(input_pos [T] int64) -> cos, sin [T, D / 2] float32``."""

    inv_freq: Tensor

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        # On the CPU even while the model is built on the meta device: nothing in a checkpoint would fill it.
        self.register_buffer("inv_freq", inverse_frequencies(layer), persistent=False)

    def forward(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        angles = input_pos.to(torch.float32).unsqueeze(-1) * self.inv_freq
        return torch.cos(angles), torch.sin(angles)


def inverse_frequencies(layer: LayerConfig) -> Tensor:
    """Return the angle per position of every pair, [head_dim / 2] float32."""
    pairs = layer.head_dim // 2
    rotated = int(layer.partial_rotary_factor * layer.head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.int64, device="cpu").to(torch.float32) / layer.head_dim
    frequencies = torch.zeros(pairs, dtype=torch.float32, device="cpu")
    frequencies[:rotated] = 1.0 / layer.rope_theta**exponents
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``x [1, T, H, D]`` by ``cos, sin [T, D / 2]`` and return them in x's dtype.

    The arithmetic is float32 whatever x is, as in llama.cpp and ExecuTorch. transformers rounds cos and sin to the
    activation's dtype first: the same for float32, and 2^-9 less exact for bfloat16.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D / 2]
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
