"""The model as the CPU backend computes it: Gemma 4 made of `cpu_ops`, filled from any checkpoint.

`build_cpu_model` gives an eager module that computes what the exported program computes, up to the order of float32
additions. It is what is traced, and what the program is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (defines embedding_byte)
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4cli.export import cpu_ops
from gemma4cli.export.cpu_linear import Change, CpuLinear, Stored, constant, prepare_linear
from gemma4cli.kernels.cpu_attention import attention
from gemma4cli.model.config import Gemma4Config, LayerConfig
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from gemma4cli.model.rope import RotaryEmbedding
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.tensors import is_quantized

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass
class _Weights:
    """Reads tensors by name, brings them into the CPU's forms, and remembers which of them changed."""

    reader: Checkpoint
    progress: Progress
    changes: dict[str, Change] = field(default_factory=dict)

    def plain(self, name: str) -> Tensor:
        return self.reader.tensor(name).to(torch.float32)

    def linear(self, name: str, source: str | None = None) -> CpuLinear:
        layer, change = prepare_linear(self.reader.tensor(source or name))
        if change is not None:
            self.changes[name] = change
            error = f"{change.relative_error:.3%}"
            self.progress.note(f"{name}: the CPU has no {change.stored}; it becomes {change.becomes}, error {error}.")
        return layer


class CpuNorm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return cpu_ops.rms_norm(x, self.weight, self.eps)


class CpuEmbedding(nn.Module):
    """Token embeddings, float32 or up to 8 bits with any groups, times sqrt(hidden_size).

    The factor is rounded to the dtype of the checkpoint's embedding, as in `model.layers.ScaledEmbedding`.
    """

    def __init__(self, table: Tensor, config: Gemma4Config) -> None:
        super().__init__()
        factor = torch.tensor(config.hidden_size**0.5, dtype=table.dtype if table.dtype.is_floating_point else None)
        self.factor = constant(factor.float())
        self.is_quantized = is_quantized(table)
        if self.is_quantized:
            stored = Stored.of(table)
            self.codes = constant(stored.codes().to(torch.int8))
            self.scale = constant(stored.scale)
            self.zero_point = constant(stored.zero_point if stored.may_have_offset(0) else None)
        else:
            self.table = constant(table.to(torch.float32))

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.is_quantized:
            return F.embedding(tokens, self.table) * self.factor
        rows = torch.ops.quantized_decomposed.embedding_byte(self.codes, self.scale, self.zero_point, -128, 127, tokens)
        return rows * self.factor


class CpuAttention(nn.Module):
    """`model.layers.Attention` in the CPU's operators."""

    def __init__(
        self, weights: _Weights, prefix: str, config: Gemma4Config, layer: LayerConfig, cache: CacheSpec
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.eps = layer.head_dim, layer.window, config.rms_norm_eps
        self.q_proj = weights.linear(f"{prefix}.q_proj.weight")
        self.k_proj = weights.linear(f"{prefix}.k_proj.weight")
        self.v_proj = None if layer.k_eq_v else weights.linear(f"{prefix}.v_proj.weight")
        self.o_proj = weights.linear(f"{prefix}.o_proj.weight")
        self.q_norm = CpuNorm(weights.plain(f"{prefix}.q_norm.weight"), self.eps)
        self.k_norm = CpuNorm(weights.plain(f"{prefix}.k_norm.weight"), self.eps)
        self.kv_cache = KVCache(layer, cache)

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)  # [1, T, H, D]
        q = cpu_ops.rope(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        raw_k = self.k_proj(x).view(heads)
        raw_v = raw_k if self.v_proj is None else self.v_proj(x).view(heads)
        k = cpu_ops.rope(self.k_norm(raw_k), cos, sin)
        v = cpu_ops.rms_norm(raw_v, None, self.eps)
        keys, values = self.kv_cache.update(input_pos, k.transpose(1, 2), v.transpose(1, 2))
        mixed = attention(q.transpose(1, 2), keys, values, input_pos, self.window)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class CpuLayer(nn.Module):
    """`model.layers.DecoderLayer` in the CPU's operators."""

    def __init__(
        self, weights: _Weights, prefix: str, config: Gemma4Config, layer: LayerConfig, cache: CacheSpec
    ) -> None:
        super().__init__()

        def norm(name: str) -> CpuNorm:
            return CpuNorm(weights.plain(f"{prefix}.{name}.weight"), config.rms_norm_eps)

        self.kind = layer.kind
        self.self_attn = CpuAttention(weights, f"{prefix}.self_attn", config, layer, cache)
        self.gate_proj = weights.linear(f"{prefix}.mlp.gate_proj.weight")
        self.up_proj = weights.linear(f"{prefix}.mlp.up_proj.weight")
        self.down_proj = weights.linear(f"{prefix}.mlp.down_proj.weight")
        self.input_layernorm = norm("input_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self.layer_scalar = constant(weights.plain(f"{prefix}.layer_scalar"))

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), input_pos, cos, sin))
        h = self.pre_feedforward_layernorm(x)
        h = self.down_proj(cpu_ops.gelu_mul(self.gate_proj(h), self.up_proj(h)))
        return (x + self.post_feedforward_layernorm(h)) * self.layer_scalar


class CpuGemma4(nn.Module):
    """`model.gemma4.Gemma4` in the CPU's operators: the same arguments and results, float32 throughout.

    changes: by name, the matrices that are not exactly the checkpoint's.
    """

    def __init__(self, weights: _Weights, config: Gemma4Config, cache: CacheSpec) -> None:
        super().__init__()
        cache.check(config)
        self.config, self.cache, self.changes = config, cache, weights.changes
        layers = [config.layer(index) for index in range(config.num_hidden_layers)]
        self.embed_tokens = CpuEmbedding(weights.reader.tensor(EMBEDDING), config)
        self.rotary_emb = nn.ModuleDict({layer.kind: RotaryEmbedding(layer) for layer in layers})
        self.layers = nn.ModuleList()
        with weights.progress.phase("load layers", len(layers), "layers") as task:
            for index, layer in enumerate(layers):
                self.layers.append(CpuLayer(weights, f"model.layers.{index}", config, layer, cache))
                task.advance(1)
        self.norm = CpuNorm(weights.plain("model.norm.weight"), config.rms_norm_eps)
        tied = LM_HEAD not in weights.reader.names()
        self.lm_head = weights.linear(LM_HEAD, EMBEDDING if tied else LM_HEAD)

    def forward(self, tokens: Tensor, input_pos: Tensor, last_only: bool = True) -> Tensor:
        angles = {kind: rotary(input_pos) for kind, rotary in self.rotary_emb.items()}
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, input_pos, *angles[layer.kind])
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.norm(x))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cpu_ops.softcap(logits, cap)


def build_cpu_model(
    reader: Checkpoint, context_length: int, prefill_chunk: int, progress: Progress = SILENT
) -> CpuGemma4:
    """Build the eager model that the CPU backend exports. Its caches are float32."""
    cache = CacheSpec(context_length, prefill_chunk, torch.float32)
    return CpuGemma4(_Weights(reader, progress), reader.config, cache).eval().requires_grad_(False)
