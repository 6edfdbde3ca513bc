"""Random Gemma 4 checkpoints of a few hundred kilobytes with every feature of the 31B switched on.

Two blocks of five sliding layers and one full layer, K=V, grouped queries, another head size and KV head count in full
layers, partial RoPE, a window of 8, a soft cap, norm weights and layer scalars away from 1, tied embeddings. Every
linear's in_features is a multiple of 32, so that groups of 32 divide it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from gemma4cli.model.config import FULL, Gemma4Config

STOP_IDS = (1, 6)
BOS_ID = 2
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
                  "<|think|>")  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n{{ message['content'] }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def tiny_text_config(schema: str = "original", **overrides: Any) -> dict[str, Any]:
    """Return a text model's config.json (model_type gemma4_text); `overrides` replace or add keys."""
    text: dict[str, Any] = {
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": BOS_ID,
        "dtype": "float32",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": 160,
        "vocab_size_per_layer_input": 160,
    }
    text |= overrides
    if schema == "per_layer":
        heads = {"head_dim": text.pop("global_head_dim")}
        if (kv_heads := text.pop("num_global_key_value_heads")) is not None:
            heads["num_key_value_heads"] = kv_heads
        digits = len(str(text["num_hidden_layers"] - 1))
        full_layers = [i for i, kind in enumerate(text["layer_types"]) if kind == FULL]
        text["per_layer_config"] = {f"{index:0{digits}d}": dict(heads) for index in full_layers}
    return text


def tiny_config_dict(schema: str = "original", **overrides: Any) -> dict[str, Any]:
    """Return a published checkpoint's config.json: multimodal on the outside, our text model in `text_config`."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "boi_token_id": 255_999,
        "dtype": "float32",
        "eos_token_id": list(STOP_IDS),
        "image_token_id": 258_880,
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": tiny_text_config(schema, **overrides),
        "tie_word_embeddings": overrides.get("tie_word_embeddings", True),
        "transformers_version": "5.23.0",
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 32},
    }


def tiny_config(**overrides: Any) -> Gemma4Config:
    """Return the parsed tiny config."""
    return Gemma4Config.from_json(tiny_config_dict(**overrides))


def random_weights(config: Gemma4Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return every tensor of the model by our names: activations near 1, logits spread, nothing near identity."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        if name.endswith("layer_scalar"):
            tensor = torch.empty(shape).uniform_(0.6, 1.1, generator=generator)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            # Scores have scale 1: larger weights make attention so peaked that rounding errors grow a thousandfold.
            tensor = torch.empty(shape).uniform_(0.3, 0.9, generator=generator)
        elif name.endswith("norm.weight"):
            tensor = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        else:
            tensor = torch.randn(shape, generator=generator) * (0.3 if "embed" in name else shape[-1] ** -0.5)
        weights[name] = tensor.to(dtype)
    return weights


def write_checkpoint(
    directory: Path,
    seed: int = 0,
    *,
    shards: int = 1,
    schema: str = "original",
    dtype: torch.dtype = torch.float32,
    vision: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint folder as Hugging Face publishes one and return it.

    Weights are named `model.language_model.*`; with `vision` a tensor of a vision tower lies beside them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = tiny_config_dict(schema, **overrides)
    weights = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in random_weights(Gemma4Config.from_json(document), seed, dtype).items()
    }
    if vision:
        weights["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(4, 4, dtype=dtype)
    _write_json(directory / "config.json", document)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS_ID, "do_sample": True, "eos_token_id": list(STOP_IDS), "pad_token_id": 0,
         "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    )  # fmt: skip
    write_shards(directory, weights, shards)
    tiny_tokenizer(document["text_config"]["vocab_size"]).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def write_shards(directory: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or `shards` files and their index."""
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of exactly `vocab_size` entries: special tokens, printable ASCII, then unused pieces."""
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    pieces = [*SPECIAL_TOKENS, *characters]
    pieces += [f"<unused{index}>" for index in range(vocab_size - len(pieces))]
    vocabulary = {piece: index for index, piece in enumerate(pieces[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
