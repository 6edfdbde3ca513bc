"""The stand-in for Gluon: a ring that is right gives the right sums, one with a mistake does not."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tests.support.gluon_interpreter import interpreted
from tests.support.gluon_kernel import stream_add

BLOCK, STEPS = 256, 5
COUNT = BLOCK * STEPS


def streamed(dtype: torch.dtype, n: int, **ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-50, 50, (COUNT,), generator=generator).to(dtype) for _ in range(2))
    y = torch.full_like(x, 77)
    interpreted(stream_add)[(1,)](weight, x, y, n, STEPS=STEPS, BLOCK=BLOCK, num_warps=8, **ring)
    inside = torch.arange(COUNT) < n
    return y, torch.where(inside, weight + x, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8])
@pytest.mark.parametrize("n", [COUNT, COUNT - 5, BLOCK])
def test_a_ring(dtype: torch.dtype, n: int) -> None:
    y, expected = streamed(dtype, n)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8])
@pytest.mark.parametrize(
    "ring", [{"OUTSTANDING": 2}, {"AHEAD": 3, "OUTSTANDING": 0}], ids=["early read", "overwritten"]
)
def test_a_ring_with_a_mistake(dtype: torch.dtype, ring: dict[str, int]) -> None:
    y, expected = streamed(dtype, COUNT, **ring)
    wrong = (y != expected).view(STEPS, BLOCK)
    assert (wrong.float().mean(1) > 0.9).all()
    assert y.isnan().all() or not dtype.is_floating_point


@gluon.jit
def rows(x_ptr, y_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, COMMIT: gl.constexpr, TWICE: gl.constexpr):
    """The sum of each row of a matrix and the greatest of the second column of each, one matrix per program."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    pointers = x_ptr + gl.program_id(0) * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    memory = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    async_copy.async_copy_global_to_shared(memory, pointers)
    if COMMIT:
        async_copy.commit_group()
    if TWICE:
        async_copy.async_copy_global_to_shared(memory, pointers)
        async_copy.commit_group()
        async_copy.wait_group(1)
    else:
        async_copy.wait_group(0)
    sums = gl.sum(memory.load(layout), axis=1)
    second = memory.slice(1, 1, dim=1).load(layout)
    most = gl.max(gl.reshape(second, [ROWS]), axis=0) + gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    both = gl.join(gl.convert_layout(sums, gl.AutoLayout()), most)
    offsets = gl.program_id(0) * ROWS * 2 + gl.expand_dims(row, 1) * 2 + gl.arange(0, 2)[None, :]
    gl.store(y_ptr + offsets, both)


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(("commit", "twice"), [(True, False), (False, False), (True, True)])
def test_matrices(commit: bool, twice: bool) -> None:
    """Without a group of its own nothing waits for a copy, and a second one to the same place is not over either."""
    x, y = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 8, 2)
    interpreted(rows)[(3,)](x, y, 8, 16, COMMIT=commit, TWICE=twice)
    if commit and not twice:
        assert torch.allclose(y[..., 0], x.sum(2), atol=1e-5)
        assert torch.equal(y[..., 1], x[..., 1].amax(1, keepdim=True).expand(3, 8))
    else:
        assert y.isnan().all()


@gluon.jit
def misuse(x_ptr, KIND: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.float32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    offsets = gl.arange(0, 4)
    if KIND == "place":
        memory.index(gl.program_id(0) + 2)
    elif KIND == "shape":
        async_copy.async_copy_global_to_shared(memory, x_ptr + offsets)
    elif KIND == "type":
        memory.index(0).store(offsets)
    elif KIND == "assembly":
        gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [offsets], dtype=gl.int32, is_pure=True, pack=1)
    else:
        gl.num_warps()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("place", IndexError), ("shape", TypeError), ("type", TypeError), ("assembly", NotImplementedError),
     ("else", AttributeError)],
)  # fmt: skip
def test_mistakes_and_what_is_missing(kind: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        interpreted(misuse)[(1,)](torch.zeros(4), KIND=kind)
