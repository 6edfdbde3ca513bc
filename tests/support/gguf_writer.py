"""Write GGUF files as llama.cpp's converter does, from a checkpoint folder, with the `gguf` package.

`describe` turns a folder into metadata and float tensors; tests change either before `write` puts them into a file.
Types that gguf-py can quantize are quantized by it, Q4_K and Q6_K plainly by us; the others get random codes.
`pack` spells a file out byte by byte, for files that no writer would write.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGUFValueType as Value
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import quantize
from safetensors.torch import load_file

from gemma4cli.model.config import FULL, SLIDING, Gemma4Config
from gemma4cli.quant.gguf.keymap import ROPE_FREQS, gguf_name
from gemma4cli.quant.gguf.reader import GGUFTensor

QUANTIZED_BY_GGUF_PY = (GGML.Q4_0, GGML.Q4_1, GGML.Q5_0, GGML.Q5_1, GGML.Q8_0)
# Byte offsets of the float16 steps in a block.
_STEPS = {
    GGML.Q4_0: (0,), GGML.Q4_1: (0, 2), GGML.Q5_0: (0,), GGML.Q5_1: (0, 2), GGML.Q8_0: (0,), GGML.IQ4_NL: (0,),
    GGML.Q2_K: (80, 82), GGML.Q3_K: (108,), GGML.Q4_K: (0, 2), GGML.Q5_K: (0, 2), GGML.Q6_K: (208,), GGML.IQ4_XS: (0,),
    GGML.IQ1_S: (0,), GGML.IQ2_XXS: (0,), GGML.IQ2_XS: (0,), GGML.IQ2_S: (0,), GGML.IQ3_XXS: (0,), GGML.IQ3_S: (0,),
    GGML.TQ1_0: (52,), GGML.TQ2_0: (64,), GGML.IQ1_M: (), GGML.MXFP4: (),
}  # fmt: skip
# llama.cpp's converter types these as text to be shown.
_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}


@dataclass
class Model:
    """What goes into a file: key -> (value, type, item type of a list), tensor name -> floats or blocks, and type."""

    metadata: dict[str, tuple[Any, Value, Value | None]]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    types: dict[str, GGML] = field(default_factory=dict)

    def set(self, key: str, value: object) -> Model:
        """Change a key's value, keeping its type unless it is a list now."""
        kind, item = self.metadata[key][1:] if key in self.metadata else (Value.UINT32, None)
        if isinstance(value, list):
            kind, item = Value.ARRAY, item or Value.INT32
        elif isinstance(value, str):
            kind, item = Value.STRING, None
        elif kind in (Value.ARRAY, Value.STRING):
            kind, item = (Value.FLOAT32 if isinstance(value, float) else Value.UINT32), None
        self.metadata[key] = (value, kind, item)
        return self

    def without(self, *names: str) -> Model:
        """Remove keys or tensors."""
        for name in names:
            assert self.metadata.pop(name, None) or self.tensors.pop(name, None) is not None
        return self


def describe(folder: Path, kind: GGML = GGML.F32, *, embedding: GGML | None = None, seed: int = 0) -> Model:
    """Read a checkpoint folder; matrices get type `kind`, everything else float32, as llama.cpp writes it.

    Q4_K_M is Q4_K with an embedding in Q6_K (and some v_proj and down_proj, which stay Q4_K here).
    """
    config = Gemma4Config.from_dir(folder)
    model = Model(_config_keys(config) | tokenizer_keys(folder) | _folder_keys(folder))
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    rng = np.random.default_rng(seed)
    for name in config.parameter_shapes():
        stored = weights.get(name)
        stored = weights[name.replace("model.", "model.language_model.", 1)] if stored is None else stored
        values = stored.float().numpy()
        if values.ndim == 2:
            chosen = embedding if embedding is not None and "embed" in name else kind
            model.types[gguf_name(name)] = chosen
            model.tensors[gguf_name(name)] = encode(values, chosen, rng)
        else:
            model.tensors[gguf_name(name)] = values
    pairs = config.global_head_dim // 2
    rotated = int(config.full_partial_rotary_factor * pairs)
    model.tensors[ROPE_FREQS] = np.array([1.0] * rotated + [1e30] * (pairs - rotated), np.float32)
    return model


def encode(values: np.ndarray, kind: GGML, rng: np.random.Generator) -> np.ndarray:
    """Return a matrix in a GGUF type: floats, or uint8 [rows, bytes per row]."""
    if kind in (GGML.F32, GGML.F16):
        return values.astype(np.float32 if kind == GGML.F32 else np.float16)
    if kind == GGML.BF16 or kind in QUANTIZED_BY_GGUF_PY:
        return quantize(values, kind)
    if kind in _K_QUANTIZERS:
        return _K_QUANTIZERS[kind](values)
    return random_blocks(kind, values.shape, rng)


def _super_blocks(values: np.ndarray, group: int) -> np.ndarray:
    """float32 [super-blocks, groups, group]"""
    return values.astype(np.float32).reshape(-1, 256 // group, group)


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.where(by == 0, 0, values / np.where(by == 0, 1, by))


def _q4_k(values: np.ndarray) -> np.ndarray:
    """Min-max Q4_K: a plain quantizer, good enough to keep a model's answers (llama.cpp searches for better scales)."""
    groups = _super_blocks(values, 32)
    minimum = np.maximum(-groups.min(-1), 0)
    scale = (np.maximum(groups.max(-1), 0) + minimum) / 15
    d, dmin = ((level.max(-1, keepdims=True) / 63).astype(np.float16) for level in (scale, minimum))
    sub = np.clip(np.rint(_divide(scale, d.astype(np.float32))), 0, 63).astype(np.uint8)
    sub_min = np.clip(np.rint(_divide(minimum, dmin.astype(np.float32))), 0, 63).astype(np.uint8)
    offset = (dmin.astype(np.float32) * sub_min)[..., None]
    codes = np.clip(np.rint(_divide(groups + offset, (d.astype(np.float32) * sub)[..., None])), 0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    low, high = (sub[:, :4], sub_min[:, :4]), (sub[:, 4:], sub_min[:, 4:])
    packed = [low[i] | ((high[i] >> 4) << 6) for i in (0, 1)] + [(high[0] & 15) | ((high[1] & 15) << 4)]
    quants = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *packed, quants], axis=1).reshape(len(values), -1)


def _q6_k(values: np.ndarray) -> np.ndarray:
    """Symmetric Q6_K, as plainly."""
    groups = _super_blocks(values, 16)
    scale = np.abs(groups).max(-1) / 31
    d = (scale.max(-1, keepdims=True) / 127).astype(np.float16)
    sub = np.clip(np.rint(_divide(scale, d.astype(np.float32))), 0, 127).astype(np.int8)
    steps = (d.astype(np.float32) * sub)[..., None]
    codes = (np.clip(np.rint(_divide(groups, steps)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4], axis=2).reshape(-1, 128)
    high = sum((codes[:, :, part] >> 4) << (2 * part) for part in range(4)).reshape(-1, 64)
    return np.concatenate([low, high, sub.view(np.uint8), d.view(np.uint8)], axis=1).reshape(len(values), -1)


_K_QUANTIZERS = {GGML.Q4_K: _q4_k, GGML.Q6_K: _q6_k}


def random_blocks(kind: GGML, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return random codes and sub-scales with steps of a plausible size, uint8 [rows, bytes per row]."""
    rows, columns = shape
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), dtype=np.uint8)
    for offset in _STEPS[kind]:
        steps = (rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks)) * 2e-4).astype("<f2")
        blocks[:, offset : offset + 2] = steps.view(np.uint8).reshape(-1, 2)
    if kind == GGML.IQ1_M:  # its step's four nibbles are the high ones of four words
        step = np.float16(2e-4).view(np.uint16)
        for word in range(4):
            high = blocks[:, 49 + 2 * word]
            blocks[:, 49 + 2 * word] = high & 15 | np.uint8((step >> (4 * word)) & 15) << 4
    if kind == GGML.MXFP4:
        blocks[:, 0] = rng.integers(112, 118, len(blocks))  # exponents of 2, offset by 127
    return blocks.reshape(rows, -1)


def tensor_of(blocks: np.ndarray, kind: GGML) -> GGUFTensor:
    """Return the tensor of a file that holds nothing else: blocks uint8 [rows, bytes per row], mapped like a file."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (blocks.shape[0], blocks.shape[1] // block_bytes * block_size)
    mapping = mmap.mmap(-1, blocks.nbytes)
    mapping[:] = blocks.tobytes()
    return GGUFTensor("t", shape, kind, 0, blocks.nbytes, SimpleNamespace(mapping=mapping, path=Path("m.gguf")))


def string(text: str | bytes) -> bytes:
    """Return a GGUF string: length and UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """Return one metadata key."""
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: Sequence[int], kind: int, offset: int) -> bytes:
    """Return one tensor's description."""
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return string(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", kind, offset)


def pack(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a whole file; `counts` (tensors, keys) may lie."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def write(path: Path, model: Model) -> Path:
    """Write one file and return its path."""
    _write_part(path, model.metadata, model.tensors, model.types)
    return path


def write_split(path: Path, model: Model, parts: int) -> list[Path]:
    """Write a split model as llama.cpp's gguf-split does: all metadata in the first part, tensors spread."""
    names = list(model.tensors)
    step = math.ceil(len(names) / parts)
    files = []
    for number in range(parts):
        split = {
            "split.no": (number, Value.UINT16, None),
            "split.count": (parts, Value.UINT16, None),
            "split.tensors.count": (len(names), Value.INT32, None),
        }
        file = path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
        tensors = {name: model.tensors[name] for name in names[number * step : (number + 1) * step]}
        _write_part(file, (model.metadata if number == 0 else {}) | split, tensors, model.types)
        files.append(file)
    return files


def _write_part(
    path: Path,
    metadata: dict[str, tuple[Any, Value, Value | None]],
    tensors: dict[str, np.ndarray],
    types: dict[str, GGML],
) -> None:
    writer = GGUFWriter(path, "gemma4")
    writer.kv_data[0].clear()  # it adds general.architecture by itself; tests choose every key
    for key, (value, kind, item) in metadata.items():
        writer.add_key_value(key, value, kind, item)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=types.get(name, GGML.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config_keys(config: Gemma4Config) -> dict[str, tuple[Any, Value, Value | None]]:
    def by_kind(sliding: int, full: int) -> list[int]:
        return [sliding if kind == SLIDING else full for kind in config.layer_types]

    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.global_head_dim,
        "attention.value_length": config.global_head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count": config.global_head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.full_rope_theta,
        "rope.freq_base_swa": config.sliding_rope_theta,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    kv_heads = by_kind(config.num_key_value_heads, config.num_global_key_value_heads)
    pattern = [kind != FULL for kind in config.layer_types]
    return {
        "general.architecture": ("gemma4", Value.STRING, None),
        "general.name": ("Test", Value.STRING, None),
        **{f"gemma4.{key}": (value, Value.UINT32, None) for key, value in numbers.items()},
        **{f"gemma4.{key}": (value, Value.FLOAT32, None) for key, value in floats.items()},
        "gemma4.attention.head_count_kv": (kv_heads, Value.ARRAY, Value.INT32),
        "gemma4.attention.sliding_window_pattern": (pattern, Value.ARRAY, Value.BOOL),
    }


def tokenizer_keys(folder: Path) -> dict[str, tuple[Any, Value, Value | None]]:
    """Return a tokenizer's part of the metadata, from tokenizer.json and tokenizer_config.json."""
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = dict(document["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in document["added_tokens"] if token["special"]}
    plain = {token["content"] for token in document["added_tokens"]} - special
    types = [_token_type(text, special, plain) for text in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    keys: dict[str, tuple[Any, Value, Value | None]] = {
        "tokenizer.ggml.model": ("gemma4", Value.STRING, None),
        "tokenizer.ggml.tokens": (tokens, Value.ARRAY, Value.STRING),
        "tokenizer.ggml.scores": ([-1000.0] * len(tokens), Value.ARRAY, Value.FLOAT32),
        "tokenizer.ggml.token_type": (types, Value.ARRAY, Value.INT32),
        "tokenizer.ggml.merges": (merges or ["t h"], Value.ARRAY, Value.STRING),
        "tokenizer.ggml.add_space_prefix": (False, Value.BOOL, None),
        "tokenizer.ggml.add_bos_token": (True, Value.BOOL, None),
    }
    for key, name in {
        "bos": "bos",
        "eos": "eos",
        "eot": "eot",
        "unknown": "unk",
        "padding": "pad",
        "mask": "mask",
    }.items():
        if f"{name}_token" in named:
            keys[f"tokenizer.ggml.{key}_token_id"] = (ids[named[f"{name}_token"]], Value.UINT32, None)
    return keys


def _token_type(text: str, special: set[str], plain: set[str]) -> int:
    if text == "<eos>":
        return TokenType.NORMAL  # as in published files
    if text in _SHOWN or text in plain:
        return TokenType.USER_DEFINED
    if text in special:
        return TokenType.CONTROL
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def _folder_keys(folder: Path) -> dict[str, tuple[Any, Value, Value | None]]:
    keys: dict[str, tuple[Any, Value, Value | None]] = {}
    template = folder / "chat_template.jinja"
    if template.is_file():
        keys["tokenizer.chat_template"] = (template.read_text(encoding="utf-8"), Value.STRING, None)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    for name, key in _SAMPLING.items():
        if name in generation:
            kind = Value.INT32 if name == "top_k" else Value.FLOAT32
            keys[f"general.sampling.{key}"] = (generation[name], kind, None)
    return keys
