"""``g4::sample``: `model.sampling.sample` as one operator of exported CPU programs.

As a graph, sampling is six hundred small operators over the whole vocabulary in both methods: most of an export's time
and a good part of a small model's step. The C++ kernel (`runner/ops/sample.cpp`) follows the same definition, draws
the same noise, and looks only at the tokens that the filters keep. In PyTorch the operator is `sample` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.model.sampling import sample as _reference

_ARGUMENTS = "Tensor logits, Tensor position, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed"

_library = torch.library.Library("g4", "FRAGMENT")
_library.define(f"sample({_ARGUMENTS}) -> Tensor")
_library.define(f"sample.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")


def _sample_out(*arguments: Tensor, out: Tensor) -> Tensor:
    return out.copy_(_reference(*arguments))


_library.impl("sample", _reference, "CompositeExplicitAutograd")
_library.impl("sample.out", _sample_out, "CompositeExplicitAutograd")
_library.impl("sample", lambda logits, position, *settings: torch.empty_like(position), "Meta")


def sample(
    logits: Tensor, position: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor
) -> Tensor:
    """Call ``g4::sample``: the arguments and the result of `model.sampling.sample`."""
    return torch.ops.g4.sample(logits, position, temperature, top_k, top_p, min_p, seed)
