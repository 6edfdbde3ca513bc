"""The dense Gemma 4 text model, one sequence at a time, with its caches inside.

Parameters are named as in transformers' `Gemma4ForCausalLM`. Everything a checkpoint does not hold (RoPE frequencies,
the embedding's scale, caches) is a buffer of a submodule: the root has none, because torch.export confuses a root
buffer with a forward argument of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gemma4cli.model.attention import Attend, attend
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from gemma4cli.model.layers import DecoderLayer, RMSNorm, ScaledEmbedding
from gemma4cli.model.rope import RotaryEmbedding


class Gemma4Decoder(nn.Module):
    """Everything below the head: ``forward(tokens [1, T], input_pos [T]) -> hidden [1, T, hidden_size]``."""

    def __init__(self, config: Gemma4Config, cache: CacheSpec, attend: Attend) -> None:
        super().__init__()
        layers = [config.layer(index) for index in range(config.num_hidden_layers)]
        self.embed_tokens = ScaledEmbedding(config)
        self.rotary_emb = nn.ModuleDict({layer.kind: RotaryEmbedding(layer) for layer in layers})
        self.layers = nn.ModuleList(DecoderLayer(config, layer, cache, attend) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        angles = {kind: rotary(input_pos) for kind, rotary in self.rotary_emb.items()}
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, input_pos, *angles[layer.kind])
        return x


class Gemma4(nn.Module):
    """Token ids in, logits out.

    Build it on the meta device and let `weights.build_model` fill it; until then only shapes are there.
    """

    def __init__(self, config: Gemma4Config, cache: CacheSpec, attend: Attend = attend) -> None:
        super().__init__()
        cache.check(config)
        self.config = config
        self.cache = cache
        self.model = Gemma4Decoder(config, cache, attend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_lm_head()

    def forward(self, tokens: Tensor, input_pos: Tensor, last_only: bool = True) -> Tensor:
        """Read tokens into the caches and predict what follows.

        Args:
            tokens: [1, T] int64, T at most the cache's prefill_chunk.
            input_pos: [T] int64, consecutive positions; all earlier ones must have been read before.
            last_only: whether to predict after the last token only.
        Returns: logits [1, 1, V], or [1, T, V] when not `last_only`, float32, soft-capped.
        """
        x = self.model(tokens, input_pos)
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.model.norm(x)).to(torch.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def tie_lm_head(self) -> None:
        """Let the head read the embedding: one Parameter object under two names."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def kv_caches(self) -> Iterator[KVCache]:
        """Yield the cache of every layer, from the first to the last."""
        for layer in self.model.layers:
            yield layer.self_attn.kv_cache
