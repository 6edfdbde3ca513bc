"""The low-bit matmul kernels: layout, the op on the CPU, every configuration on every target."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton.language as tl

from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.layers import FusedLinear
from gemma4cli.kernels import quantized_matmul
from gemma4cli.kernels.compile import KernelCode, compile_kernel
from gemma4cli.kernels.quantized_matmul import configs, decode, matmul, matvec, prefill, reference
from gemma4cli.kernels.quantized_matmul.format import (
    WeightFormat,
    assemble,
    dequantize,
    encode_scales,
    pack,
    unpack_codes,
)
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
    target: Target, bits: int, group_size: int, has_min: bool, n: int = 16384, k: int = 5376
) -> KernelCode:
    arguments = {**POINTERS, "K": k, "DP4A": True, "PDL": target.dependent_launch}
    if bits == 8:
        int8 = configs.MATVEC_INT8[target.name]
        return compile_kernel(
            decode.matvec_int8, {**arguments, "BLOCK_N": int8.block_n, "BLOCK_G": int8.block_g}, target,
            num_warps=int8.num_warps, num_stages=int8.num_stages,
        )  # fmt: skip
    fmt = {"BITS": bits, "GROUP": group_size, "HAS_MIN": has_min}
    return compile_kernel(
        matvec.matvec, {**arguments, **fmt, **launch_of(target, n, k)}, target, **warps_of(target, n, k)
    )


def compile_pair(
    target: Target, first: tuple[int, int, bool], second: tuple[int, int, bool], n: int = 16384, k: int = 5376
) -> KernelCode:
    pointers = {**POINTERS, "N": "i32:16"}  # of every matrix in use: 31B and the tests' models
    arguments = {name: pointers[name.replace("2", "")] for name in matvec.matvec_pair.arg_names
                 if name.replace("2", "") in pointers}  # fmt: skip
    names = ("BITS", "GROUP", "HAS_MIN")
    formats = dict(zip(names, first, strict=True)) | {f"{a}2": b for a, b in zip(names, second, strict=True)}
    options = {"K": k, "DP4A": True, "PDL": target.dependent_launch, **launch_of(target, n, k)}
    return compile_kernel(matvec.matvec_pair, {**arguments, **formats, **options}, target, **warps_of(target, n, k))


def launch_of(target: Target, n: int, k: int) -> dict[str, int]:
    config = configs.matvec_config(target, n, k)
    return {"ROWS_A_WARP": config.rows, "WR": config.warps, "WK": config.warps_k, "REGISTERS": config.registers}


def warps_of(target: Target, n: int, k: int) -> dict[str, int]:
    config = configs.matvec_config(target, n, k)
    return {"num_warps": config.warps * config.warps_k, "num_stages": 1}


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
def test_the_rows_of_q4_k_m_fit(target: Target, bits: int, group_size: int, has_min: bool) -> None:
    """Longer rows once took an address more per row of x than there were registers."""
    assert_fits(compile_matmul(target, bits, group_size, has_min, 21504), target)
    for k in (8192, 16384, 21504):
        assert_fits(compile_matvec(target, bits, group_size, has_min, n=5376, k=k), target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_two_formats_in_one_launch_fit(target: Target) -> None:
    """A sliding layer of Q4_K_M: queries and keys of 4 bits, values of 6."""
    assert_fits(compile_pair(target, (4, 32, True), (6, 16, False)), target)


def test_a_limit_of_registers_reaches_the_assembler() -> None:
    """What is limited has more than the assembler would take of itself, and no more than the limit."""
    limit = configs.matvec_config(TARGETS["sm_90"], 16384, 5376).registers
    assert f".maxnreg {limit}" in compile_matvec(TARGETS["sm_90"], 4, 32, True).ptx
    assert "maxnreg" not in compile_matvec(TARGETS["sm_86"], 4, 32, True).ptx


def test_a_matvec_moves_nothing_from_thread_to_thread_inside_its_loop() -> None:
    """Its layouts are written so that a thread keeps what it has loaded; a sum over 16 blocks' halves ends a row."""
    code = compile_matvec(TARGETS["sm_90"], 4, 32, True)
    assert code.ptx.count("shfl.sync") == 5 * 2  # halves of 32 lanes, for two rows
    assert code.shared_bytes == 0


def test_high_nibbles_that_stay_in_place_are_unsigned() -> None:
    """The interpreter has no dp4a: that codes of 16 times 8 and more do not count as negative can be read only here."""
    products = {True: (48, 48), False: (96, 0)}  # of 6 steps, 2 rows, 4 words: signed ones, and unsigned ones
    for bits, group_size, has_min in ((4, 32, True), (4, 32, False), (6, 16, False), (6, 32, True)):
        ptx = compile_matvec(TARGETS["sm_90"], bits, group_size, has_min).ptx
        counts = ptx.count("dp4a.s32.s32"), ptx.count("dp4a.u32.s32")
        assert counts == products[bits == 4 and has_min], (bits, group_size, has_min)


def test_decoding_a_matrix_of_two_formats_is_one_launch() -> None:
    formats = [WeightFormat(4, 32, True), WeightFormat(6, 16, False)]
    linear = FusedLinear(["q_proj", "k_proj", "v_proj"], [formats[0], formats[0], formats[1]], [8, 4, 4], 256)
    weights = [random_weight(f.bits, f.group_size, f.has_min, n, 256)[0]
               for f, n in ((formats[0], 8), (formats[0], 4), (formats[1], 4))]  # fmt: skip
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        linear.put(name, weight)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(5))
    with mock.patch.object(
        quantized_matmul, "quantized_matvec_pair", wraps=quantized_matmul.quantized_matvec_pair
    ) as op:
        outputs = linear.matvec(quantized_matmul.quantize(x))
    assert op.call_count == 1
    for output, weight in zip(outputs, weights, strict=True):
        assert torch.equal(output, reference.matmul_int8(x, weight).bfloat16())
