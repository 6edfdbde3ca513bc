"""The parts of a Gemma 4 decoder layer. Source: transformers 5.23 `modeling_gemma4.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4cli.model.attention import Attend
from gemma4cli.model.config import Gemma4Config, LayerConfig
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from gemma4cli.model.rope import rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32, returned in x's dtype. The weight is plain: Gemma 4 has no (1 + weight)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return (normalize(x.to(torch.float32), self.eps) * self.weight.to(torch.float32)).to(x.dtype)


def normalize(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class ScaledEmbedding(nn.Module):
    """Token embeddings times sqrt(hidden_size).

    The factor is rounded to the embedding's dtype as in transformers (73.5 instead of 73.32 for the 31B in bfloat16),
    because that is what the model was trained and released with.
    """

    embed_scale: Tensor

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        scale = torch.tensor(config.hidden_size**0.5, dtype=torch.float32, device="cpu")
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = F.embedding(tokens, self.weight)
        return embedded * self.embed_scale.to(embedded.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalized q, k and v; K=V layers have no v_proj."""

    def __init__(self, config: Gemma4Config, layer: LayerConfig, cache: CacheSpec, attend: Attend) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.window = layer.window
        self.eps = config.rms_norm_eps
        self.attend = attend
        q_size = config.num_attention_heads * layer.head_dim
        kv_size = layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = None if layer.k_eq_v else nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.kv_cache = KVCache(layer, cache)

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)  # [1, T, H, D]
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        raw_k = self.k_proj(x).view(heads)
        raw_v = raw_k if self.v_proj is None else self.v_proj(x).view(heads)
        k = rotate(self.k_norm(raw_k), cos, sin)
        v = normalize(raw_v.to(torch.float32), self.eps).to(x.dtype)
        keys, values = self.kv_cache.update(input_pos, k.transpose(1, 2), v.transpose(1, 2))
        mixed = self.attend(q.transpose(1, 2), keys, values, input_pos, self.window)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A norm before and after attention and MLP each; at the end the whole residual stream is scaled."""

    layer_scalar: Tensor

    def __init__(self, config: Gemma4Config, layer: LayerConfig, cache: CacheSpec, attend: Attend) -> None:
        super().__init__()
        self.kind = layer.kind
        self.self_attn = Attention(config, layer, cache, attend)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.empty(1))

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), input_pos, cos, sin))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar
