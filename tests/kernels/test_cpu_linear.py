"""`g4::cpu_linear`, `cpu_embedding` and `cpu_linear_float`: the C++ kernels against formulas in float64.

Exporting costs seconds, so a few programs take the weights as inputs, with every size dynamic, and are used for all
formats and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemma4cli.kernels.cpu_linear import (
    embedding,
    embedding_reference,
    linear,
    linear_float,
    linear_float_reference,
    linear_reference,
)
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, assemble, dequantize, unpack_codes
from gemma4cli.native import load_kernels
from tests.support.mini_program import quiet

FORMATS = [
    pytest.param(bits, group, has_min, id=f"{bits}-bit-{group}{'-min' * has_min}")
    for bits, group, has_min in product((4, 6, 8), (16, 32), (False, True))
]
CODES = {4: (0, 15), 6: (0, 63), 8: (-128, 127)}
FACTOR = 2.5
WIDE = (12544, 40)  # more columns, and rows, than are taken together
# Against the sum of the terms' magnitudes, which the kernels add up in float32.
TOLERANCE = 2e-6


def make_weight(n: int, k: int, bits: int, group: int, has_min: bool, seed: int = 0) -> PackedWeight:
    """Random codes and scales, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = CODES[bits]
    levels, steps = (n, k // group), (n, -(-k // 256))
    if has_min:
        levels, steps = (*levels, 2), (*steps, 2)
    code = torch.randint(low, high + 1, (n, k), generator=generator)
    sub = torch.randint(-128, 128, levels, generator=generator).to(torch.int8)
    step = (torch.randn(steps, generator=generator) * 0.01).to(torch.float16)
    return assemble(code, sub, step, bits, group)


def tensors(weight: PackedWeight) -> tuple[Tensor, ...]:
    parts = (weight.codes, weight.high, weight.sub, weight.step)
    return tuple(part for part in parts if part is not None)


class Linear(nn.Module):
    def forward(self, x: Tensor, *weight: Tensor) -> Tensor:
        codes, *high, sub, step = weight
        return linear(x, codes, high[0] if high else None, sub, step)


class Embedding(nn.Module):
    def forward(self, tokens: Tensor, *weight: Tensor) -> Tensor:
        codes, *high, sub, step = weight
        return embedding(tokens, codes, high[0] if high else None, sub, step, FACTOR)


class LinearFloat(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear_float(x, weight)


def export(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> Any:
    """Return a program and its method, which needs the program to live."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    load_kernels()
    with quiet():
        exported = torch.export.export(module, inputs, dynamic_shapes=shapes)
        edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_skip_dim_order=True))
        loaded = Runtime.get().load_program(bytes(edge.to_executorch().buffer))
    return loaded, loaded.load_method("forward")


def dim(name: str, most: int) -> Any:
    return torch.export.Dim(name, min=1, max=most)


@cache
def linear_program(bits: int, has_min: bool) -> Any:
    """4 and 8 bits differ in no rank: their program is the same."""
    weight = make_weight(3, 512, bits, 32, has_min)
    columns = [{0: dim("n", 1024), 1: dim(f"columns_{i}", 4096)} for i in range(len(tensors(weight)))]
    shapes = ({1: dim("m", 320), 2: dim("k", 16384)}, tuple(columns))
    return export(Linear(), (torch.randn(1, 2, 512), *tensors(weight)), shapes)


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    _, method = linear_program(6 if weight.high is not None else 4, weight.format.has_min)
    return method.execute([x[None], *tensors(weight)])[0][0].clone()


def multiply_by_hand(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return the result in float64 and the sum of its terms' magnitudes."""
    fmt = weight.format
    runs = x.unflatten(1, (-1, 32))
    scale = runs.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, torch.round(runs * (1 / scale)), 0).double() * scale.double()
    rounded = rounded.flatten(1)
    sub, step = weight.sub.double(), weight.step.double().repeat_interleave(256 // fmt.group_size, dim=1)
    level = sub * step[:, : sub.shape[1]]
    scales, minima = (level[..., 0], level[..., 1]) if fmt.has_min else (level, torch.zeros_like(level))
    values = (unpack_codes(weight) - fmt.zero) * scales.repeat_interleave(fmt.group_size, dim=1)
    minima = minima.repeat_interleave(fmt.group_size, dim=1)
    return rounded @ (values - minima).T, rounded.abs() @ (values.abs() + minima.abs()).T


def check(x: Tensor, weight: PackedWeight, counts: tuple[int, ...]) -> None:
    """Multiply the first rows of x, as many as each of `counts` says."""
    expected, magnitude = multiply_by_hand(x, weight)
    for m in counts:
        error = (multiply(x[:m], weight).double() - expected[:m]).abs()
        within = error <= TOLERANCE * magnitude[:m] + 1e-30
        assert within.all(), f"{m} x {weight.shape}: {(error / magnitude[:m]).max()}"


@pytest.mark.parametrize(("bits", "group", "has_min"), FORMATS)
@pytest.mark.usefixtures("instruction_set")
def test_the_kernels_equal_the_formula_in_every_shape(bits: int, group: int, has_min: bool) -> None:
    shapes = [*product((64, 128, 192, 256, 320, 512, 896, 1024), (1, 15, 16, 17, 100)), WIDE]
    for k, n in shapes:
        if bits == 6 and k % 128:
            continue
        weight = make_weight(n, k, bits, group, has_min, seed=k + n)
        check(torch.randn(33, k, generator=torch.Generator().manual_seed(k)), weight, (1, 2, 3, 7, 13, 33))


@pytest.mark.parametrize(("bits", "group", "has_min"), FORMATS)
@pytest.mark.usefixtures("instruction_set")
def test_extreme_codes_and_activations_neither_overflow_nor_vanish(bits: int, group: int, has_min: bool) -> None:
    """Products of equal signs and the largest magnitudes are where 16-bit sums would saturate."""
    n, k = 5, 384
    weight = make_weight(n, k, bits, group, has_min)
    signs = torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0)
    one_hot = torch.zeros(k)
    one_hot[k - 1] = -7.0
    negative = -torch.arange(k).remainder(31).float()  # the largest magnitude of each run is negative
    rows = [torch.ones(k), -torch.ones(k), signs, signs * 1e30, signs * 1e-30, torch.zeros(k), one_hot, negative]
    x = torch.stack(rows)
    for code in CODES[bits]:
        constant = assemble(torch.full((n, k), code), weight.sub, weight.step, bits, group)
        check(x, constant, (len(x),))
        for row in x:
            check(row[None], constant, (1,))


@pytest.mark.usefixtures("instruction_set")
def test_activations_too_small_for_a_scale_count_as_zero() -> None:
    for m in (1, 8):
        assert not multiply(torch.full((m, 256), 1e-40), make_weight(3, 256, 4, 32, has_min=True)).any()


@pytest.mark.parametrize("m", [1, 8, 300])
@pytest.mark.usefixtures("instruction_set")
def test_the_number_of_threads_changes_no_bit(m: int) -> None:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    weight, x = make_weight(700, 1088, 4, 32, has_min=True), torch.randn(m, 1088)
    program = linear_float_program()
    floats = torch.randn(700, 1088)
    before = _threadpool_get_thread_count()
    try:
        results = []
        for threads in (1, 2, 3):
            _unsafe_reset_threadpool(threads)
            results.append((multiply(x, weight), program[1].execute([x[None], floats])[0].clone()))
    finally:
        _unsafe_reset_threadpool(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@cache
def embedding_program(bits: int, has_min: bool) -> Any:
    """The result has as many columns as the table, which an exported program fixes."""
    weight = make_weight(40, 640, bits, 32, has_min)
    tokens = torch.arange(3)[None]
    return export(Embedding(), (tokens, *tensors(weight)), ({1: dim("tokens", 64)}, (None,) * len(tensors(weight))))


@pytest.mark.parametrize(("bits", "has_min"), product((4, 6, 8), (False, True)))
def test_an_embedding_is_the_dequantized_rows_to_the_bit(bits: int, has_min: bool) -> None:
    weight = make_weight(40, 640, bits, 32, has_min, seed=1)
    tokens = torch.tensor([[39, 0, 7, 7, 12]])
    result = embedding_program(bits, has_min)[1].execute([tokens, *tensors(weight)])[0]
    assert torch.equal(result, dequantize(weight)[tokens] * FACTOR)


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_outside_the_table_is_an_error_and_not_a_crash(token: int) -> None:
    weight = make_weight(40, 640, 4, 32, has_min=True)
    with pytest.raises(RuntimeError):
        embedding_program(4, True)[1].execute([torch.tensor([[0, token]]), *tensors(weight)])


@cache
def linear_float_program() -> Any:
    shapes = ({1: dim("m", 512), 2: dim("k", 2048)}, {0: dim("n", 1024), 1: dim("columns", 2048)})
    return export(LinearFloat(), (torch.randn(1, 2, 64), torch.randn(3, 64)), shapes)


@pytest.mark.usefixtures("instruction_set")
def test_a_float_layer_is_a_matrix_product() -> None:
    _, method = linear_float_program()
    for m, n, k in product((1, 2, 5), (1, 4, 7, 130), (1, 31, 64, 100, 1024)):
        generator = torch.Generator().manual_seed(m + n + k)
        x, weight = torch.randn(1, m, k, generator=generator), torch.randn(n, k, generator=generator)
        result = method.execute([x, weight])[0]
        magnitude = x.double().abs() @ weight.double().abs().T
        assert ((result - x.double() @ weight.double().T).abs() <= TOLERANCE * magnitude).all(), (m, n, k)


def wrong_arguments() -> Iterator[Any]:
    weight = make_weight(8, 512, 4, 32, has_min=False)
    x = torch.randn(1, 2, 512)
    yield pytest.param((x[..., :256].contiguous(), *tensors(weight)), id="activations of another width")
    yield pytest.param((x, weight.codes[:, :32].contiguous(), weight.sub, weight.step), id="too few codes")
    yield pytest.param((x, weight.codes, weight.sub[:, :8].contiguous(), weight.step), id="groups of 64")
    yield pytest.param((x, weight.codes, weight.sub[:7].contiguous(), weight.step), id="scales of fewer rows")
    yield pytest.param((x, weight.codes, weight.sub, weight.step[:, :1].contiguous()), id="too few steps")
    yield pytest.param((x, weight.codes.float(), weight.sub, weight.step), id="codes of another type")
    yield pytest.param((x.half(), *tensors(weight)), id="activations of another type")


@pytest.mark.parametrize("arguments", wrong_arguments())
def test_arguments_that_do_not_fit_are_an_error_and_not_a_crash(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        linear_program(4, False)[1].execute(list(arguments))


def test_the_operators_are_the_references_in_eager_and_pass_pytorchs_own_checks() -> None:
    weight = make_weight(24, 256, 6, 16, has_min=False)
    packed = (weight.codes, weight.high, weight.sub, weight.step)
    x, tokens, floats = torch.randn(1, 3, 256), torch.tensor([[3, 23]]), torch.randn(5, 256)
    for name, arguments, expected in (
        ("cpu_linear", (x, *packed), linear_reference(x, *packed)),
        ("cpu_embedding", (tokens, *packed, FACTOR), embedding_reference(tokens, *packed, FACTOR)),
        ("cpu_linear_float", (x, floats), linear_float_reference(x, floats)),
    ):
        operator = getattr(torch.ops.g4, name)
        assert torch.equal(operator(*arguments), expected)
        torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")
        out = torch.empty(0)
        operator.out(*arguments, out=out)
        assert torch.equal(out, expected)


def test_the_reference_is_the_formula() -> None:
    for bits, has_min in product((4, 6, 8), (False, True)):
        weight, x = make_weight(9, 384, bits, 32, has_min), torch.randn(5, 384)
        expected, magnitude = multiply_by_hand(x, weight)
        result = linear_reference(x, weight.codes, weight.high, weight.sub, weight.step)
        assert ((result - expected).abs() <= TOLERANCE * magnitude).all()
