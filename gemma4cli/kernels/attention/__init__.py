"""Attention over a ring or flat cache: `g4::decode_attention`, `g4::decode_attention_int8`, `g4::prefill_attention`.

They read only what was written: positions are walked from the first the window shows to the last one, whatever the
allocation. On a CPU they take the reference, so that exported graphs run without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.attention import decode, prefill, reference, wide
from gemma4cli.kernels.attention.cache import AttentionCache, cache_kind, code_bits
from gemma4cli.kernels.attention.configs import COMBINE_BLOCK_D, WideConfig, decode_config, prefill_config, wide_config
from gemma4cli.kernels.quantized_matmul import empty_int8_rows, quantize
from gemma4cli.kernels.targets import current_target

TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SMALLEST_DOT = 16  # columns of the smallest tensor-core operand


def attend(q: Tensor, r: Tensor | None, cache: AttentionCache, position: Tensor, window: int) -> Tensor:
    """``reference.attention`` in q's dtype: q [H, T, D], r [H, T, R] for a folded cache, position [T] int64."""
    op = decode_attention if q.shape[1] == 1 else prefill_attention
    return op(
        q, r, cache.k, cache.v, cache.k_scale, cache.v_scale, position, window, cache.folded
    )  # fmt: skip


def _widths(q: Tensor, r: Tensor | None) -> dict[str, int]:
    head_dim = q.shape[-1]
    rotated = head_dim if r is None else r.shape[-1]
    return {
        "D": head_dim,
        "R": rotated,
        "HALF": max(SMALLEST_DOT, triton.next_power_of_2(head_dim // 2)),
        "R_HALF": max(SMALLEST_DOT, triton.next_power_of_2(rotated // 2)),
    }


def _number(stored: Tensor) -> dict[str, Any]:
    """How vectors become operands of the tensor cores: the levels of codes are float16 numbers."""
    bits = code_bits(stored)
    return {"CODE_BITS": bits, "DOT": tl.float16 if bits else tl.bfloat16, "ASM": True}


@triton_op("g4::decode_attention", mutates_args={})
def decode_attention(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> Tensor:
    """One query token: q [H, 1, D] and so on as in ``attend``; returns [H, 1, D]."""
    heads, _, head_dim = q.shape
    partial, top, total = _split(q, r, k, v, k_scale, v_scale, position, window, folded)
    out = torch.empty_like(q)
    wrap_triton(decode.combine)[(heads, triton.cdiv(head_dim, COMBINE_BLOCK_D))](
        partial,
        top,
        total,
        out,
        D=head_dim,
        SPLITS=top.shape[1],
        BLOCK_D=COMBINE_BLOCK_D,
        PDL=current_target().dependent_launch,
        num_warps=4,
    )
    return out


@triton_op("g4::decode_attention_int8", mutates_args={})
def decode_attention_int8(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``decode_attention`` rounded to int8 as the activations of the output projection: the parts of ``Int8Rows``."""
    heads, _, head_dim = q.shape
    partial, top, total = _split(q, r, k, v, k_scale, v_scale, position, window, folded)
    rows = empty_int8_rows(1, heads * head_dim, q.device)
    wrap_triton(decode.combine_int8)[(heads, triton.cdiv(head_dim, COMBINE_BLOCK_D))](
        partial, top, total, *rows, D=head_dim, SPLITS=top.shape[1], BLOCK_D=COMBINE_BLOCK_D, dtype=TRITON_DTYPE[q.dtype],
        PDL=current_target().dependent_launch, num_warps=4,
    )  # fmt: skip
    return rows.words, rows.scale, rows.total


def _split(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, _, head_dim = q.shape
    kv_heads, slots = v.shape[0], v.shape[1]
    group = heads // kv_heads
    target, sizes = current_target(), _widths(q, r)
    is_wide = wide.fits(head_dim, sizes["R"], group, window)
    config = wide_config(target, cache_kind(folded, code_bits(k))) if is_wide else decode_config(target)
    partial = torch.empty((heads, config.splits, head_dim), dtype=torch.float32, device=q.device)
    top = torch.empty((heads, config.splits), dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)
    tensors = (
        q, q if r is None else r, k, k if k_scale is None else k_scale, v, v if v_scale is None else v_scale,
        position, partial, top, total,
    )  # fmt: skip
    if isinstance(config, WideConfig):
        wrap_triton(wide.split)[(kv_heads, config.splits)](
            *tensors, slots, GROUP=group, D=head_dim, R=sizes["R"], SPLITS=config.splits, STAGES=config.stages,
            NW=config.num_warps, FOLDED=folded, **_number(k), PDL=target.dependent_launch, num_warps=config.num_warps,
        )  # fmt: skip
    else:
        wrap_triton(decode.split)[(kv_heads, config.splits)](
            *tensors, slots, WINDOW=window, GROUP=group, **sizes, SPLITS=config.splits, BLOCK_S=config.block_s,
            ROWS=max(SMALLEST_DOT, triton.next_power_of_2(group)), FOLDED=folded, **_number(k),
            PDL=target.dependent_launch, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return partial, top, total


@triton_op("g4::prefill_attention", mutates_args={})
def prefill_attention(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> Tensor:
    """A chunk of query tokens: q [H, T, D] and so on as in ``attend``; returns [H, T, D]."""
    heads, tokens, head_dim = q.shape
    kv_heads, slots = v.shape[0], v.shape[1]
    group = heads // kv_heads
    config = prefill_config(current_target(), head_dim, cache_kind(folded, code_bits(k)))
    out = torch.empty_like(q)
    wrap_triton(prefill.attend)[(triton.cdiv(tokens, config.rows // group), kv_heads)](
        q, q if r is None else r, k, k if k_scale is None else k_scale, v, v if v_scale is None else v_scale,
        position, out, tokens, slots,
        WINDOW=window, GROUP=group, **_widths(q, r), BLOCK_S=config.block_s, ROWS=config.rows,
        FOLDED=folded, **_number(k), AHEAD=config.ahead,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@decode_attention.register_kernel("cpu")
@prefill_attention.register_kernel("cpu")
def _cpu(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> Tensor:
    cache = AttentionCache(k, v, k_scale, v_scale, folded)
    return reference.attention(q, r, cache, position, window).to(q.dtype)


@decode_attention_int8.register_kernel("cpu")
def _cpu_int8(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    window: int,
    folded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cache = AttentionCache(k, v, k_scale, v_scale, folded)
    return quantize(reference.attention(q, r, cache, position, window).to(q.dtype).view(1, -1))
