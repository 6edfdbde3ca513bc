"""GGUF metadata -> `config.json` and `generation_config.json`, strictly.

Every `gemma4.*` key is in one of three tables: read into the config, required to have the value that we compute, or
without effect. A missing key, an unknown one, a wrong type or two that contradict each other is refused by name. What
metadata does not say is read off the tensors: K=V (full layers have no attn_v), tied embeddings (no output.weight), and
the rotated share of full heads (rope_freqs.weight, which must be the pattern of Gemma 4's proportional RoPE).

Source: llama.cpp conversion/gemma.py (Gemma4Model) for the keys; transformers 5.23 for the config's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.errors import G4Error
from gemma4cli.model.config import FULL, SLIDING
from gemma4cli.quant.gguf.keymap import OUTPUT, ROPE_FREQS
from gemma4cli.quant.gguf.reader import GGUF, Value
from gemma4cli.quant.gguf.tokenizer import Vocabulary

ARCHITECTURE = "gemma4"
PARTIAL_ROTARY_FACTOR = 0.25
# Gemma 4's published defaults, for files made before converters copied them.
DEFAULT_SAMPLING: dict[str, float] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
_SAMPLING_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}
# llama.cpp ends an answer on these whatever the file's eos key says; the published generation_config has the same ids.
_STOP_TEXTS = ("<eos>", "<turn|>", "<|tool_response>")
_UNSCALED = np.float32(1.0)
_NOT_ROTATED = np.float32(1e30)

_FIXED_VALUES: dict[str, tuple[Any, str]] = {
    "attention.shared_kv_layers": (0, "layers that share keys and values"),
    "embedding_length_per_layer_input": (0, "per-layer embeddings (PLE)"),
    "expert_count": (0, "mixture of experts"),
    "expert_used_count": (0, "mixture of experts"),
    "expert_feed_forward_length": (0, "mixture of experts"),
    "rope.scaling.type": ("none", "scaled RoPE"),
    "attention.causal": (True, "attention to later tokens"),
}
_REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "global_head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_REQUIRED_OTHER = (
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attention.value_length_swa",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.freq_base",
    "rope.freq_base_swa",
)
# Two keys that must agree, because the model has one size for both.
_EQUAL = (
    ("attention.value_length", "attention.key_length"),
    ("attention.value_length_swa", "attention.key_length_swa"),
    ("rope.dimension_count", "attention.key_length"),
    ("rope.dimension_count_swa", "attention.key_length_swa"),
)


def read_config(gguf: GGUF, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the model's `config.json` in the published (original) schema.

    Raises: G4Error naming the key, or the tensor that contradicts it.
    """
    keys = _Keys(gguf)
    keys.check_architecture()
    sizes = {name: keys.size(key) for key, name in _REQUIRED.items()}
    for left, right in _EQUAL:
        keys.require_equal(left, right)
    if "vocab_size" in keys and keys.size("vocab_size") != len(vocabulary.tokens):
        raise keys.contradiction("vocab_size", f"the tokenizer has {len(vocabulary.tokens)} tokens")
    layer_types = _layer_types(keys, sizes["num_hidden_layers"])
    kv_heads = _kv_heads(keys, layer_types)
    check_rope_freqs(gguf, sizes["global_head_dim"])
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **sizes,
        "vocab_size": len(vocabulary.tokens),
        "num_key_value_heads": kv_heads[SLIDING],
        "num_global_key_value_heads": kv_heads[FULL],
        "attention_k_eq_v": _k_eq_v(gguf, layer_types),
        "layer_types": layer_types,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": keys.number("final_logit_softcapping"),
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa")},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base"),
                "partial_rotary_factor": PARTIAL_ROTARY_FACTOR,
            },
        },
        "tie_word_embeddings": OUTPUT not in gguf.tensors,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }


def read_generation_config(gguf: GGUF, vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """Return `generation_config.json`, and whether its sampling settings are the file's own (else Gemma 4's)."""
    stop_ids = [vocabulary.ids[text] for text in _STOP_TEXTS if text in vocabulary.ids]
    stop_ids += [vocabulary.named[name] for name in ("eos", "eot", "eom") if name in vocabulary.named]
    document: dict[str, Any] = {
        "bos_token_id": vocabulary.named["bos"],
        "eos_token_id": list(dict.fromkeys(stop_ids)),
    }
    if "pad" in vocabulary.named:
        document["pad_token_id"] = vocabulary.named["pad"]
    found = {name: gguf.metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING_KEYS.items()}
    given = {name: _sampling_value(gguf, name, value) for name, value in found.items() if value is not None}
    return {**document, "do_sample": True, **(given or DEFAULT_SAMPLING)}, bool(given)


def _sampling_value(gguf: GGUF, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise G4Error(f"{gguf.paths[0]}: general.sampling.{_SAMPLING_KEYS[name]} is {value!r}; it must be a number.")
    return value if isinstance(value, int) else _shortest(value)


def chat_template(gguf: GGUF) -> str | None:
    """Return the chat template as text; nothing here runs it."""
    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise G4Error(f"{gguf.paths[0]}: tokenizer.chat_template is not text.")
    return template


def check_rope_freqs(gguf: GGUF, global_head_dim: int) -> None:
    """Refuse a `rope_freqs.weight` that is not Gemma 4's: 1 for the rotated pairs, 1e30 (no rotation) for the rest."""
    tensor = gguf.tensors.get(ROPE_FREQS)
    pairs = global_head_dim // 2
    if tensor is None:
        raise G4Error(f"{gguf.paths[0]} has no tensor {ROPE_FREQS}.", hint="The file is incomplete; fetch it again.")
    rotated = int(PARTIAL_ROTARY_FACTOR * pairs)
    expected = np.where(np.arange(pairs) < rotated, _UNSCALED, _NOT_ROTATED)
    right = tensor.type == GGML.F32 and tensor.shape == (pairs,)
    if not right or not np.array_equal(tensor.blocks().reshape(-1).view("<f4"), expected):
        raise G4Error(
            f"Tensor {ROPE_FREQS} of {tensor.file.path} is not Gemma 4's ({rotated} ones, then {pairs - rotated} times "
            f"1e30).",
            hint="g4 does not implement scaled RoPE; use the original model's file.",
        )


class _Keys:
    """The `gemma4.*` keys of a file; every access checks presence and type."""

    def __init__(self, gguf: GGUF) -> None:
        self._path = gguf.paths[0]
        self._metadata = gguf.metadata
        self._prefix = f"{ARCHITECTURE}."

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata

    def fail(self, key: str, what: str) -> G4Error:
        return G4Error(f"{self._path}: {self._prefix}{key} {what}.",
                       hint="The metadata is damaged or of another kind of model; fetch the file again.")  # fmt: skip

    def contradiction(self, key: str, other: str) -> G4Error:
        return self.fail(key, f"is {self._metadata[self._prefix + key]!r}, but {other}")

    def check_architecture(self) -> None:
        found = self._metadata.get("general.architecture")
        if found != ARCHITECTURE:
            raise G4Error(f"{self._path} holds a model of architecture {found!r}; g4 runs {ARCHITECTURE!r}.",
                          hint="Only dense Gemma 4 text models are supported.")  # fmt: skip
        for key, (value, meaning) in _FIXED_VALUES.items():
            if key in self and self.get(key) != value:
                raise G4Error(f"{self._path}: {self._prefix}{key} is {self.get(key)!r}: g4 does not implement "
                              f"{meaning}.", hint="Only dense Gemma 4 text models are supported.")  # fmt: skip
        known = {*_REQUIRED, *_REQUIRED_OTHER, *_FIXED_VALUES, "vocab_size"}
        for key in self._metadata:
            if key.startswith(self._prefix) and key.removeprefix(self._prefix) not in known:
                raise G4Error(f"{self._path}: unknown key {key}: g4 does not know whether it changes the model.",
                              hint="Use a dense Gemma 4 text model, or update g4.")  # fmt: skip

    def get(self, key: str) -> Value:
        if key not in self:
            raise self.fail(key, "is missing")
        return self._metadata[self._prefix + key]

    def size(self, key: str) -> int:
        value = self.get(key)
        if not _is_size(value):
            raise self.fail(key, f"is {_brief(value)}; it must be a positive whole number")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.fail(key, f"is {_brief(value)}; it must be a positive number")
        return _shortest(value)

    def require_equal(self, left: str, right: str) -> None:
        if self.size(left) != self.size(right):
            raise self.contradiction(left, f"{self._prefix}{right} is {self.get(right)}")

    def per_layer(self, key: str, count: int, good: Callable[[object], bool], meaning: str) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not all(good(value) for value in values):
            raise self.fail(key, f"is {_brief(values)}; it must be a list of {meaning}")
        if len(values) != count:
            raise self.fail(key, f"has {len(values)} entries, but {self._prefix}block_count is {count}")
        return values


def _layer_types(keys: _Keys, layers: int) -> list[str]:
    pattern = keys.per_layer("attention.sliding_window_pattern", layers, _is_boolean, "true and false")
    return [SLIDING if sliding else FULL for sliding in pattern]


def _kv_heads(keys: _Keys, layer_types: list[str]) -> dict[str, int]:
    """Return KV heads by layer kind from the per-layer list (or one number for all)."""
    key = "attention.head_count_kv"
    if _is_size(keys.get(key)):
        return dict.fromkeys((SLIDING, FULL), keys.get(key))
    counts = keys.per_layer(key, len(layer_types), _is_size, "positive whole numbers")
    by_kind: dict[str, int] = {}
    for index, (kind, count) in enumerate(zip(layer_types, counts, strict=True)):
        if by_kind.setdefault(kind, count) != count:
            raise keys.fail(key, f"gives layer {index} {count} heads, but another {kind} layer {by_kind[kind]}")
    return {kind: by_kind.get(kind, counts[-1]) for kind in (SLIDING, FULL)}


def _k_eq_v(gguf: GGUF, layer_types: list[str]) -> bool:
    """True when full layers have no V projection; all of them must agree."""
    full = [index for index, kind in enumerate(layer_types) if kind == FULL]
    with_v = [index for index in full if f"blk.{index}.attn_v.weight" in gguf.tensors]
    if with_v and len(with_v) != len(full):
        without = next(index for index in full if index not in with_v)
        raise G4Error(f"{gguf.paths[0]} has blk.{with_v[0]}.attn_v.weight but not blk.{without}.attn_v.weight.",
                      hint="The file is incomplete; fetch it again.")  # fmt: skip
    return not with_v


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
