"""The network as it is trained: Gemma 4's dense text architecture in plain PyTorch, sized for a demo.

Sliding layers attend within blocks of one window and the block before, which is exact and linear in the row length.
`hf_state_dict` and `HF_CONFIG` give the checkpoint in Hugging Face's own names and schema.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.build_tokenizer import SPECIAL, VOCAB_SIZE

HIDDEN = 256
INTERMEDIATE = 256
LAYERS = 12
HEADS = 8
WINDOW = 64
CONTEXT = 8192
SOFTCAP = 30.0
EPS = 1e-6
LAYER_TYPES = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(LAYERS)]
PAD, EOS, BOS = 0, 1, 2
STOP_IDS = [EOS, SPECIAL.index("<turn|>"), SPECIAL.index("<|tool_response>")]

HF_CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "pad_token_id": PAD,
    "eos_token_id": STOP_IDS[:2],
    "text_config": {
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": WINDOW,
        "layer_types": LAYER_TYPES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": EPS,
        "final_logit_softcapping": SOFTCAP,
        "max_position_embeddings": CONTEXT,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    },
}
GENERATION_CONFIG = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": STOP_IDS,
    "pad_token_id": PAD,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight, in float32."""

    def __init__(self, size: int, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), init))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, EPS)


class Attention(nn.Module):
    """Grouped-query attention with normed q, k and v, unit scale; full layers take v from the raw key projection."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.full = kind == "full_attention"
        self.dim, self.kv_heads = (64, 2) if self.full else (32, 4)
        self.q_proj = nn.Linear(HIDDEN, HEADS * self.dim, bias=False)
        self.k_proj = nn.Linear(HIDDEN, self.kv_heads * self.dim, bias=False)
        if not self.full:
            self.v_proj = nn.Linear(HIDDEN, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(HEADS * self.dim, HIDDEN, bias=False)
        self.q_norm = RMSNorm(self.dim, init=self.dim**-0.25)
        self.k_norm = RMSNorm(self.dim, init=self.dim**-0.25)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, HEADS, self.dim)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.dim)
        v = k if self.full else self.v_proj(x).view(rows, length, self.kv_heads, self.dim)
        v = F.rms_norm(v.float(), (self.dim,), None, EPS).to(k.dtype)
        q, k = (rotate(norm(t), cos, sin).to(t.dtype) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        group = HEADS // self.kv_heads
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        if self.full:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0)
        else:
            y = _attend_in_blocks(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, HEADS * self.dim))


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Sliding attention: each block of WINDOW queries sees its own keys and those of the block before, as masked."""
    rows, heads, length, dim = q.shape
    blocks = length // WINDOW

    def fold(t: Tensor) -> Tensor:  # [rows, heads, length, dim] -> [rows * blocks, heads, WINDOW, dim]
        return t.view(rows, heads, blocks, WINDOW, dim).transpose(1, 2).reshape(rows * blocks, heads, WINDOW, dim)

    def with_previous(t: Tensor) -> Tensor:
        previous = F.pad(t, (0, 0, WINDOW, 0))[:, :, :length]
        return torch.cat([fold(previous), fold(t)], dim=2)

    y = F.scaled_dot_product_attention(fold(q), with_previous(k), with_previous(v), attn_mask=mask, scale=1.0)
    return y.view(rows, blocks, heads, WINDOW, dim).transpose(1, 2).reshape(rows, heads, length, dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D]: dimension i is paired with i + D/2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def rope_tables(length: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin [T, 1, D] per layer type; on full layers only the first quarter of the frequencies is not zero."""
    tables = {}
    for kind, dim, theta, rotated in (("sliding_attention", 32, 1e4, 16), ("full_attention", 64, 1e6, 8)):
        inverse = theta ** (-torch.arange(dim // 2, device=device, dtype=torch.float32) * 2 / dim)
        inverse[rotated:] = 0.0
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        tables[kind] = (angles.cos(), angles.sin())
    return tables


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(LAYER_TYPES[index])
        self.mlp = MLP()
        self.input_layernorm = RMSNorm(HIDDEN)
        self.post_attention_layernorm = RMSNorm(HIDDEN, init=0.5)
        self.pre_feedforward_layernorm = RMSNorm(HIDDEN)
        self.post_feedforward_layernorm = RMSNorm(HIDDEN, init=0.5)
        self.layer_scalar = nn.Parameter(torch.tensor([0.875 + 0.03125 * (index * 5 % 7)]))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


class Network(nn.Module):
    """Tokens [B, T], T a multiple of the window, to final hidden states [B, T, HIDDEN]; `logits` is the tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=HIDDEN**-0.5 if name.startswith("embed") else 0.7 * HIDDEN**-0.5)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """`documents` [B, T] numbers the chats packed in a row; without it a row is one chat."""
        rows, length = tokens.shape
        tables = rope_tables(length, tokens.device)
        masks = {
            "sliding_attention": _block_mask(rows, length, documents, tokens.device),
            "full_attention": None if documents is None else _document_mask(documents),
        }
        x = self.embed_tokens(tokens) * HIDDEN**0.5
        for layer, kind in zip(self.layers, LAYER_TYPES, strict=True):
            x = layer(x, *tables[kind], masks[kind])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(F.linear(hidden, self.embed_tokens.weight).float() / SOFTCAP)


def _document_mask(documents: Tensor) -> Tensor:
    """[B, 1, T, T] true where a query may look: itself and earlier tokens of its own chat."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def _block_mask(rows: int, length: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """[rows * blocks, 1, WINDOW, 2 * WINDOW]: exactly WINDOW keys including the query's own, within its chat."""
    blocks = length // WINDOW
    query = torch.arange(WINDOW, device=device)[:, None] + WINDOW
    key = torch.arange(2 * WINDOW, device=device)[None]
    mask = ((key <= query) & (key > query - WINDOW)).expand(rows, blocks, WINDOW, 2 * WINDOW).clone()
    mask[:, 0, :, :WINDOW] = False
    if documents is not None:
        here = documents.view(rows, blocks, WINDOW)
        before = F.pad(documents, (WINDOW, 0), value=-1)[:, :length].reshape(rows, blocks, WINDOW)
        mask &= here[..., None] == torch.cat([before, here], dim=-1)[:, :, None]
    return mask.view(rows * blocks, 1, WINDOW, 2 * WINDOW)


def hf_state_dict(network: Network) -> dict[str, Tensor]:
    """The weights under the names of a published Gemma 4 checkpoint, in bfloat16."""
    return {
        f"model.language_model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in network.named_parameters()
    }
