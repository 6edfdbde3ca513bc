"""The model as the CPU backend computes it: Gemma 4 on packed weights and our own operators, float32 throughout.

`CpuModel` has the shapes that follow from config and weight formats alone; it is what is traced. Filled from a
checkpoint (`build_cpu_model`) it is the eager model that an exported program is compared with: the operators have
their arithmetic in PyTorch, and in C++ in `runner/ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4cli.export.packed import PackedMatrix, fill
from gemma4cli.kernels import cpu_elementwise
from gemma4cli.kernels.cpu_attention import attention
from gemma4cli.kernels.cpu_linear import embedding, linear, linear_float
from gemma4cli.kernels.quantized_matmul.format import NotPackable, WeightFormat
from gemma4cli.model.config import Gemma4Config, LayerConfig
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from gemma4cli.model.rope import RotaryEmbedding
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.pack import packed_format

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class CpuSignature:
    """What a CPU program depends on apart from its context.

    Attributes:
        formats: how every matrix is stored, by its canonical name; None for float32. `lm_head.weight` only when it is
            not the embedding.
        embed_scale: what embeddings are multiplied by: sqrt(hidden_size), rounded as in `model.layers.ScaledEmbedding`.
    """

    config: Gemma4Config
    formats: Mapping[str, WeightFormat | None]
    embed_scale: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CpuSignature:
        """Read the formats from a checkpoint. A matrix that no packed format holds exactly becomes float32."""
        config = checkpoint.config
        names = [n for n in checkpoint.names() if n in (EMBEDDING, LM_HEAD) or n.endswith("_proj.weight")]
        formats = {name: _format_of(checkpoint.tensor(name), name) for name in names}
        dtype = checkpoint.tensor(EMBEDDING).dtype
        embed_scale = torch.tensor(config.hidden_size**0.5, device="cpu").to(dtype)
        return cls(config, formats, float(embed_scale))


def _format_of(tensor: Tensor, name: str) -> WeightFormat | None:
    try:
        return packed_format(tensor, name)
    except NotPackable:
        return None


class CpuMatrix(PackedMatrix):
    """A packed weight [N, K]: ``forward(x [1, T, K]) -> [1, T, N]``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.codes, self.high, self.sub, self.step)

    def rows_of(self, tokens: Tensor, factor: float) -> Tensor:
        """Return the rows ``tokens [1, T]`` times `factor`: [1, T, K]."""
        return embedding(tokens, self.codes, self.high, self.sub, self.step, factor)


class FloatMatrix(nn.Module):
    """A float32 weight [N, K], used like ``CpuMatrix``."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return linear_float(x, self.weight)

    def rows_of(self, tokens: Tensor, factor: float) -> Tensor:
        return F.embedding(tokens, self.weight) * factor


def _matrix(fmt: WeightFormat | None, rows: int, columns: int) -> CpuMatrix | FloatMatrix:
    return FloatMatrix(rows, columns) if fmt is None else CpuMatrix(fmt, rows, columns)


class CpuNorm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return cpu_elementwise.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return (residual + norm of x) * scale."""
        return cpu_elementwise.norm_add(x, self.weight, self.eps, residual, scale)


class CpuAttention(nn.Module):
    """`model.layers.Attention` in the CPU's operators."""

    def __init__(self, signature: CpuSignature, prefix: str, layer: LayerConfig, cache: CacheSpec) -> None:
        super().__init__()
        config = signature.config
        self.heads, self.kv_heads = config.num_attention_heads, layer.num_key_value_heads
        self.window, self.eps = layer.window, config.rms_norm_eps

        def projection(name: str, rows: int, columns: int) -> CpuMatrix | FloatMatrix:
            return _matrix(signature.formats[f"{prefix}.{name}.weight"], rows, columns)

        q_rows, kv_rows = self.heads * layer.head_dim, self.kv_heads * layer.head_dim
        self.q_proj = projection("q_proj", q_rows, config.hidden_size)
        self.k_proj = projection("k_proj", kv_rows, config.hidden_size)
        self.v_proj = None if layer.k_eq_v else projection("v_proj", kv_rows, config.hidden_size)
        self.o_proj = projection("o_proj", config.hidden_size, q_rows)
        self.q_norm = CpuNorm(layer.head_dim, self.eps)
        self.k_norm = CpuNorm(layer.head_dim, self.eps)
        self.kv_cache = KVCache(layer, cache)

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, hidden] to the same."""
        raw_k = self.k_proj(x)
        raw_v = raw_k if self.v_proj is None else self.v_proj(x)
        q = cpu_elementwise.head_rope(self.q_proj(x), self.q_norm.weight, self.eps, cos, sin, self.heads)
        k = cpu_elementwise.head_rope(raw_k, self.k_norm.weight, self.eps, cos, sin, self.kv_heads)
        v = cpu_elementwise.head_rope(raw_v, None, self.eps, None, None, self.kv_heads)
        keys, values = self.kv_cache.update(input_pos, k, v)
        return self.o_proj(attention(q, keys, values, input_pos, self.window).flatten(2))


class CpuMLP(nn.Module):
    """`model.layers.MLP` in the CPU's operators."""

    def __init__(self, signature: CpuSignature, prefix: str) -> None:
        super().__init__()
        hidden, width = signature.config.hidden_size, signature.config.intermediate_size
        self.gate_proj = _matrix(signature.formats[f"{prefix}.gate_proj.weight"], width, hidden)
        self.up_proj = _matrix(signature.formats[f"{prefix}.up_proj.weight"], width, hidden)
        self.down_proj = _matrix(signature.formats[f"{prefix}.down_proj.weight"], hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(cpu_elementwise.gelu_mul(self.gate_proj(x), self.up_proj(x)))


class CpuLayer(nn.Module):
    """`model.layers.DecoderLayer` in the CPU's operators."""

    layer_scalar: Tensor

    def __init__(self, signature: CpuSignature, index: int, layer: LayerConfig, cache: CacheSpec) -> None:
        super().__init__()
        config, prefix = signature.config, f"model.layers.{index}"
        self.kind = layer.kind
        self.self_attn = CpuAttention(signature, f"{prefix}.self_attn", layer, cache)
        self.mlp = CpuMLP(signature, f"{prefix}.mlp")
        self.input_layernorm = CpuNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CpuNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = CpuNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = CpuNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.empty(1))

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), input_pos, cos, sin)
        x = self.post_attention_layernorm.add(mixed, x)
        made = self.mlp(self.pre_feedforward_layernorm(x))
        return self.post_feedforward_layernorm.add(made, x, self.layer_scalar)


class CpuModel(nn.Module):
    """`model.gemma4.Gemma4` in the CPU's operators: the same arguments and results, float32 throughout."""

    def __init__(self, signature: CpuSignature, cache: CacheSpec) -> None:
        super().__init__()
        config = signature.config
        cache.check(config)
        self.config, self.signature, self.cache = config, signature, cache
        layers = [config.layer(index) for index in range(config.num_hidden_layers)]
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = _matrix(signature.formats[EMBEDDING], *shape)
        self.lm_head = _matrix(signature.formats[LM_HEAD], *shape) if LM_HEAD in signature.formats else None
        self.rotary_emb = nn.ModuleDict({layer.kind: RotaryEmbedding(layer) for layer in layers})
        self.layers = nn.ModuleList(CpuLayer(signature, index, layer, cache) for index, layer in enumerate(layers))
        self.norm = CpuNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, input_pos: Tensor, last_only: bool = True) -> Tensor:
        angles = {kind: rotary(input_pos) for kind, rotary in self.rotary_emb.items()}
        x = self.embed_tokens.rows_of(tokens, self.signature.embed_scale)
        for layer in self.layers:
            x = layer(x, input_pos, *angles[layer.kind])
        if last_only:
            x = x[:, -1:]
        logits = (self.lm_head or self.embed_tokens)(self.norm(x))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cpu_elementwise.softcap(logits, cap)

    def place_of(self, name: str) -> tuple[nn.Module, str]:
        """See ``PackedModel``."""
        path, _, leaf = name.removeprefix("model.").rpartition(".")
        place = self.get_submodule(path)
        return place, "0" if isinstance(place, PackedMatrix) else leaf


def build_cpu_model(
    reader: Checkpoint, context_length: int, prefill_chunk: int, progress: Progress = SILENT
) -> CpuModel:
    """Build the eager model that the CPU backend exports, with its weights. Its caches are float32."""
    cache = CacheSpec(context_length, prefill_chunk, torch.float32)
    return fill(CpuModel(CpuSignature.of(reader), cache), reader, progress).eval().requires_grad_(False)
