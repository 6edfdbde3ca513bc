"""What `config.json` says about a Gemma 4 text model, read strictly.

Every key of a Gemma 4 `config.json` is in one of four tables below: a field of `Gemma4Config`, a value that must be
what we compute, a key that does not change the text model's computation, or a key of the two schemas in which full
attention layers get their own head shape:

    original   "global_head_dim": 512, "num_global_key_value_heads": 4           (published checkpoints)
    re-saved   "per_layer_config": {"05": {"head_dim": 512, "num_key_value_heads": 4}, ...}   (transformers >= 5.20)

A key in none of the tables is refused by name, because dropping it would change the model without a word.
Source: transformers 5.23 `configuration_gemma4.py`, whose names are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json

SLIDING = "sliding_attention"
FULL = "full_attention"
LayerKind = Literal["sliding_attention", "full_attention"]

_MODEL_TYPES = ("gemma4", "gemma4_text")

# Values that change the computation and of which we implement one. `required` ones must be in the file: their default
# in transformers differs from ours, or a checkpoint writer always writes them.
_REQUIRED_VALUES: dict[str, tuple[Any, str]] = {
    "hidden_activation": ("gelu_pytorch_tanh", "another activation"),
    "hidden_size_per_layer_input": (0, "per-layer embeddings (PLE)"),
    "num_kv_shared_layers": (0, "layers that share keys and values"),
    "enable_moe_block": (False, "mixture of experts"),
    "use_double_wide_mlp": (False, "a double-wide MLP"),
    "attention_bias": (False, "biases in the attention projections"),
}
_OPTIONAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_experts": ((None, 0), "mixture of experts"),
    "top_k_experts": ((None, 0), "mixture of experts"),
    "moe_intermediate_size": ((None, 0), "mixture of experts"),
    "expert_intermediate_size": ((None, 0), "mixture of experts"),
    # "vision" makes image tokens attend both ways; a text model has none.
    "use_bidirectional_attention": ((None, "vision"), "attention to later tokens"),
    "rope_scaling": ((None,), "scaled RoPE"),
    "attn_logit_softcapping": ((None,), "soft-capped attention scores"),
    "is_encoder_decoder": ((False,), "an encoder"),
}
# Keys that leave the text model's forward pass as it is, with the reason.
_IGNORED: dict[str, str] = {
    "_name_or_path": "where the config came from",
    "architectures": "the class name; model_type decides",
    "attention_dropout": "training only",
    "bos_token_id": "generation_config.json decides",
    "chunk_size_feed_forward": "a memory trade-off with the same result",
    "dtype": "safetensors carry their own dtype",
    "eos_token_id": "generation_config.json decides",
    "id2label": "classification only",
    "initializer_range": "training only",
    "label2id": "classification only",
    "output_attentions": "what transformers returns",
    "output_hidden_states": "what transformers returns",
    "pad_token_id": "one sequence at a time needs no padding",
    "problem_type": "classification only",
    "return_dict": "what transformers returns",
    "torch_dtype": "the older name of dtype",
    "transformers_version": "who wrote the file",
    "use_cache": "we always have a cache",
    "vocab_size_per_layer_input": "size of the per-layer embeddings, which are off",
}
_IGNORED_BESIDE_TEXT: dict[str, str] = {
    "audio_config": "the audio tower is skipped",
    "audio_token_id": "audio only",
    "boa_token_id": "audio only",
    "boi_token_id": "images only",
    "eoa_token_id": "audio only",
    "eoa_token_index": "audio only",
    "eoi_token_id": "images only",
    "image_token_id": "images only",
    "video_token_id": "video only",
    "vision_config": "the vision tower is skipped",
    "vision_soft_tokens_per_image": "images only",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
)
_OTHER_FIELDS = (
    "attention_k_eq_v",
    "final_logit_softcapping",
    "layer_types",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
_HEAD_SCHEMAS = ("global_head_dim", "num_global_key_value_heads", "per_layer_config")
_ROPE_TYPES = {SLIDING: "default", FULL: "proportional"}


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer's shape. `window` is 0 for full attention; `k_eq_v` means there is no v_proj."""

    kind: LayerKind
    head_dim: int
    num_key_value_heads: int
    k_eq_v: bool
    rope_theta: float
    partial_rotary_factor: float
    window: int


@dataclass(frozen=True)
class Gemma4Config:
    """A dense Gemma 4 text model. Field names are the keys of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    max_position_embeddings: int
    layer_types: tuple[LayerKind, ...]
    attention_k_eq_v: bool
    sliding_rope_theta: float
    full_rope_theta: float
    full_partial_rotary_factor: float
    rms_norm_eps: float
    final_logit_softcapping: float | None
    tie_word_embeddings: bool

    @classmethod
    def from_dir(cls, path: Path) -> Gemma4Config:
        """Read `config.json` of a checkpoint folder.

        Raises: G4Error naming the file and the key or value that is missing, unknown or contradictory.
        """
        file = path / "config.json"
        try:
            return cls.from_json(read_json(file))
        except G4Error as error:
            if str(file) in error.message:
                raise
            raise G4Error(f"{file}: {error.message}", hint=error.hint) from None

    @classmethod
    def from_json(cls, document: Any) -> Gemma4Config:
        """Read the parsed `config.json`: a text model's own, or a multimodal one with `text_config`."""
        text = _text_section(document)
        _refuse_unknown(
            text, {*_SIZES, *_OTHER_FIELDS, *_HEAD_SCHEMAS, *_REQUIRED_VALUES, *_OPTIONAL_VALUES, *_IGNORED}
        )
        _check_values(text)
        sizes = {key: _size(text, key) for key in _SIZES}
        layer_types = _layer_types(text, sizes["num_hidden_layers"])
        k_eq_v = _boolean(text, "attention_k_eq_v")
        global_head_dim, global_kv_heads = _global_heads(text, layer_types, k_eq_v, sizes)
        sliding_theta, _ = _rope(text, SLIDING)
        full_theta, partial_rotary_factor = _rope(text, FULL)
        config = cls(
            **sizes,
            num_global_key_value_heads=global_kv_heads,
            global_head_dim=global_head_dim,
            layer_types=layer_types,
            attention_k_eq_v=k_eq_v,
            sliding_rope_theta=sliding_theta,
            full_rope_theta=full_theta,
            full_partial_rotary_factor=partial_rotary_factor,
            rms_norm_eps=_positive(text, "rms_norm_eps"),
            final_logit_softcapping=_softcap(text),
            tie_word_embeddings=_boolean(text, "tie_word_embeddings"),
        )
        _check_heads(config)
        return config

    def layer(self, index: int) -> LayerConfig:
        """Return the shape of layer `index`, counted from 0."""
        if self.layer_types[index] == SLIDING:
            return LayerConfig(
                SLIDING,
                self.head_dim,
                self.num_key_value_heads,
                False,
                self.sliding_rope_theta,
                1.0,
                self.sliding_window,
            )
        return LayerConfig(
            FULL,
            self.global_head_dim,
            self.num_global_key_value_heads,
            self.attention_k_eq_v,
            self.full_rope_theta,
            self.full_partial_rotary_factor,
            0,
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of a checkpoint of this model, by name, in the order in which the model uses them.

        `lm_head.weight` is listed only when the embedding is not tied to it. Linears are [out, in].
        """
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            prefix = f"model.layers.{index}."
            shapes |= {prefix + name: shape for name, shape in self._layer_shapes(self.layer(index)).items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
        q_size = self.num_attention_heads * layer.head_dim
        kv_size = layer.num_key_value_heads * layer.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden_size,),
            "self_attn.q_proj.weight": (q_size, self.hidden_size),
            "self_attn.k_proj.weight": (kv_size, self.hidden_size),
            "self_attn.v_proj.weight": (kv_size, self.hidden_size),
            "self_attn.q_norm.weight": (layer.head_dim,),
            "self_attn.k_norm.weight": (layer.head_dim,),
            "self_attn.o_proj.weight": (self.hidden_size, q_size),
            "post_attention_layernorm.weight": (self.hidden_size,),
            "pre_feedforward_layernorm.weight": (self.hidden_size,),
            "mlp.gate_proj.weight": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj.weight": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj.weight": (self.hidden_size, self.intermediate_size),
            "post_feedforward_layernorm.weight": (self.hidden_size,),
            "layer_scalar": (1,),
        }
        if layer.k_eq_v:
            del shapes["self_attn.v_proj.weight"]
        return shapes


def _text_section(document: Any) -> dict[str, Any]:
    """Return the text model's keys: `text_config`, or the document itself when it is a text model's."""
    if not isinstance(document, dict):
        raise G4Error("config.json must hold a JSON object.", hint="Point at the folder of a Gemma 4 checkpoint.")
    model_type = _present(document, "model_type")
    if model_type not in _MODEL_TYPES:
        raise G4Error(
            f'model_type is {model_type!r}; g4 runs "gemma4" and "gemma4_text".',
            hint="Only dense Gemma 4 text models are supported.",
        )
    if "quantization_config" in document:
        raise G4Error(
            "quantization_config: this checkpoint was quantized by another tool, whose format g4 does not read.",
            hint="Pull the original checkpoint and use `g4 quantize`, or a GGUF file and `g4 convert-gguf`.",
        )
    if "text_config" not in document:
        return {key: value for key, value in document.items() if key != "model_type"}
    text = document["text_config"]
    if not isinstance(text, dict):
        raise G4Error("text_config must be a JSON object.")
    if text.get("model_type", "gemma4_text") != "gemma4_text":
        raise G4Error(f'text_config.model_type is {text["model_type"]!r}; g4 runs "gemma4_text".')
    beside = {key: value for key, value in document.items() if key not in ("text_config", "model_type")}
    _refuse_unknown(beside, {*_IGNORED, *_IGNORED_BESIDE_TEXT, *_OPTIONAL_VALUES, "tie_word_embeddings"})
    _check_optional_values(beside)
    return _merge_tie(beside, {key: value for key, value in text.items() if key != "model_type"})


def _merge_tie(beside: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Take `tie_word_embeddings` from whichever level has it; two different answers are refused."""
    key = "tie_word_embeddings"
    if key in beside and key in text and beside[key] != text[key]:
        raise G4Error(f"{key} is {beside[key]} but text_config.{key} is {text[key]}.")
    return {key: beside[key], **text} if key in beside else text


def _refuse_unknown(section: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(section) - known)
    if unknown:
        raise G4Error(
            f"unknown key {', '.join(unknown)}: g4 does not know whether it changes the model.",
            hint="Use a dense Gemma 4 text checkpoint, or update g4.",
        )


def _check_values(text: dict[str, Any]) -> None:
    for key, (value, meaning) in _REQUIRED_VALUES.items():
        found = _present(text, key)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise G4Error(f"{key} is {found!r}: g4 does not implement {meaning}.", hint=f"It runs {key} = {value!r}.")
    _check_optional_values(text)


def _check_optional_values(section: dict[str, Any]) -> None:
    for key, (values, meaning) in _OPTIONAL_VALUES.items():
        if key in section and section[key] not in values:
            raise G4Error(f"{key} is {section[key]!r}: g4 does not implement {meaning}.")


def _present(section: dict[str, Any], key: str) -> Any:
    if key not in section:
        raise G4Error(f"{key} is missing.", hint="The file is incomplete; fetch the checkpoint again.")
    return section[key]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(section: dict[str, Any], key: str) -> int:
    value = _present(section, key)
    if not _is_size(value):
        raise G4Error(f"{key} is {value!r}; it must be a positive whole number.")
    return value


def _positive(section: dict[str, Any], key: str) -> float:
    value = _present(section, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise G4Error(f"{key} is {value!r}; it must be a positive number.")
    return float(value)


def _boolean(section: dict[str, Any], key: str) -> bool:
    value = _present(section, key)
    if not isinstance(value, bool):
        raise G4Error(f"{key} is {value!r}; it must be true or false.")
    return value


def _softcap(text: dict[str, Any]) -> float | None:
    if _present(text, "final_logit_softcapping") is None:
        return None
    return _positive(text, "final_logit_softcapping")


def _layer_types(text: dict[str, Any], num_hidden_layers: int) -> tuple[LayerKind, ...]:
    kinds = _present(text, "layer_types")
    if not isinstance(kinds, list):
        raise G4Error(f"layer_types is {kinds!r}; it must be a list of layer kinds.")
    for index, kind in enumerate(kinds):
        if kind not in (SLIDING, FULL):
            raise G4Error(f'layer_types[{index}] is {kind!r}; g4 runs "{SLIDING}" and "{FULL}".')
    if len(kinds) != num_hidden_layers:
        raise G4Error(f"layer_types has {len(kinds)} entries but num_hidden_layers is {num_hidden_layers}.")
    if kinds[-1] != FULL:
        raise G4Error(f'layer_types ends with "{kinds[-1]}"; the last layer of a Gemma 4 must be "{FULL}".')
    return tuple(kinds)


def _rope(text: dict[str, Any], kind: LayerKind) -> tuple[float, float]:
    """Return (rope_theta, partial_rotary_factor) of a layer kind."""
    by_kind = _present(text, "rope_parameters")
    where = f"rope_parameters.{kind}"
    if not isinstance(by_kind, dict) or not isinstance(by_kind.get(kind), dict):
        raise G4Error(f"{where} is missing.")
    _refuse_unknown({f"rope_parameters.{key}": None for key in by_kind}, {f"rope_parameters.{k}" for k in _ROPE_TYPES})
    parameters = {f"{where}.{key}": value for key, value in by_kind[kind].items()}
    known = ("rope_type", "rope_theta", "partial_rotary_factor", "factor")
    _refuse_unknown(parameters, {f"{where}.{key}" for key in known})
    rope_type = _present(parameters, f"{where}.rope_type")
    if rope_type != _ROPE_TYPES[kind]:
        raise G4Error(f'{where}.rope_type is {rope_type!r}; g4 implements "{_ROPE_TYPES[kind]}" there.')
    if parameters.get(f"{where}.factor", 1.0) != 1.0:
        raise G4Error(f"{where}.factor is {parameters[f'{where}.factor']!r}: g4 does not implement scaled RoPE.")
    theta = _positive(parameters, f"{where}.rope_theta")
    if kind == SLIDING:
        # transformers' default RoPE rotates the whole head whatever this key says.
        if parameters.get(f"{where}.partial_rotary_factor", 1.0) != 1.0:
            raise G4Error(f"{where}.partial_rotary_factor must be 1.0: sliding layers rotate the whole head.")
        return theta, 1.0
    factor = _positive(parameters, f"{where}.partial_rotary_factor")
    if factor > 1.0:
        raise G4Error(f"{where}.partial_rotary_factor is {factor}; it must be at most 1.0.")
    return theta, factor


def _global_heads(
    text: dict[str, Any], layer_types: tuple[LayerKind, ...], k_eq_v: bool, sizes: dict[str, int]
) -> tuple[int, int]:
    """Return (head_dim, num_key_value_heads) of the full attention layers, from either schema or both when equal."""
    original = _original_heads(text, k_eq_v, sizes) if "global_head_dim" in text else None
    if original is None and text.get("num_global_key_value_heads") is not None:
        raise G4Error("global_head_dim is missing although num_global_key_value_heads is there.")
    resaved = _per_layer_heads(text["per_layer_config"], layer_types, sizes) if "per_layer_config" in text else None
    if original and resaved and original != resaved:
        raise G4Error(
            f"per_layer_config gives full attention layers (head_dim, num_key_value_heads) = {resaved}, but "
            f"global_head_dim and num_global_key_value_heads give {original}."
        )
    heads = original or resaved
    if heads is None:
        raise G4Error("global_head_dim is missing, and there is no per_layer_config either.")
    return heads


def _original_heads(text: dict[str, Any], k_eq_v: bool, sizes: dict[str, int]) -> tuple[int, int]:
    head_dim = _size(text, "global_head_dim")
    if text.get("num_global_key_value_heads") is None:
        return head_dim, sizes["num_key_value_heads"]
    kv_heads = _size(text, "num_global_key_value_heads")
    # transformers ignores the key without K=V; a file that says both is not one we can trust.
    if not k_eq_v and kv_heads != sizes["num_key_value_heads"]:
        raise G4Error(f"num_global_key_value_heads is {kv_heads} but attention_k_eq_v is false, which switches it off.")
    return head_dim, kv_heads


def _per_layer_heads(overrides: Any, layer_types: tuple[LayerKind, ...], sizes: dict[str, int]) -> tuple[int, int]:
    """Resolve `per_layer_config`: sliding layers must keep the model's own heads, full layers must all agree."""
    if not isinstance(overrides, dict):
        raise G4Error("per_layer_config must be an object from layer numbers to overrides.")
    by_layer: dict[int, dict[str, Any]] = {}
    for key, values in overrides.items():
        if not key.isdecimal() or int(key) >= len(layer_types) or int(key) in by_layer or not isinstance(values, dict):
            raise G4Error(f"per_layer_config.{key} does not name one of the {len(layer_types)} layers once.")
        where = f"per_layer_config.{key}."
        _refuse_unknown({where + name: 0 for name in values}, {where + "head_dim", where + "num_key_value_heads"})
        by_layer[int(key)] = {name: _size({where + name: value}, where + name) for name, value in values.items()}
    base = {"head_dim": sizes["head_dim"], "num_key_value_heads": sizes["num_key_value_heads"]}
    resolved = [tuple((base | by_layer.get(index, {})).values()) for index in range(len(layer_types))]
    expected = {SLIDING: tuple(base.values()), FULL: resolved[-1]}
    for index, kind in enumerate(layer_types):
        if resolved[index] != expected[kind]:
            raise G4Error(
                f"per_layer_config gives layer {index} ({kind}) (head_dim, num_key_value_heads) = {resolved[index]}, "
                f"but other layers of its kind have {expected[kind]}."
            )
    return resolved[-1][0], resolved[-1][1]


def _check_heads(config: Gemma4Config) -> None:
    for kv_key in ("num_key_value_heads", "num_global_key_value_heads"):
        kv_heads = getattr(config, kv_key)
        if config.num_attention_heads % kv_heads:
            raise G4Error(f"num_attention_heads {config.num_attention_heads} is not a multiple of {kv_key} {kv_heads}.")
    for dim_key in ("head_dim", "global_head_dim"):
        if getattr(config, dim_key) % 2:
            raise G4Error(f"{dim_key} is {getattr(config, dim_key)}; RoPE needs an even number.")
