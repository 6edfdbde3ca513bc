"""The low-bit matmul kernels: layout, the op on the CPU, every configuration on every target."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from gemma4cli.errors import G4Error
from gemma4cli.kernels.compile import KernelCode, compile_kernel
from gemma4cli.kernels.quantized_matmul import configs, decode, matmul, prefill, reference
from gemma4cli.kernels.quantized_matmul.format import assemble, dequantize, encode_scales, pack, unpack_codes
from gemma4cli.kernels.targets import TARGETS, Target, compiling_for, get_target
from tests.support.packed_weights import FORMATS, random_weight


@pytest.mark.parametrize(("bits", "group_size", "has_min"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(5, 128), (16, 384), (3, 640)])
def test_pack_keeps_codes_and_bounds_the_scale_error(bits: int, group_size: int, has_min: bool, n: int, k: int) -> None:
    weight, code, value = random_weight(bits, group_size, has_min, n, k)
    assert torch.equal(unpack_codes(weight), code.int())
    # Half a step of 1/127 of the largest scale (and minimum) in 256 weights, times the largest code.
    largest = {4: 15, 6: 63, 8: 128}[bits]
    bound = 0.011 / 254 * largest * 1.1 + (0.1 / 254 * 1.1 if has_min else 0)
    assert (dequantize(weight) - value).abs().max() <= bound
    assert weight.nbytes == n * sum(
        [k * {4: 4, 6: 6, 8: 8}[bits] // 8, (2 if has_min else 1) * (k // group_size + 2 * -(-k // 256))]
    )


def test_assemble_rounds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 16, (4, 512), generator=generator)
    sub = torch.randint(0, 64, (4, 16, 2), dtype=torch.int8, generator=generator)
    step = torch.rand(4, 2, 2, generator=generator).half()
    expected = (step.float()[:, :, 0].repeat_interleave(256, 1) * sub[..., 0].float().repeat_interleave(32, 1)) * code
    expected -= step.float()[:, :, 1].repeat_interleave(256, 1) * sub[..., 1].float().repeat_interleave(32, 1)
    assert torch.equal(dequantize(assemble(code, sub, step, 4, 32)), expected)


def test_zero_scales_stay_zero() -> None:
    sub, step = encode_scales(torch.zeros(2, 8), 32)
    assert not sub.any() and not step.any()


@pytest.mark.parametrize(("bits", "k"), [(4, 96), (6, 192), (8, 33)])
def test_in_features_that_do_not_divide_are_refused(bits: int, k: int) -> None:
    with pytest.raises(G4Error, match=f"{bits}-bit weight needs in_features that are a multiple of"):
        pack(torch.zeros(2, k, dtype=torch.long), torch.ones(2, k // 16), None, bits, 16)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_op_exports_and_runs_on_the_cpu(rows: int) -> None:
    weight, _, _ = random_weight(4, 32, True, 48, 256)

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return matmul(x, weight)

    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    dynamic = None if rows == 1 else ({0: torch.export.Dim("T", min=2, max=64)},)
    with compiling_for(get_target("sm_90")):
        program = torch.export.export(Product(), (x,), dynamic_shapes=dynamic, strict=False)
    assert "g4.quantized_matmul" in str(program.graph)
    expected = (reference.matmul_int8 if rows == 1 else reference.matmul)(x, weight).bfloat16()
    assert torch.equal(program.module()(x), expected)


POINTERS = {"codes_ptr": "*i32", "high_ptr": "*i32", "sub_ptr": "*i8", "step_ptr": "*fp16", "xq_ptr": "*i32",
            "scale_ptr": "*fp32", "total_ptr": "*fp32", "y_ptr": "*bf16", "N": "i32"}  # fmt: skip
MATRIX_POINTERS = {"codes_ptr": "*i32", "high_ptr": "*i32", "sub_ptr": "*i8", "step_ptr": "*fp16", "x_ptr": "*bf16",
                   "y_ptr": "*bf16", "M": "i32", "N": "i32:16"}  # fmt: skip


def compile_matvec(
    target: Target, bits: int, group_size: int, has_min: bool, rows: int = 5376, k: int = 5376
) -> KernelCode:
    config = configs.matvec_config(target, rows)
    arguments = {**POINTERS, "K": k, "BLOCK_N": config.block_n, "DP4A": True, "PDL": target.dependent_launch}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if bits == 8:
        return compile_kernel(decode.matvec_int8, {**arguments, "BLOCK_G": config.block_k}, target, **options)
    fmt = {"BITS": bits, "GROUP": group_size, "HAS_MIN": has_min, "REGISTERS": config.registers}
    return compile_kernel(decode.matvec, {**arguments, **fmt, "BLOCK_B": config.block_k}, target, **options)


def compile_matmul(target: Target, bits: int, group_size: int, has_min: bool, k: int) -> KernelCode:
    config = configs.matmul_config(target, bits)
    arguments = {
        **MATRIX_POINTERS, "K": k, "BITS": bits, "GROUP": group_size, "HAS_MIN": has_min, "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m, "GROUP_M": config.group_m, "DOT": tl.bfloat16, "LOP3": True,
    }  # fmt: skip
    return compile_kernel(prefill.matmul, arguments, target, num_warps=config.num_warps, num_stages=config.num_stages)


def assert_fits(code: KernelCode, target: Target) -> None:
    assert code.shared_bytes <= target.shared_bytes_per_block, code.name
    assert code.local_bytes == 0, f"{code.name} spills {code.local_bytes} bytes a thread"


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("bits", "group_size", "has_min"), FORMATS)
def test_every_configuration_fits_its_target(target: Target, bits: int, group_size: int, has_min: bool) -> None:
    assert_fits(compile_matvec(target, bits, group_size, has_min), target)
    assert_fits(compile_matmul(target, bits, group_size, has_min, 5376), target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("bits", "group_size", "has_min"), [(4, 32, True), (6, 16, False)])
def test_the_longest_rows_of_q4_k_m_fit(target: Target, bits: int, group_size: int, has_min: bool) -> None:
    """Longer rows once took an address more per row of x than there were registers."""
    assert_fits(compile_matmul(target, bits, group_size, has_min, 21504), target)
    assert_fits(compile_matvec(target, bits, group_size, has_min, k=21504), target)


def test_a_limit_of_registers_reaches_the_assembler() -> None:
    """What is limited has more than the assembler would take of itself, and no more than the limit."""
    target = TARGETS["sm_90"]
    assert f".maxnreg {configs.matvec_config(target, 5376).registers}" in compile_matvec(target, 4, 32, True).ptx
    assert "maxnreg" not in compile_matvec(target, 6, 16, False, rows=262144).ptx
