"""``g4::cpu_attention``: the attention of exported CPU programs, whose cost follows the filled length of the cache.

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
_library.define(f"cpu_attention({_ARGUMENTS}) -> Tensor")
_library.define(f"cpu_attention.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def _attention_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int, *, out: Tensor
) -> Tensor:
    result = attention_reference(q, k_cache, v_cache, input_pos, window)
    return out.resize_(result.shape).copy_(result)


def _attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


_library.impl("cpu_attention", attention_reference, "CompositeExplicitAutograd")
_library.impl("cpu_attention.out", _attention_out, "CompositeExplicitAutograd")
_library.impl("cpu_attention", _attention_fake, "Meta")


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Call ``g4::cpu_attention``: the arguments and the result of `attention_reference`, all float32."""
    return torch.ops.g4.cpu_attention(q, k_cache, v_cache, input_pos, window)
