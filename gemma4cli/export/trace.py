"""Trace a model into the two methods of the contract."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gemma4cli.export.contract import DECODE, METHODS, MIN_PREFILL_TOKENS
from gemma4cli.model.sampling import sample

Sample = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Step(nn.Module):
    """One call of an exported method: read tokens, predict, choose; see `contract.INPUTS` and `contract.OUTPUTS`."""

    def __init__(self, model: nn.Module, sample: Sample = sample) -> None:
        """model: ``(tokens [1, T], input_pos [T]) -> logits [1, 1, V]``; sample: like `model.sampling.sample`."""
        super().__init__()
        self.model = model
        self._sample = sample

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens, input_pos)[:, -1]  # [1, V]
        token = self._sample(logits, input_pos[-1:], temperature, top_k, top_p, min_p, seed)
        return token, logits


def trace_methods(step: nn.Module, prefill_chunk: int) -> dict[str, ExportedProgram]:
    """Trace both methods; they refer to the same buffers."""
    return {method: trace_method(step, method, prefill_chunk) for method in METHODS}


def trace_method(step: nn.Module, method: str, prefill_chunk: int) -> ExportedProgram:
    """Trace `prefill` for 2 … prefill_chunk tokens or `decode` for one."""
    if method == DECODE:
        return torch.export.export(step, _example(1), strict=False)
    count = Dim("T", min=MIN_PREFILL_TOKENS, max=prefill_chunk)
    dynamic_shapes = ({1: count}, {0: count}, None, None, None, None, None)
    return torch.export.export(step, _example(prefill_chunk), dynamic_shapes=dynamic_shapes, strict=False)


def _example(count: int) -> tuple[Tensor, ...]:
    return (
        torch.zeros(1, count, dtype=torch.int64),
        torch.arange(count),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
    )
