"""Keys and values of past tokens: one cache class, a ring for sliding layers and the whole context for full ones.

Position p lives in slot ``p % slots``. A chunk is written before it is attended to, so a ring must still hold the
window of the chunk's first query after the chunk's last token is in: ``slots >= window + prefill_chunk - 1``. With
exactly that many, chunked prefill equals one token at a time for every chunk of up to ``prefill_chunk`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config, LayerConfig


@dataclass(frozen=True)
class CacheSpec:
    """How much to remember: tokens of context, the longest prefill chunk, and the dtype of keys and values."""

    context_length: int
    prefill_chunk: int
    dtype: torch.dtype

    def check(self, config: Gemma4Config) -> None:
        """Refuse a context that the model was not trained for, and sizes below what a conversation needs.

        Raises: G4Error with the number and the limit.
        """
        if not 2 <= self.context_length <= config.max_position_embeddings:
            raise G4Error(
                f"A context of {self.context_length} tokens is outside 2 to {config.max_position_embeddings}, "
                "which this model can hold.",
                hint=f"Use --ctx {config.max_position_embeddings} or less.",
            )
        if not 1 <= self.prefill_chunk <= self.context_length:
            raise G4Error(
                f"Prefill chunks of {self.prefill_chunk} tokens are outside 1 to the context of {self.context_length}."
            )

    def slots(self, layer: LayerConfig) -> int:
        """Return how many positions a layer's cache holds."""
        return layer.window + self.prefill_chunk - 1 if layer.window else self.context_length

    def nbytes(self, config: Gemma4Config) -> int:
        """Return the bytes of every layer's keys and values together."""
        layers = (config.layer(index) for index in range(config.num_hidden_layers))
        values = sum(2 * layer.num_key_value_heads * self.slots(layer) * layer.head_dim for layer in layers)
        return values * self.dtype.itemsize


class KVCache(nn.Module):
    """Buffers `k` and `v`, each [1, H_kv, slots, D]."""

    k: Tensor
    v: Tensor

    def __init__(self, layer: LayerConfig, spec: CacheSpec) -> None:
        super().__init__()
        self.slots = spec.slots(layer)
        shape = (1, layer.num_key_value_heads, self.slots, layer.head_dim)
        # Persistent, so that torch.export keeps them as mutable state that two methods can share.
        self.register_buffer("k", torch.zeros(shape, dtype=spec.dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=spec.dtype))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k, v [1, H_kv, T, D]`` of positions ``input_pos [T]`` and return the whole buffers.

        T must not exceed `slots`; positions must be consecutive.
        """
        # index_copy_ becomes a true in-place write in ExecuTorch; slice assignment aborts or copies the whole buffer.
        slot = torch.remainder(input_pos, self.slots)
        self.k.index_copy_(2, slot, k.to(self.k.dtype))
        self.v.index_copy_(2, slot, v.to(self.v.dtype))
        return self.k, self.v
