"""The whole model as the CUDA backend computes it, built from a signature and filled from a checkpoint.

The signature is everything the compiled program depends on: shapes, weight formats, context, KV format. Never the
weights: two checkpoints with one signature share one program.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.layers import KV_FORMATS, CudaAttention, CudaMatrix, CudaMLP, TurboQuant
from gemma4cli.kernels.quantized_matmul import Int8Rows
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.kernels.residual_norm import residual_norm
from gemma4cli.kernels.rope_angles import rope_angles
from gemma4cli.model.config import Gemma4Config, LayerConfig
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.layers import RMSNorm
from gemma4cli.model.rope import RotaryEmbedding
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.pack import packed_format

_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Signature:
    """What a CUDA program is compiled for, apart from the GPU.

    Attributes:
        formats: the packed format of every matrix by its canonical name; `lm_head.weight` only when it is not the
            embedding.
        kv_format: one of layers.KV_FORMATS.
    """

    config: Gemma4Config
    formats: Mapping[str, WeightFormat]
    cache: CacheSpec
    kv_format: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, cache: CacheSpec, kv_format: str) -> Signature:
        """Read the formats from a checkpoint; one row of every matrix is looked at."""
        if kv_format not in KV_FORMATS:
            raise G4Error(f"Unknown KV format {kv_format!r}.", hint=f"Choose from {', '.join(KV_FORMATS)}.")
        matrices = [
            name for name in checkpoint.names() if name in (_EMBEDDING, _LM_HEAD) or name.endswith("_proj.weight")
        ]
        formats = {name: packed_format(checkpoint.tensor(name), name) for name in matrices}
        for name, fmt in formats.items():
            if fmt.bits == 8 and fmt.has_min:
                raise G4Error(
                    f"{name} has 8-bit codes with a zero point, which the GPU kernels do not have.",
                    hint="Use a symmetric 8-bit rule in the recipe.",
                )
        return cls(checkpoint.config, formats, cache, kv_format)

    def to_json(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "formats": {name: [f.bits, f.group_size, f.has_min] for name, f in sorted(self.formats.items())},
            "context_length": self.cache.context_length,
            "prefill_chunk": self.cache.prefill_chunk,
            "dtype": str(self.cache.dtype).removeprefix("torch."),
            "kv_format": self.kv_format,
        }

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the name under which a program is cached."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


class CudaLayer(nn.Module):
    """``model.layers.DecoderLayer`` on packed weights, tokens first: x [T, hidden]."""

    layer_scalar: Tensor

    def __init__(
        self, signature: Signature, index: int, layer: LayerConfig, quantizer: TurboQuant | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config, prefix = signature.config, f"model.layers.{index}."
        own = {n.removeprefix(prefix): f for n, f in signature.formats.items() if n.startswith(prefix)}
        formats = {name.split(".")[1]: fmt for name, fmt in own.items()}
        self.kind = layer.kind
        self.self_attn = CudaAttention(config, layer, formats, signature.cache, signature.kv_format, quantizer)
        self.mlp = CudaMLP(config, formats)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.empty(1, dtype=dtype))

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), input_pos, cos, sin))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar

    def decode(
        self, x: Tensor, rows: Int8Rows, input_pos: Tensor, cos: Tensor, sin: Tensor, next_norm: RMSNorm
    ) -> tuple[Tensor, Int8Rows]:
        """``forward`` of one token in few launches.

        Args: x: [1, hidden]; rows: its `input_layernorm`, int8; next_norm: what reads this layer's output.
        Returns: the output [1, hidden] and its `next_norm`, int8.
        """
        mixed = self.self_attn.decode(rows, input_pos, cos, sin)
        x, rows = _residual_norm(x, mixed, self.post_attention_layernorm, None, self.pre_feedforward_layernorm)
        made = self.mlp.decode(rows)
        return _residual_norm(x, made, self.post_feedforward_layernorm, self.layer_scalar, next_norm)


def _residual_norm(
    x: Tensor, branch: Tensor | None, branch_norm: RMSNorm | None, factor: Tensor | None, norm: RMSNorm
) -> tuple[Tensor, Int8Rows]:
    weight = None if branch_norm is None else branch_norm.weight
    return residual_norm(x, branch, weight, factor, norm.weight, norm.eps)


class CudaModel(nn.Module):
    """``model.gemma4.Gemma4`` on packed weights: ``forward(tokens [1, T], input_pos [T]) -> logits [1, 1, V]`` float32.

    Build it under the meta device to compile a program, on any device to run it.
    """

    embed_scale: Tensor

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        config, dtype = signature.config, signature.cache.dtype
        layers = [config.layer(index) for index in range(config.num_hidden_layers)]
        self.config, self.signature, self.dtype = config, signature, dtype
        self.constants = nn.Module()  # not at the root: torch.export mistakes root buffers for arguments
        scale = torch.tensor(config.hidden_size**0.5).to(dtype)
        self.constants.register_buffer("embed_scale", scale.to(torch.get_default_device()))
        self.embed_tokens = CudaMatrix(signature.formats[_EMBEDDING], config.vocab_size, config.hidden_size)
        head = signature.formats.get(_LM_HEAD)
        self.lm_head = CudaMatrix(head, config.vocab_size, config.hidden_size) if head else None
        self.rotary_emb = nn.ModuleDict({layer.kind: RotaryEmbedding(layer) for layer in layers})
        sizes = {size for layer in layers for size in self._quantized_sizes(layer, signature.kv_format)}
        self.turboquant = TurboQuant(sorted(sizes)) if sizes else None
        self.layers = nn.ModuleList(
            CudaLayer(signature, index, layer, self.turboquant, dtype) for index, layer in enumerate(layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @staticmethod
    def _quantized_sizes(layer: LayerConfig, kv_format: str) -> set[int]:
        if layer.kind != "full_attention" or not kv_format.endswith("tq4"):
            return set()
        folded = kv_format.startswith("folded") and layer.k_eq_v
        return {
            layer.head_dim,
            2 * int(layer.partial_rotary_factor * layer.head_dim // 2) if folded else layer.head_dim,
        }

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        angles = {kind: rope_angles(input_pos, rotary.inv_freq) for kind, rotary in self.rotary_emb.items()}
        x = self.embed_tokens.rows_of(tokens[0]).to(self.dtype) * self.constants.embed_scale
        head = self.lm_head or self.embed_tokens
        if tokens.shape[1] == 1:
            logits = head.matvec(self._decode(x, input_pos, angles)).to(torch.float32)
        else:
            for layer in self.layers:
                x = layer(x, input_pos, *angles[layer.kind])
            logits = head.matmul(self.norm(x[-1:])).to(torch.float32)
        cap = self.config.final_logit_softcapping
        return (logits if cap is None else torch.tanh(logits / cap) * cap)[None]

    def _decode(self, x: Tensor, input_pos: Tensor, angles: Mapping[str, tuple[Tensor, Tensor]]) -> Int8Rows:
        """One token through all layers and the last norm; x: [1, hidden]."""
        norms = [layer.input_layernorm for layer in self.layers] + [self.norm]
        x, rows = _residual_norm(x, None, None, None, norms[0])
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            x, rows = layer.decode(x, rows, input_pos, *angles[layer.kind], next_norm)
        return rows

    def place_of(self, name: str) -> tuple[nn.Module, str]:
        """See ``PackedModel``."""
        if name == _EMBEDDING:
            return self.embed_tokens, "0"
        if name == _LM_HEAD:
            assert self.lm_head is not None
            return self.lm_head, "0"
        path = name.removeprefix("model.").removesuffix(".weight")
        parent, leaf = path.rpartition(".")[::2]
        if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            fused = self.get_submodule(f"{parent}.{'qkv_proj' if leaf[0] in 'qkv' else 'gate_up_proj'}")
            matrix, row = fused.place[leaf]
            return fused.matrices[matrix], str(row)
        if leaf in ("o_proj", "down_proj"):
            return self.get_submodule(path), "0"
        return (self.get_submodule(path), "weight") if name.endswith(".weight") else (self.get_submodule(parent), leaf)
