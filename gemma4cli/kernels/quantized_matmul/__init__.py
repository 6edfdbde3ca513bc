"""Activations times a low-bit weight: `g4::quantized_matmul`, for every M from a decoded token to a prefill chunk.

One op whatever the bits: the format travels as three integers, so a graph says what it multiplies with. On a GPU, M = 1
takes the int8-activation matrix-vector kernel (``matvec``), anything else the tensor-core kernel (``prefill``); on a
CPU both take the reference, so that exported graphs run without a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.quantized_matmul import decode, matvec, prefill, reference
from gemma4cli.kernels.quantized_matmul.configs import (
    MATVEC_INT8,
    QUANTIZE_ROWS_GROUPS,
    MatvecConfig,
    matmul_config,
    matvec_config,
)
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat
from gemma4cli.kernels.targets import Target, current_target


class Int8Rows(NamedTuple):
    """Rows of activations rounded to int8 in groups of 32 (reference.quantize_activations), K of them each.

    words int32 [M, K / 4]: four values a word; scale, total float32 [M, K / 32].
    """

    words: Tensor
    scale: Tensor
    total: Tensor


def empty_int8_rows(m: int, k: int, device: torch.device) -> Int8Rows:
    """Room for a kernel to write M rows into."""
    scale = torch.empty((m, k // 32), dtype=torch.float32, device=device)
    return Int8Rows(torch.empty((m, k // 4), dtype=torch.int32, device=device), scale, torch.empty_like(scale))


def quantize(x: Tensor) -> Int8Rows:
    """Round x [M, K] to int8 in plain PyTorch, on a CPU."""
    xq, scale, total = reference.quantize_activations(x)
    return Int8Rows(xq.view(torch.int32), scale, total)


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply x [M, K] by a packed weight [N, K] transposed; returns [M, N] in x's dtype.

    With M = 1 the activations are rounded to int8 in groups of 32 (reference.quantize_activations).
    """
    fmt = weight.format
    return quantized_matmul(
        x, weight.codes, weight.high, weight.sub, weight.step, fmt.bits, fmt.group_size, fmt.has_min
    )


@triton_op("g4::quantized_matmul", mutates_args={})
def quantized_matmul(
    x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, bits: int, group_size: int, has_min: bool
) -> Tensor:
    """x [M, K] bf16; codes, high, sub, step as in format.py. Returns [M, N] in x's dtype."""
    if x.shape[0] == 1:
        return _decode(x, codes, high, sub, step, bits, group_size, has_min)
    return _prefill(x, codes, high, sub, step, bits, group_size, has_min)


def _decode(
    x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, bits: int, group_size: int, has_min: bool
) -> Tensor:
    m, k = x.shape
    rows = empty_int8_rows(m, k, x.device)
    rows_grid = (triton.cdiv(k // 32, QUANTIZE_ROWS_GROUPS), m)
    wrap_triton(decode.quantize_rows)[rows_grid](x, *rows, K=k, BLOCK_G=QUANTIZE_ROWS_GROUPS, num_warps=4)
    return _matvec(*rows, codes, high, sub, step, bits, group_size, has_min, x.dtype)


def _matvec(
    words: Tensor,
    scale: Tensor,
    total: Tensor,
    codes: Tensor,
    high: Tensor | None,
    sub: Tensor,
    step: Tensor,
    bits: int,
    group_size: int,
    has_min: bool,
    dtype: torch.dtype,
) -> Tensor:
    m, k, n = words.shape[0], words.shape[1] * 4, codes.shape[0]
    target = current_target()
    y = torch.empty((m, n), dtype=dtype, device=words.device)
    if bits == 8:
        int8 = MATVEC_INT8[target.name]
        wrap_triton(decode.matvec_int8)[(triton.cdiv(n, int8.block_n), m)](
            codes, sub, step, words, scale, y, n,
            K=k, BLOCK_N=int8.block_n, BLOCK_G=int8.block_g, DP4A=True, PDL=target.dependent_launch,
            num_warps=int8.num_warps, num_stages=int8.num_stages,
        )  # fmt: skip
        return y
    config = matvec_config(target, n, k)
    wrap_triton(matvec.matvec)[(triton.cdiv(n, config.program_rows), m)](
        codes, codes if high is None else high, sub, step, words, scale, total, y, n,
        K=k, BITS=bits, GROUP=group_size, HAS_MIN=has_min, **_program(target, config),
    )  # fmt: skip
    return y


def _program(target: Target, config: MatvecConfig) -> dict[str, int | bool]:
    """What a launch of ``matvec`` or ``matvec_pair`` is told of its programs."""
    return {
        "ROWS_A_WARP": config.rows, "WR": config.warps, "WK": config.warps_k, "DP4A": True,
        "PDL": target.dependent_launch, "REGISTERS": config.registers, "num_warps": config.warps * config.warps_k,
    }  # fmt: skip


def _prefill(
    x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, bits: int, group_size: int, has_min: bool
) -> Tensor:
    m, k = x.shape
    n = codes.shape[0]
    config = matmul_config(current_target(), bits)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m),)
    wrap_triton(prefill.matmul)[grid](
        codes, codes if high is None else high, sub, step, x, y, m, n,
        K=k, BITS=bits, GROUP=group_size, HAS_MIN=has_min,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, GROUP_M=config.group_m, DOT=tl.bfloat16, LOP3=True,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


@triton_op("g4::quantized_matvec", mutates_args={})
def quantized_matvec(
    words: Tensor,
    scale: Tensor,
    total: Tensor,
    codes: Tensor,
    high: Tensor | None,
    sub: Tensor,
    step: Tensor,
    bits: int,
    group_size: int,
    has_min: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``quantized_matmul`` of rows that are int8 already (Int8Rows): [M, N] in `dtype`."""
    return _matvec(words, scale, total, codes, high, sub, step, bits, group_size, has_min, dtype)


@quantized_matvec.register_kernel("cpu")
def _cpu_matvec(
    words: Tensor,
    scale: Tensor,
    total: Tensor,
    codes: Tensor,
    high: Tensor | None,
    sub: Tensor,
    step: Tensor,
    bits: int,
    group_size: int,
    has_min: bool,
    dtype: torch.dtype,
) -> Tensor:
    shape = (codes.shape[0], words.shape[1] * 4)
    weight = PackedWeight(WeightFormat(bits, group_size, has_min), shape, codes, high, sub, step)
    return reference.matvec_int8(words.view(torch.int8), scale, weight).to(dtype)


def matvec_pair(rows: Int8Rows, first: PackedWeight, second: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One row times two weights [N, K] and [N2, K] of 4 or 6 bits: [1, N] and [1, N2] in `dtype`, in one launch."""
    parts = [(w.codes, w.high, w.sub, w.step, w.format.bits, w.format.group_size, w.format.has_min)
             for w in (first, second)]  # fmt: skip
    y = quantized_matvec_pair(*rows, *parts[0], *parts[1], dtype)
    return y[:, : first.shape[0]], y[:, first.shape[0] :]


@triton_op("g4::quantized_matvec_pair", mutates_args={})
def quantized_matvec_pair(
    words: Tensor,
    scale: Tensor,
    total: Tensor,
    codes: Tensor,
    high: Tensor | None,
    sub: Tensor,
    step: Tensor,
    bits: int,
    group_size: int,
    has_min: bool,
    codes2: Tensor,
    high2: Tensor | None,
    sub2: Tensor,
    step2: Tensor,
    bits2: int,
    group_size2: int,
    has_min2: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``quantized_matvec`` of one row with two weights, one result after the other: [1, N + N2]."""
    k, n, n2 = words.shape[1] * 4, codes.shape[0], codes2.shape[0]
    target = current_target()
    config = matvec_config(target, n + n2, k)
    y = torch.empty((1, n + n2), dtype=dtype, device=words.device)
    programs = triton.cdiv(n, config.program_rows) + triton.cdiv(n2, config.program_rows)
    wrap_triton(matvec.matvec_pair)[(programs,)](
        codes, codes if high is None else high, sub, step, codes2, codes2 if high2 is None else high2, sub2, step2,
        words, scale, total, y, n, n2,
        K=k, BITS=bits, GROUP=group_size, HAS_MIN=has_min, BITS2=bits2, GROUP2=group_size2, HAS_MIN2=has_min2,
        **_program(target, config),
    )  # fmt: skip
    return y


@quantized_matvec_pair.register_kernel("cpu")
def _cpu_matvec_pair(words: Tensor, scale: Tensor, total: Tensor, *weights: Any) -> Tensor:
    *weights, dtype = weights
    both = (_cpu_matvec(words, scale, total, *weight, dtype) for weight in (weights[:7], weights[7:]))
    return torch.cat(tuple(both), dim=1)


@quantized_matmul.register_kernel("cpu")
def _cpu(
    x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, bits: int, group_size: int, has_min: bool
) -> Tensor:
    weight = PackedWeight(WeightFormat(bits, group_size, has_min), (codes.shape[0], x.shape[1]), codes, high, sub, step)
    product = reference.matmul_int8 if x.shape[0] == 1 else reference.matmul
    return product(x, weight).to(x.dtype)
