"""TurboQuant (arXiv 2504.19874) for cached vectors: rotate, normalize, round each coordinate to 16 Lloyd-Max levels.

A random rotation makes the coordinates of any unit vector of size D nearly Gaussian with variance 1 / D, so one
codebook fits all: the 16 levels that are optimal (Lloyd-Max) for the standard normal, divided by sqrt(D). A rotation
preserves dot products, so attention never undoes it per key: the query is rotated once, and the mixed value once back.

Departure from the paper, for less error at the same size: the stored scale is not the vector's norm but the factor that
makes scale * codebook[codes] closest to the vector, <y, c> / <c, c>.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 16
_ITERATIONS = 500


def normal_codebook() -> Tensor:
    """Return the 16 Lloyd-Max levels of the standard normal distribution, ascending, float64.

    Fixed point of: boundaries halfway between levels, each level the mean of the normal between its boundaries.
    """
    levels = torch.linspace(-2.5, 2.5, LEVELS, dtype=torch.float64)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(_ITERATIONS):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return levels


def random_rotation(size: int, seed: int) -> Tensor:
    """Return an orthogonal matrix [size, size] float32, uniformly distributed, the same everywhere for a seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(torch.diagonal(r))).to(torch.float32)


def boundaries(codebook: Tensor) -> Tensor:
    """Return the 15 values at which the nearest level changes."""
    return (codebook[1:] + codebook[:-1]) / 2


def encode(x: Tensor, rotation: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize vectors [..., D], D even.

    Args:
        rotation: [D, D] float32; y = rotation x.
        codebook: [16] float32 ascending levels of a standard normal.
    Returns: codes uint8 [..., D / 2], dims 0 .. D/2 - 1 in the low nibbles; scale float16 [...] that already contains
        the 1 / sqrt(D), so that y = scale * codebook[code].
    """
    size = x.shape[-1]
    y = x.to(torch.float32) @ rotation.T
    rms = y.square().mean(-1, keepdim=True).sqrt()
    unit = y / torch.where(rms > 0, rms, torch.ones_like(rms))
    code = torch.bucketize(unit, boundaries(codebook).to(unit.dtype))
    level = codebook.to(torch.float32)[code]
    scale = (y * level).sum(-1) / level.square().sum(-1)
    low, high = code[..., : size // 2], code[..., size // 2 :]
    return (low | (high << 4)).to(torch.uint8), scale.to(torch.float16)


def decode(codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Return the rotated vectors y [..., D] float32 of ``encode``."""
    code = torch.cat([codes & 15, codes >> 4], dim=-1).long()
    return codebook.to(torch.float32)[code] * scale.to(torch.float32)[..., None]
