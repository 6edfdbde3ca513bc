"""A kernel in Gluon that streams a weight through a ring in shared memory: what tests compile, export and interpret."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.gluon import writes

SLOTS = gl.constexpr(3)
NUM_WARPS = 8


@gluon.jit
def _offsets(step, BLOCK: gl.constexpr, layout: gl.constexpr):
    return step * BLOCK + gl.arange(0, BLOCK, layout)


@gluon.jit
def _fetch(ring, weight_ptr, step, n, BLOCK: gl.constexpr, layout: gl.constexpr):
    offsets = _offsets(step, BLOCK, layout)
    async_copy.async_copy_global_to_shared(ring.index(step % SLOTS), weight_ptr + offsets, mask=offsets < n)
    async_copy.commit_group()


@writes("y_ptr")
@gluon.jit
def stream_add(
    weight_ptr, x_ptr, y_ptr, n, STEPS: gl.constexpr, BLOCK: gl.constexpr, AHEAD: gl.constexpr = 2,
    OUTSTANDING: gl.constexpr = 1, PDL: gl.constexpr = False, REGISTERS: gl.constexpr = 0,
):  # fmt: skip
    """y = weight + x, STEPS blocks of the first n; right if AHEAD < SLOTS and OUTSTANDING < AHEAD.

    y past n is the zeros that a masked copy leaves.
    """
    layout: gl.constexpr = gl.BlockedLayout([BLOCK // 256], [32], [8], [0])
    ring = gl.allocate_shared_memory(
        weight_ptr.dtype.element_ty, [SLOTS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    start_successor(PDL)
    for step in gl.static_range(AHEAD):
        _fetch(ring, weight_ptr, step, n, BLOCK, layout)
    wait_for_predecessor(PDL)
    for step in range(STEPS):
        async_copy.wait_group(OUTSTANDING)
        _fetch(ring, weight_ptr, step + AHEAD, n, BLOCK, layout)
        offsets = _offsets(step, BLOCK, layout)
        x = gl.load(x_ptr + offsets, mask=offsets < n, other=0)
        # In float32: the interpreter adds the bits of bfloat16.
        y = ring.index(step % SLOTS).load(layout).to(gl.float32) + x.to(gl.float32)
        gl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))
