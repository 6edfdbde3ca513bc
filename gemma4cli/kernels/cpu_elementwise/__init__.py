"""``g4::cpu_rms_norm`` and its kin: what exported CPU programs compute between linear layers and attention.

One operator each for what would be up to a dozen of ExecuTorch's, every one of which reads and writes all activations.
They are implemented in C++ (`runner/ops/`) in ``libg4_kernels.so``; see `cpu_attention` for how programs, Python's
runtime and eager PyTorch find an operator. All tensors are float32 and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma4cli.kernels.cpu_elementwise.reference import (
    gelu_mul_reference,
    head_rope_reference,
    norm_add_reference,
    rms_norm_reference,
    softcap_reference,
)

__all__ = [
    "gelu_mul",
    "gelu_mul_reference",
    "head_rope",
    "head_rope_reference",
    "norm_add",
    "norm_add_reference",
    "rms_norm",
    "rms_norm_reference",
    "softcap",
    "softcap_reference",
]

_library = torch.library.Library("g4", "FRAGMENT")


def _like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _head_rope_shape(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
) -> Tensor:
    return x.new_empty((x.shape[0], heads, x.shape[1], x.shape[2] // heads))


def _define(
    name: str, arguments: str, reference: Callable[..., Tensor], shape: Callable[..., Tensor] = _like_first
) -> None:
    def into(*values: object, out: Tensor) -> Tensor:
        result = reference(*values)
        return out.resize_(result.shape).copy_(result)

    _library.define(f"{name}({arguments}) -> Tensor")
    _library.define(f"{name}.out({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(f"{name}.out", into, "CompositeExplicitAutograd")
    _library.impl(name, shape, "Meta")


_define("cpu_rms_norm", "Tensor x, Tensor? weight, float eps", rms_norm_reference)
_define("cpu_norm_add", "Tensor x, Tensor weight, float eps, Tensor residual, Tensor? scale", norm_add_reference)
_define(
    "cpu_head_rope",
    "Tensor x, Tensor? weight, float eps, Tensor? cos, Tensor? sin, int heads",
    head_rope_reference,
    _head_rope_shape,
)
_define("cpu_gelu_mul", "Tensor gate, Tensor up", gelu_mul_reference)
_define("cpu_softcap", "Tensor x, float cap", softcap_reference)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Call ``g4::cpu_rms_norm``: the arguments and the result of `rms_norm_reference`."""
    return torch.ops.g4.cpu_rms_norm(x, weight, eps)


def norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None) -> Tensor:
    """Call ``g4::cpu_norm_add``: the arguments and the result of `norm_add_reference`."""
    return torch.ops.g4.cpu_norm_add(x, weight, eps, residual, scale)


def head_rope(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
) -> Tensor:
    """Call ``g4::cpu_head_rope``: the arguments and the result of `head_rope_reference`."""
    return torch.ops.g4.cpu_head_rope(x, weight, eps, cos, sin, heads)


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Call ``g4::cpu_gelu_mul``: the arguments and the result of `gelu_mul_reference`."""
    return torch.ops.g4.cpu_gelu_mul(gate, up)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Call ``g4::cpu_softcap``: the arguments and the result of `softcap_reference`."""
    return torch.ops.g4.cpu_softcap(x, cap)
