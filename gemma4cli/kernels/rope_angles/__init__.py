"""`g4::rope_angles`: cosine and sine of a step's positions, once for all layers of a kind.

An operator of its own because Inductor, given the formula, computes it again in every layer, and reducing angles of
100,000 radians takes it 80 bytes of stack a thread there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def angles(position_ptr, frequency_ptr, cos_ptr, sin_ptr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """cos, sin [T, PAIRS] of position `program_id(0)` times frequency [PAIRS], float32."""
    token = tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    inside = pair < PAIRS
    frequency = tl.load(frequency_ptr + pair, mask=inside, other=0.0)
    angle = tl.load(position_ptr + token).to(tl.float32) * frequency
    tl.store(cos_ptr + token * PAIRS + pair, tl.cos(angle), mask=inside)
    tl.store(sin_ptr + token * PAIRS + pair, tl.sin(angle), mask=inside)


@triton_op("g4::rope_angles", mutates_args={})
def rope_angles(position: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """``model.rope.RotaryEmbedding``: position [T] int64, frequency [D / 2] float32 to cos, sin [T, D / 2] float32."""
    tokens, pairs = position.shape[0], frequency.shape[0]
    cos = torch.empty((tokens, pairs), dtype=torch.float32, device=position.device)
    sin = torch.empty_like(cos)
    block = triton.next_power_of_2(pairs)
    wrap_triton(angles)[(tokens,)](position, frequency, cos, sin, PAIRS=pairs, BLOCK=block, num_warps=1)
    return cos, sin


@rope_angles.register_kernel("cpu")
def _cpu(position: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    angle = position.to(torch.float32).unsqueeze(-1) * frequency
    return torch.cos(angle), torch.sin(angle)
