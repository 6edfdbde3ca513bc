"""``g4::cpu_linear`` and its kin: the matrices of exported CPU programs, read in the layout that they are stored in.

A delegate re-encodes and repacks weights when it loads a program, which takes its time and as much memory again. These
operators read codes and scales as ``quantized_matmul.format`` lays them out, straight from the mapped file: what the
GPU's kernels read, too. They are implemented in C++ (`runner/ops/`) in ``libg4_kernels.so``; in PyTorch they are the
references, so eager runs, `torch.export` and tests need no native code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.cpu_linear.reference import (
    embedding_reference,
    linear_float_reference,
    linear_reference,
    packed_weight,
)

__all__ = ["embedding", "embedding_reference", "linear", "linear_float", "linear_float_reference", "linear_reference"]

_WEIGHT = "Tensor codes, Tensor? high, Tensor sub, Tensor step"
_ARGUMENTS = {
    "cpu_linear": f"Tensor x, {_WEIGHT}",
    "cpu_embedding": f"Tensor tokens, {_WEIGHT}, float factor",
    "cpu_linear_float": "Tensor x, Tensor weight",
}

_library = torch.library.Library("g4", "FRAGMENT")
for _name, _arguments in _ARGUMENTS.items():
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")


def _linear_out(x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, *, out: Tensor) -> Tensor:
    result = linear_reference(x, codes, high, sub, step)
    return out.resize_(result.shape).copy_(result)


def _embedding_out(
    tokens: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, factor: float, *, out: Tensor
) -> Tensor:
    result = embedding_reference(tokens, codes, high, sub, step, factor)
    return out.resize_(result.shape).copy_(result)


def _linear_float_out(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    result = linear_float_reference(x, weight)
    return out.resize_(result.shape).copy_(result)


def _linear_fake(x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _embedding_fake(
    tokens: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, factor: float
) -> Tensor:
    columns = packed_weight(codes, high, sub, step).shape[1]
    return tokens.new_empty((*tokens.shape, columns), dtype=torch.float32)


def _linear_float_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _reference, _out, _fake in (
    ("cpu_linear", linear_reference, _linear_out, _linear_fake),
    ("cpu_embedding", embedding_reference, _embedding_out, _embedding_fake),
    ("cpu_linear_float", linear_float_reference, _linear_float_out, _linear_float_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    _library.impl(f"{_name}.out", _out, "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")


def linear(x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor) -> Tensor:
    """Call ``g4::cpu_linear``: the arguments and the result of `linear_reference`, all activations float32."""
    return torch.ops.g4.cpu_linear(x, codes, high, sub, step)


def embedding(tokens: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, factor: float) -> Tensor:
    """Call ``g4::cpu_embedding``: the arguments and the result of `embedding_reference`."""
    return torch.ops.g4.cpu_embedding(tokens, codes, high, sub, step, factor)


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """Call ``g4::cpu_linear_float``: the arguments and the result of `linear_float_reference`."""
    return torch.ops.g4.cpu_linear_float(x, weight)
