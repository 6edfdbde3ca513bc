"""The attention ops and TurboQuant on the CPU, and every kernel configuration on every target."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from gemma4cli.kernels.attention import attend, configs, decode, int8, prefill, reference, turboquant, wide
from gemma4cli.kernels.attention.cache import AttentionCache
from gemma4cli.kernels.compile import compile_kernel
from gemma4cli.kernels.ring_attention import WARPS as RING_WARPS
from gemma4cli.kernels.ring_attention.kernel import fits as ring_fits
from gemma4cli.kernels.targets import TARGETS, compiling_for, get_target

KINDS = ["plain", "folded", "q8", "folded-q8", "tq4", "folded-tq4"]


def test_the_codebook_is_nearly_the_best() -> None:
    """The optimum for 16 levels of a standard normal has distortion 0.009497 (Max 1960, table I)."""
    levels = turboquant.codebook().double()
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    edges = torch.cat([torch.tensor([-20.0]), turboquant.boundaries(levels), torch.tensor([20.0])]).double()
    density, below = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
    mass, mean = below.diff(), -density.diff()
    square = mass - (edges * density).diff()  # the integral of x^2 over each interval
    distortion = (square - 2 * levels * mean + levels.square() * mass).sum().item()
    assert 0.009497 <= distortion < 0.009497 * 1.003


@pytest.mark.parametrize("size", [64, 128, 512])
def test_encode_keeps_vectors_to_four_bits(size: int) -> None:
    rotation = turboquant.random_rotation(size, seed=1)
    assert torch.allclose(rotation @ rotation.T, torch.eye(size), atol=1e-5)
    table = turboquant.codebook()
    x = torch.randn(500, size, generator=torch.Generator().manual_seed(2)) * 7
    x[0] = 0
    x[1] = torch.nn.functional.one_hot(torch.tensor(3), size) * 50.0  # one outlier: what the rotation is for
    codes, scale = turboquant.encode(x, rotation, table)
    assert codes.shape == (500, size // 2)
    back = turboquant.decode(codes, scale, table) @ rotation
    assert not back[0].any()
    error = ((back - x).square().sum(-1) / x.square().sum(-1).clamp_min(1e-9))[1:]
    assert error.mean() < 0.0105  # 0.0095 and the rounding of the scale
    assert error.max() < 0.05


def test_int8_keeps_vectors_to_eight_bits() -> None:
    x = torch.randn(500, 512, generator=torch.Generator().manual_seed(2)) * 7
    x[0] = 0
    x[1, 3] = 900.0
    codes, scale = int8.encode(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == (500,)
    assert codes.abs().max() == 127
    back = int8.decode(codes, scale)
    assert not back[0].any()
    assert ((back - x).abs() <= x.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-11)).all()
    error = ((back - x).square().sum(-1) / x.square().sum(-1))[2:]
    assert error.mean() < 0.008**2


@pytest.mark.parametrize("tokens", [1, 5])
def test_folded_equals_plain(tokens: int) -> None:
    """K from V: the folded cache gives what the plain one gives, to float32 rounding."""
    heads, kv_heads, head_dim, rotated, length = 4, 2, 64, 16, 21
    generator = torch.Generator().manual_seed(3)
    v = torch.nn.functional.normalize(torch.randn(kv_heads, length, head_dim, generator=generator), dim=-1) * 8
    weight = torch.rand(head_dim, generator=generator) + 0.5
    k = v * weight
    half, turned = head_dim // 2, rotated // 2
    angle = torch.rand(length, turned, generator=generator) * 6
    first, second = k[..., :turned].clone(), k[..., half : half + turned].clone()
    k[..., :turned] = first * angle.cos() - second * angle.sin()
    k[..., half : half + turned] = second * angle.cos() + first * angle.sin()
    q = torch.randn(heads, tokens, head_dim, generator=generator) * 0.2
    position = torch.arange(length - tokens, length)
    plain = attend(q, None, AttentionCache(k, v), position, 0)
    folded_cache = AttentionCache(reference.rotated_part(k, rotated), v, folded=True)
    folded = attend(
        reference.fold_query(q, weight, rotated), reference.rotated_part(q, rotated), folded_cache, position, 0
    )
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_ops_export(tokens: int) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.randn(2, 32, 64).bfloat16())
            self.register_buffer("v", torch.randn(2, 32, 64).bfloat16())

        def forward(self, q: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return attend(q, None, AttentionCache(self.k, self.v), position, 8)

    q, position = torch.randn(4, tokens, 64).bfloat16(), torch.arange(10, 10 + tokens)
    count = torch.export.Dim("T", min=2, max=16)
    dynamic = None if tokens == 1 else ({1: count}, {0: count})
    layer = Layer()
    with compiling_for(get_target("sm_90")):
        program = torch.export.export(layer, (q, position), dynamic_shapes=dynamic, strict=False)
    assert f"g4.{'decode' if tokens == 1 else 'prefill'}_attention" in str(program.graph)
    assert torch.equal(program.module()(q, position), layer(q, position))


# The 31B's layers: head size, rotated dims, window, query heads per KV head.
FULL, SLIDING = (512, 128, 0, 8), (256, 256, 1024, 2)
# Bytes a thread of kernels that are fastest nevertheless (bench/results/attention-prefill-h200.json).
MEASURED_SPILLS = {("attend", "sm_90", "tq4"): 96, ("attend", "sm_90", "folded-tq4"): 112,
                   ("attend", "sm_90", "q8"): 112, ("attend", "sm_90", "folded-q8"): 112}  # fmt: skip
# And small heads, as tests have: what ``wide.split`` does not take.
SMALL = (64, 32, 0, 8)
CASES = [(kind, FULL) for kind in KINDS] + [("plain", SLIDING), ("q8", SMALL), ("folded-tq4", SMALL)]


def test_the_31b_takes_the_kernels_made_for_it() -> None:
    """Others would give the same tokens, slower."""
    head_dim, rotated, window, group = FULL
    assert wide.fits(head_dim, rotated, group, window) and wide.fits(head_dim, head_dim, group, window)
    assert ring_fits(SLIDING[0], SLIDING[3], RING_WARPS)
    tables = {kind: configs.wide_config(get_target("sm_90"), kind) for kind in KINDS}
    assert all(isinstance(config, configs.WideConfig) for config in tables.values())


@pytest.mark.parametrize("target_name", sorted(TARGETS))
@pytest.mark.parametrize(("kind", "layer"), CASES, ids=lambda case: case if isinstance(case, str) else str(case[0]))
def test_every_configuration_fits_its_target(target_name: str, kind: str, layer: tuple[int, int, int, int]) -> None:
    target = TARGETS[target_name]
    head_dim, rotated, window, group = layer
    bits = 8 if kind.endswith("q8") else 4 if kind.endswith("tq4") else 0
    stored = {0: "*bf16", 8: "*i8", 4: "*u8"}[bits]
    rotated = rotated if kind.startswith("folded") else head_dim
    common = {
        "q_ptr": "*bf16", "r_ptr": "*bf16", "k_ptr": stored, "k_scale_ptr": "*fp16", "v_ptr": stored, "v_scale_ptr": "*fp16",
        "position_ptr": "*i64", "S": "i32", "GROUP": group, "D": head_dim, "R": rotated, "FOLDED": kind.startswith("folded"),
        "CODE_BITS": bits, "DOT": tl.float16 if bits else tl.bfloat16, "ASM": True,
    }  # fmt: skip
    halves = {"WINDOW": window, "HALF": head_dim // 2, "R_HALF": rotated // 2}
    partial = {"partial_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32", "PDL": target.dependent_launch}
    is_wide = wide.fits(head_dim, rotated, group, window)
    few = configs.wide_config(target, kind) if is_wide else configs.decode_config(target)
    if isinstance(few, configs.WideConfig):
        arguments = {**common, **partial, "SPLITS": few.splits, "STAGES": few.stages, "NW": few.num_warps}
        one = compile_kernel(wide.split, arguments, target, num_warps=few.num_warps, num_stages=1)
    else:
        arguments = {**common, **halves, **partial, "SPLITS": few.splits, "BLOCK_S": few.block_s, "ROWS": 16}
        one = compile_kernel(decode.split, arguments, target, num_warps=few.num_warps, num_stages=few.num_stages)
    many = configs.prefill_config(target, head_dim, kind)
    arguments = {**common, **halves, "out_ptr": "*bf16", "T": "i32", "BLOCK_S": many.block_s, "ROWS": many.rows,
                 "AHEAD": many.ahead}  # fmt: skip
    chunk = compile_kernel(prefill.attend, arguments, target, num_warps=many.num_warps, num_stages=many.num_stages)
    for code in (one, chunk):
        assert code.shared_bytes <= target.shared_bytes_per_block, code.name
        allowed = MEASURED_SPILLS.get((code.name, target_name, kind), 0)
        assert code.local_bytes <= allowed, f"{code.name} spills {code.local_bytes} bytes a thread"
