"""Random packed weights for the kernel tests, with what they were made from."""

from __future__ import annotations

import torch

from gemma4cli.kernels.quantized_matmul.format import PackedWeight, pack

FORMATS = [
    (4, 32, False),
    (4, 32, True),
    (6, 16, False),
    (6, 32, True),
    (8, 32, False),
]  # bits, group size, has a minimum


def random_weight(
    bits: int, group_size: int, has_min: bool, n: int, k: int
) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A packed weight with the codes it was made from and the value each should have before scales are re-encoded."""
    generator = torch.Generator().manual_seed(bits * n + k)
    low, high = {4: (0, 16), 6: (0, 64), 8: (-128, 128)}[bits]
    code = torch.randint(low, high, (n, k), generator=generator)
    scale = torch.rand(n, k // group_size, generator=generator) * 0.01 + 1e-3
    scale[::3] *= -1  # Q4_0 and Q6_K have negative scales
    minimum = torch.rand(n, k // group_size, generator=generator) * 0.1 if has_min else None
    zero = 0 if has_min or bits == 8 else 1 << (bits - 1)
    value = scale.repeat_interleave(group_size, 1) * (code - zero)
    if minimum is not None:
        value -= minimum.repeat_interleave(group_size, 1)
    return pack(code, scale, minimum, bits, group_size), code, value


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()
