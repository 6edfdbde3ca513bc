"""What a decoded token does between its products, one kernel each, against plain PyTorch.

In float32: the interpreter truncates where a GPU rounds to bfloat16.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels import rope_angles
from gemma4cli.kernels.attention import decode, int8
from gemma4cli.kernels.gated_gelu import kernel as gelu_kernel
from gemma4cli.kernels.gated_gelu.reference import gated_gelu
from gemma4cli.kernels.head_rope import kernel as rope_kernel
from gemma4cli.kernels.head_rope.reference import head_rope
from gemma4cli.kernels.quantized_matmul.reference import quantize_activations
from gemma4cli.kernels.residual_norm import kernel as norm_kernel
from gemma4cli.kernels.residual_norm.reference import residual_norm

EPS = 1e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_outputs(k: int) -> list[torch.Tensor]:
    scale = torch.full((1, k // 32), torch.nan)
    return [torch.full((1, k), -128, dtype=torch.int8), scale, scale.clone()]


def assert_int8(outputs: list[torch.Tensor], x: torch.Tensor, most: float = 1e-3) -> None:
    """The same codes but where a value lies on the edge between two: sums are taken in another order."""
    codes, scale, _ = quantize_activations(x)
    assert torch.allclose(outputs[1], scale, rtol=1e-5)
    far = (outputs[0].int() - codes.int()).abs()
    assert far.max() <= 1 and (far > 0).float().mean() < most
    assert torch.allclose(outputs[2], outputs[1] * outputs[0].view(1, -1, 32).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("k", [64, 352, 5376])
@pytest.mark.parametrize(("has_branch", "has_factor"), [(False, False), (True, False), (True, True)])
def test_residual_norm(k: int, has_branch: bool, has_factor: bool) -> None:
    x, branch = random(1, k, seed=1) * 8, random(1, k, seed=2) * 0.1
    branch_weight, weight, factor = random(k, seed=3), random(k, seed=4) * 4, torch.tensor([0.7])
    hidden = torch.full_like(x, torch.nan)
    outputs = int8_outputs(k)
    norm_kernel.residual_norm[(triton.cdiv(k // 32, 4),)](
        x, branch, branch_weight, factor, weight, hidden, *outputs, EPS, K=k, BLOCK_K=triton.next_power_of_2(k),
        BLOCK_G=4, HAS_BRANCH=has_branch, HAS_FACTOR=has_factor,
    )  # fmt: skip
    expected, normalized = residual_norm(
        x, branch if has_branch else None, branch_weight if has_branch else None, factor if has_factor else None, weight,
        EPS,
    )  # fmt: skip
    assert torch.allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    assert_int8(outputs, normalized)


@pytest.mark.parametrize("k", [64, 352])
def test_gated_gelu(k: int) -> None:
    gate, up = random(1, k, seed=1) * 3, random(1, k, seed=2)
    gate[0, :4] = torch.tensor([100.0, -100.0, 3e38, -3e38])
    up[0, 2] = 1e-30
    outputs = int8_outputs(k)
    gelu_kernel.gated_gelu[(triton.cdiv(k // 32, 4),)](gate, up, *outputs, K=k, BLOCK_G=4)
    assert_int8(outputs, gated_gelu(gate, up))


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("position", "slots"), [(0, 5), (4, 5), (13, 5), (3, 64)])
@pytest.mark.parametrize("shared", [False, True])
def test_head_rope(codes: bool, folded: bool, position: int, slots: int, shared: bool) -> None:
    heads, kv_heads, head_dim, rotated = 6, 2, 64, 16
    q, k = random(1, heads * head_dim, seed=1), random(1, kv_heads * head_dim, seed=2)
    v = k if shared else random(1, kv_heads * head_dim, seed=3)
    q_weight, k_weight = random(head_dim, seed=4), random(head_dim, seed=5)
    angle = torch.linspace(0, 2, head_dim // 2)[None] * (torch.arange(head_dim // 2) < rotated // 2)
    where, width = torch.tensor([position]), rotated if folded else head_dim
    caches = [random(kv_heads, slots, width, seed=6), random(kv_heads, slots, head_dim, seed=7)]
    if codes:
        (k_codes, k_scale), (v_codes, v_scale) = (int8.encode(cache) for cache in caches)
        caches = [k_codes, v_codes, k_scale, v_scale]
    else:
        caches += [None, None]
    expected = [None if cache is None else cache.clone() for cache in caches]
    query, r = head_rope(q, k, v, q_weight, k_weight, angle.cos(), angle.sin(), where, *expected, EPS)
    written = torch.full((heads, 1, head_dim), torch.nan)
    written_r = torch.full((heads, 1, width), torch.nan)
    rope_kernel.head_rope[(heads + kv_heads,)](
        q, k, v, q_weight, k_weight, angle.cos(), angle.sin(), where, caches[0], caches[2] if codes else q,
        caches[1], caches[3] if codes else q, written, written_r, EPS, slots,
        HEADS=heads, D=head_dim, R=width, HALF=32, FOLDED=folded, CODE_BITS=8 if codes else 0,
    )  # fmt: skip
    caches, expected = ([tensor for tensor in held if tensor is not None] for held in (caches, expected))
    pairs = [(written, query), *zip(caches, expected, strict=True)] + ([(written_r, r)] if folded else [])
    for made, wanted in pairs:
        if made.dtype == torch.int8:  # sums in another order may tip a code
            assert (made.int() - wanted.int()).abs().max() <= 1
        else:
            assert torch.allclose(made, wanted, rtol=1e-3 if made.dtype == torch.float16 else 1e-5, atol=1e-6)
    untouched = [slot for slot in range(slots) if slot != position % slots]
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache[:, untouched], wanted[:, untouched])


@pytest.mark.parametrize(("head_dim", "block_d"), [(64, 64), (128, 64), (96, 64)])
def test_combine_int8(head_dim: int, block_d: int) -> None:
    heads, splits = 3, 4
    partial, top = random(heads, splits, head_dim), random(heads, splits)
    total = random(heads, splits, seed=5).abs() + 1
    top[:, -1], partial[:, -1], total[:, -1] = -torch.inf, torch.nan, 0.0
    out = torch.full((heads, head_dim), torch.nan)
    grid = (heads, triton.cdiv(head_dim, block_d))
    decode.combine[grid](partial, top, total, out, D=head_dim, SPLITS=splits, BLOCK_D=block_d)
    outputs = int8_outputs(heads * head_dim)
    decode.combine_int8[grid](
        partial, top, total, *outputs, D=head_dim, SPLITS=splits, BLOCK_D=block_d, dtype=tl.float32
    )
    assert_int8(outputs, out.view(1, -1))


def test_rope_angles() -> None:
    frequency = torch.rand(24, generator=torch.Generator().manual_seed(1)) * (torch.arange(24) < 20)
    position = torch.tensor([0, 1, 4097, 131071, 262143])
    cos, sin = torch.full((5, 24), torch.nan), torch.full((5, 24), torch.nan)
    rope_angles.angles[(5,)](position, frequency, cos, sin, PAIRS=24, BLOCK=32)
    angle = position[:, None].float() * frequency  # rounded to float32, as the model defines it
    assert torch.allclose(cos, angle.double().cos().float(), atol=2e-6)
    assert torch.allclose(sin, angle.double().sin().float(), atol=2e-6)
