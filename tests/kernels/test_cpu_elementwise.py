"""`kernels.cpu_elementwise`: the C++ kernels in every instruction set against the references in float64.

Lowering costs half a second per method, so each operator has one whose sizes are free and independent of each other:
good and bad arguments meet the same method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gemma4cli.kernels import cpu_elementwise as ops
from gemma4cli.native import load_kernels
from tests.support.mini_program import quiet

EPS, CAP = 1e-6, 30.0
COLUMNS = [1, 7, 16, 33, 128, 5376]
HEAD_DIMS = [1, 2, 7, 16, 33, 34, 128, 256]
TOKENS = [1, 2, 5]
# Together enough values for several threads.
MAX_TOKENS, MAX_COLUMNS = 24, 5376


class Calls(NamedTuple):
    """Calls of one operator, the shapes of their arguments, and what divides the columns of the first."""

    function: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    heads: int = 1

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """All sizes but leading ones, each by itself, so that the exporter expects no two of them to be equal."""
        return tuple(
            {axis: self._size(f"size_{argument}_{axis}", size) for axis, size in enumerate(shape) if axis or size > 1}
            for argument, shape in enumerate(self.shapes)
        )

    def _size(self, name: str, size: int) -> Any:
        if size == 2:  # tokens, in all shapes below
            return torch.export.Dim(name, min=1, max=MAX_TOKENS)
        return self.heads * torch.export.Dim(name, min=1, max=MAX_COLUMNS // self.heads)


def head_norm(heads: int) -> Calls:
    return Calls(
        lambda call, x, weight: tuple(call.head_rope(x, w, EPS, None, None, heads) for w in (weight, None)),
        ((1, 2, 12), (12,)),
        heads,
    )


def head_rope(heads: int) -> Calls:
    return Calls(
        lambda call, x, weight, cos, sin: tuple(call.head_rope(x, w, EPS, cos, sin, heads) for w in (weight, None)),
        ((1, 2, 12), (12,), (2, 6), (2, 6)),
        heads,
    )


# The first argument of the functions is `ops` or `Reference`.
METHODS = {
    "rms_norm": Calls(
        lambda call, x, weight: tuple(call.rms_norm(x, w, EPS) for w in (weight, None)), ((1, 2, 12), (12,))
    ),
    "norm_add": Calls(
        lambda call, x, weight, y, scale: tuple(call.norm_add(x, weight, EPS, y, s) for s in (scale, None)),
        ((1, 2, 12), (12,), (1, 2, 12), (12,)),
    ),
    "head_norm_1": head_norm(1),
    "head_norm_3": head_norm(3),
    "head_rope_1": head_rope(1),
    "head_rope_3": head_rope(3),
    "gelu_mul": Calls(lambda call, gate, up: (call.gelu_mul(gate, up),), ((1, 2, 12), (1, 2, 12))),
    "softcap": Calls(lambda call, x: (call.softcap(x, CAP),), ((1, 2, 12),)),
    "no_sin": Calls(lambda call, x, cos: (call.head_rope(x, None, EPS, cos, None, 1),), ((1, 2, 12), (2, 6))),
    "no_cap": Calls(lambda call, x: (call.softcap(x, 0.0),), ((1, 2, 12),)),
    "float64": Calls(lambda call, x, weight: (call.rms_norm(x, weight.double(), EPS),), ((1, 2, 12), (12,))),
}


class Reference:
    """The functions of `ops` by the same names, from their references."""

    rms_norm, norm_add, head_rope = ops.rms_norm_reference, ops.norm_add_reference, ops.head_rope_reference
    softcap = ops.softcap_reference

    @staticmethod
    def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
        """`ops.gelu_mul_reference` without its cancellation: 1 + tanh(u) has no digits left at -6, even in float64."""
        return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) * up


class Method(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = METHODS[name].function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(ops, *tensors)


@cache
def program() -> Any:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    load_kernels()
    exported = {}
    for name, calls in METHODS.items():
        inputs = tuple(torch.randn(shape) for shape in calls.shapes)
        exported[name] = torch.export.export(Method(name), inputs, dynamic_shapes=(calls.dynamic_shapes(),))
    with quiet():
        config = EdgeCompileConfig(_skip_dim_order=True, _check_ir_validity=False)
        edge = to_edge_transform_and_lower(exported, compile_config=config)
        return Runtime.get().load_program(bytes(edge.to_executorch().buffer))


@cache
def method(name: str) -> Any:
    return program().load_method(name)


def execute(name: str, *inputs: Tensor) -> list[Tensor]:
    return [result.clone() for result in method(name).execute(list(inputs))]


def expected(name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    return METHODS[name].function(Reference, *(tensor.double() for tensor in inputs))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = 3 * random(tokens, pairs)
    return torch.cos(angle), torch.sin(angle)


def check(name: str, *inputs: Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    results = execute(name, *inputs)
    for result, right in zip(results, expected(name, *inputs), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=rtol, atol=atol)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.usefixtures("instruction_set")
def test_rows_of_any_length(columns: int) -> None:
    for tokens in TOKENS:
        x, y, weight = random(1, tokens, columns), random(1, tokens, columns) + 1, random(columns)
        check("rms_norm", x, weight, atol=0)
        check("norm_add", x, weight, y, torch.tensor([0.37]))
        check("gelu_mul", x, y, atol=0)
        check("softcap", x, atol=0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.usefixtures("instruction_set")
def test_heads_of_any_size(heads: int, head_dim: int) -> None:
    for tokens in TOKENS:
        x, weight = random(1, tokens, heads * head_dim), random(head_dim)
        check(f"head_norm_{heads}", x, weight)
        if head_dim % 2 == 0:
            check(f"head_rope_{heads}", x, weight, *angles(tokens, head_dim // 2))


@pytest.mark.usefixtures("instruction_set")
def test_gated_gelu_keeps_its_digits_wherever_float_has_them() -> None:
    gate = torch.linspace(-10.0, 12.0, MAX_TOKENS * MAX_COLUMNS).view(1, MAX_TOKENS, -1)
    check("gelu_mul", gate, torch.full_like(gate, 1.3), atol=0)
    tiny = 10.0 ** torch.linspace(-37, 0, 1000).view(1, 1, -1)
    check("gelu_mul", torch.cat((tiny, -tiny), -1), torch.ones(1, 1, 2000), atol=0)


@pytest.mark.usefixtures("instruction_set")
def test_extreme_values_neither_overflow_nor_become_nan() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 11.0, 1e3, 1e18, 1e19, 1e38, largest])
    x = torch.cat((x, -x))[None, None]
    (gelu,) = execute("gelu_mul", x, torch.ones_like(x))
    assert torch.equal(gelu[x > 10], x[x > 10]) and bool((gelu[x < -10.05] == 0).all())
    (capped,) = execute("softcap", x)
    torch.testing.assert_close(capped.double(), 30 * torch.tanh(x.double() / 30), rtol=1e-6, atol=1e-44)
    assert capped.abs().max() == CAP
    for size in (0.0, 1e-20, 1e-4, 1e4, 1e15):
        check("rms_norm", size * random(1, 2, 128), random(128), atol=0)


@pytest.mark.usefixtures("instruction_set")
def test_nan_stays_visible() -> None:
    x = torch.ones(1, 2, 33)
    x[0, 0, 5] = math.nan
    calls = {
        "rms_norm": (x, torch.ones(33)),
        "norm_add": (x, torch.ones(33), torch.zeros(1, 2, 33), torch.ones(1)),
        "gelu_mul": (x, torch.ones(1, 2, 33)),
        "softcap": (x,),
    }
    for name, inputs in calls.items():
        for result in execute(name, *inputs):
            assert bool(result[0, 0, 5].isnan()) and not bool(result[0, 1].isnan().any())


def test_the_number_of_threads_changes_no_bit() -> None:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    tokens, columns = MAX_TOKENS - 1, MAX_COLUMNS - 6
    x, y, weight = random(1, tokens, columns), random(1, tokens, columns), random(columns)
    head_dim = columns // 3
    calls = {
        "rms_norm": (x, weight),
        "norm_add": (x, weight, y, torch.tensor([0.37])),
        "head_rope_3": (x, random(head_dim), *angles(tokens, head_dim // 2)),
        "gelu_mul": (x, y),
        "softcap": (x,),
    }
    threads, results = _threadpool_get_thread_count(), []
    try:
        for count in (1, 2):
            _unsafe_reset_threadpool(count)
            results.append([result for name, inputs in calls.items() for result in execute(name, *inputs)])
    finally:
        _unsafe_reset_threadpool(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


X, ROW, PAIRS = torch.randn(1, 2, 12), torch.randn(12), torch.randn(2, 6)
REFUSED = {
    "a weight of another size": ("rms_norm", X, ROW[:7]),
    "a residual of another shape": ("norm_add", X, ROW, X[:, :1], ROW[:1]),
    "two scales": ("norm_add", X, ROW, X, ROW[:2]),
    "heads that do not divide": ("head_norm_3", X[..., :11], ROW[:3]),
    "a head's weight of another size": ("head_norm_3", X, ROW),
    "angles of fewer tokens": ("head_rope_1", X, ROW, PAIRS[:1], PAIRS[:1]),
    "sines of fewer tokens": ("head_rope_1", X, ROW, PAIRS, PAIRS[:1]),
    "angles of another head": ("head_rope_3", X, ROW[:4], PAIRS, PAIRS),
    "an odd head": ("head_rope_3", X[..., :9], ROW[:3], PAIRS[:, :1], PAIRS[:, :1]),
    "cosines without sines": ("no_sin", X, PAIRS),
    "a gate of another shape": ("gelu_mul", X, X[..., :7]),
    "a cap of zero": ("no_cap", X),
    "another type": ("float64", X, ROW),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_an_error_and_not_a_crash(name: str) -> None:
    call, *inputs = REFUSED[name]
    with pytest.raises(RuntimeError, match="0x12"):  # Error::InvalidArgument
        execute(call, *(tensor.contiguous() for tensor in inputs))


def test_the_operators_are_their_references_in_eager_and_pass_pytorchs_own_checks() -> None:
    x, weight, scale = random(1, 5, 24), random(24), torch.tensor([0.5])
    for name, arguments in {
        "rms_norm": (x, weight, EPS),
        "norm_add": (x, weight, EPS, 2 * x, scale),
        "head_rope": (x, weight[:8], EPS, *angles(5, 4), 3),
        "gelu_mul": (x, 2 * x),
        "softcap": (x, CAP),
    }.items():
        operator = getattr(torch.ops.g4, f"cpu_{name}")
        right = getattr(ops, f"{name}_reference")(*arguments)
        torch.testing.assert_close(getattr(ops, name)(*arguments), right, rtol=0, atol=0)
        torch.testing.assert_close(operator.out(*arguments, out=torch.empty(0)), right, rtol=0, atol=0)
        torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")


def test_heads_are_laid_out_for_the_cache() -> None:
    x, (cos, sin) = random(1, 5, 24), angles(5, 4)
    rotated = ops.head_rope(x, None, EPS, cos, sin, 3)
    assert rotated.shape == (1, 3, 5, 8) and rotated.is_contiguous()
    head = x[0, 4, 8:16] / x[0, 4, 8:16].square().mean().sqrt()
    first, second = head[:4], head[4:]
    by_hand = torch.cat((first * cos[4] - second * sin[4], second * cos[4] + first * sin[4]))
    torch.testing.assert_close(rotated[0, 1, 4], by_hand)
