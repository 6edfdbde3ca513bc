"""``g4::attention``: the attention of exported CPU programs, whose cost follows the filled length of the cache.

ExecuTorch's own ways to spell attention cost as much as the allocated cache does. Exported programs therefore call this
operator, implemented in C++ (`runner/ops/`) in ``libg4_kernels.so``, which `g4-runner` links and Python's runtime loads
with `gemma4cli.native.load_kernels`. In PyTorch the operator is the reference, so eager runs, `torch.export` and tests
need no native code.

The ``.out`` overload exists because ExecuTorch's programs call out variants only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.cpu_attention.reference import attention_reference

__all__ = ["attention", "attention_reference"]

_ARGUMENTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int window"

_library = torch.library.Library("g4", "FRAGMENT")
_library.define(f"attention({_ARGUMENTS}) -> Tensor")
_library.define(f"attention.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def _attention_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int, *, out: Tensor
) -> Tensor:
    out.resize_(q.shape)
    return out.copy_(attention_reference(q, k_cache, v_cache, input_pos, window))


def _attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_library.impl("attention", attention_reference, "CompositeExplicitAutograd")
_library.impl("attention.out", _attention_out, "CompositeExplicitAutograd")
_library.impl("attention", _attention_fake, "Meta")


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Call ``g4::attention``: the arguments and the result of `attention_reference`, all float32."""
    return torch.ops.g4.attention(q, k_cache, v_cache, input_pos, window)
