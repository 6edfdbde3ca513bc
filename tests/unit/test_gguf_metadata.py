"""GGUF metadata -> config.json and generation_config.json: the same model, or a sentence naming the key."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.settings import GenerationDefaults
from gemma4cli.quant.gguf.convert import plan_conversion, remarks
from gemma4cli.quant.gguf.keymap import ROPE_FREQS
from gemma4cli.quant.gguf.metadata import chat_template
from gemma4cli.quant.gguf.reader import open_gguf
from tests.support.gguf_writer import Model, describe, write
from tests.support.tiny import write_checkpoint

FULL_LAYER = 5
REQUIRED = [
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.key_length_swa",
    "attention.value_length_swa", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count",
    "rope.dimension_count_swa", "final_logit_softcapping",
]  # fmt: skip
PATTERN = [True] * 5 + [False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("metadata") / "tiny")


@pytest.fixture(scope="module")
def written(folder: Path) -> Model:
    return describe(folder)


@pytest.fixture
def model(written: Model) -> Model:
    return Model(dict(written.metadata), dict(written.tensors), dict(written.types))


def config_of(path: Path, model: Model) -> Gemma4Config:
    return plan_conversion([write(path / "m.gguf", model)]).config


def refuse(path: Path, model: Model, *parts: str) -> None:
    """Expect one sentence with these parts and the file's name."""
    with pytest.raises(G4Error) as error:
        config_of(path, model)
    for part in (*parts, "m.gguf"):
        assert part in error.value.message
    assert error.value.message.count("\n") == 0


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_k_eq_v": False,
                         "num_global_key_value_heads": None}])  # fmt: skip
def test_the_config_is_the_originals(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write_checkpoint(tmp_path / "c", **changes)
    assert config_of(tmp_path, describe(folder)) == Gemma4Config.from_dir(folder)


def test_numbers_are_written_as_people_write_them(tmp_path: Path, model: Model) -> None:
    document = json.loads(plan_conversion([write(tmp_path / "m.gguf", model)]).checkpoint.assets["config.json"])
    assert document["rms_norm_eps"] == 1e-6
    assert document["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert document["global_head_dim"] == 32


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, model: Model, key: str) -> None:
    refuse(tmp_path, model.without(f"gemma4.{key}"), f"gemma4.{key} is missing")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_key_of_another_type_is_named(tmp_path: Path, model: Model, key: str) -> None:
    refuse(tmp_path, model.set(f"gemma4.{key}", "many"), f"gemma4.{key} is 'many'; it must be")


@pytest.mark.parametrize("key", [key for key in REQUIRED if "pattern" not in key])
def test_a_zero_is_no_size(tmp_path: Path, model: Model, key: str) -> None:
    refuse(tmp_path, model.set(f"gemma4.{key}", 0), f"gemma4.{key} is 0")


CONTRADICTIONS = {
    "gemma4.attention.value_length": (64, "gemma4.attention.value_length is 64, but gemma4.attention.key_length is 32"),
    "gemma4.attention.value_length_swa": (64, "is 64, but gemma4.attention.key_length_swa is 16"),
    "gemma4.rope.dimension_count": (8, "gemma4.rope.dimension_count is 8, but gemma4.attention.key_length is 32"),
    "gemma4.rope.dimension_count_swa": (8, "is 8, but gemma4.attention.key_length_swa is 16"),
    "gemma4.block_count": (13, "has 12 entries, but gemma4.block_count is 13"),
    "gemma4.vocab_size": (99, "gemma4.vocab_size is 99, but the tokenizer has 160 tokens"),
    "gemma4.attention.head_count_kv": ([2] * 11, "has 11 entries, but gemma4.block_count is 12"),
    "gemma4.attention.sliding_window_pattern": ([False] * 3, "has 3 entries, but gemma4.block_count is 12"),
    "gemma4.embedding_length": (96, "Tensor token_embd.weight"),
    "gemma4.feed_forward_length": (96, "Tensor blk.0.ffn_gate.weight"),
    "gemma4.attention.head_count": (8, "Tensor blk.0.attn_q.weight"),
    "gemma4.attention.key_length_swa": (32, "gemma4.attention.value_length_swa is 16"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_contradictions_are_named(tmp_path: Path, model: Model, key: str) -> None:
    value, sentence = CONTRADICTIONS[key]
    refuse(tmp_path, model.set(key, value), sentence)


def test_kv_heads_must_agree_within_a_kind(tmp_path: Path, model: Model) -> None:
    heads = [2, 2, 1, 2, 2, 1] * 2
    refuse(tmp_path, model.set("gemma4.attention.head_count_kv", heads),
           "gives layer 2 1 heads, but another sliding_attention layer 2")  # fmt: skip
    bad = model.set("gemma4.attention.head_count_kv", [2, 0] * 6)
    refuse(tmp_path, bad, "gemma4.attention.head_count_kv is [2, 0", "a list of positive whole numbers")


def test_one_number_of_kv_heads_for_all_layers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", num_key_value_heads=2, num_global_key_value_heads=2)
    config = config_of(tmp_path, describe(folder).set("gemma4.attention.head_count_kv", 2))
    assert config == Gemma4Config.from_dir(folder)


def test_the_last_layer_is_full_attention(tmp_path: Path, model: Model) -> None:
    refuse(tmp_path, model.set("gemma4.attention.sliding_window_pattern", [*PATTERN, *PATTERN[:5], True]),
           "gives layer 11 1 heads")  # fmt: skip
    uniform = model.set("gemma4.attention.head_count_kv", 2)
    refuse(tmp_path, uniform, 'layer_types ends with "sliding_attention"')


UNSUPPORTED = {
    "gemma4.attention.shared_kv_layers": (20, "layers that share keys and values"),
    "gemma4.embedding_length_per_layer_input": (256, "per-layer embeddings"),
    "gemma4.expert_count": (128, "mixture of experts"),
    "gemma4.expert_used_count": (8, "mixture of experts"),
    "gemma4.expert_feed_forward_length": (704, "mixture of experts"),
    "gemma4.rope.scaling.type": ("yarn", "scaled RoPE"),
    "gemma4.attention.causal": (0, "attention to later tokens"),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_other_kinds_of_model_are_refused_by_name(tmp_path: Path, model: Model, key: str) -> None:
    value, meaning = UNSUPPORTED[key]
    refuse(tmp_path, model.set(key, value), f"{key} is {value!r}: g4 does not implement {meaning}")


def test_an_unknown_key_is_refused(tmp_path: Path, model: Model) -> None:
    refuse(tmp_path, model.set("gemma4.attention.scale", 2), "unknown key gemma4.attention.scale")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", None])
def test_another_architecture(tmp_path: Path, model: Model, architecture: str | None) -> None:
    model = model.set("general.architecture", architecture) if architecture else model.without("general.architecture")
    refuse(tmp_path, model, f"architecture {architecture!r}; g4 runs 'gemma4'")


BAD_ROPE = {
    "another share": np.array([1.0] * 8 + [1e30] * 8, np.float32),
    "scaled": np.array([2.0] * 4 + [1e30] * 12, np.float32),
    "nothing kept": np.array([1.0] * 4 + [0.0] * 12, np.float32),
    "too short": np.array([1.0] * 2 + [1e30] * 6, np.float32),
}


@pytest.mark.parametrize("what", BAD_ROPE)
def test_rope_freqs_are_checked(tmp_path: Path, model: Model, what: str) -> None:
    model.tensors[ROPE_FREQS] = BAD_ROPE[what]
    refuse(tmp_path, model, "Tensor rope_freqs.weight", "is not Gemma 4's (4 ones, then 12 times 1e30)")


def test_rope_freqs_must_be_float32(tmp_path: Path, model: Model) -> None:
    model.tensors[ROPE_FREQS] = np.array([1.0] * 4 + [6e4] * 12, np.float16)
    model.types[ROPE_FREQS] = GGML.F16
    refuse(tmp_path, model, "Tensor rope_freqs.weight", "is not Gemma 4's")


def test_rope_freqs_are_required(tmp_path: Path, model: Model) -> None:
    refuse(tmp_path, model.without(ROPE_FREQS), "has no tensor rope_freqs.weight")


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.3.attn_v.weight",
                         "blk.5.attn_k.weight", "blk.7.layer_output_scale.weight"])  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path: Path, model: Model, name: str) -> None:
    refuse(tmp_path, model.without(name), f"has no tensor {name}")


def test_a_foreign_tensor_is_named(tmp_path: Path, model: Model) -> None:
    model.tensors["blk.0.ffn_gate_inp.weight"] = np.zeros((4, 64), np.float32)
    refuse(tmp_path, model, "has a tensor blk.0.ffn_gate_inp.weight, which no dense Gemma 4 text model has")


def test_v_on_some_full_layers_only(tmp_path: Path, model: Model) -> None:
    model.tensors[f"blk.{FULL_LAYER}.attn_v.weight"] = np.zeros((32, 64), np.float32)
    refuse(tmp_path, model, "has blk.5.attn_v.weight but not blk.11.attn_v.weight")


def test_a_type_that_we_do_not_decode(tmp_path: Path, model: Model) -> None:
    model.tensors["blk.0.ffn_up.weight"] = np.zeros((128, 64), np.int8)
    model.types["blk.0.ffn_up.weight"] = GGML.I8
    refuse(tmp_path, model, "Tensor blk.0.ffn_up.weight", "has type I8, which g4 does not decode")


def generation_of(path: Path, model: Model) -> dict[str, object]:
    plan = plan_conversion([write(path / "m.gguf", model)])
    return json.loads(plan.checkpoint.assets["generation_config.json"])


def test_sampling_defaults_and_stop_ids(tmp_path: Path, model: Model) -> None:
    model.set("general.sampling.temp", 0.7).set("general.sampling.top_k", 40).set("general.sampling.top_p", 0.9)
    document = generation_of(tmp_path, model.set("tokenizer.ggml.padding_token_id", 0))
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    assert GenerationDefaults.from_dir(tmp_path) == GenerationDefaults((1, 6), 2, 0.7, 40, 0.9)
    assert document["pad_token_id"] == 0


def test_stop_ids_add_the_files_own(tmp_path: Path, model: Model) -> None:
    """Whatever the eos key names, <eos> and <turn|> stop; an id that only the file knows stops too."""
    model.set("tokenizer.ggml.eos_token_id", 6).set("tokenizer.ggml.eot_token_id", 8).set(
        "tokenizer.ggml.eom_token_id", 9
    )
    assert generation_of(tmp_path, model)["eos_token_id"] == [1, 6, 8, 9]


def test_files_without_sampling_defaults(tmp_path: Path, model: Model) -> None:
    for key in ("temp", "top_k", "top_p"):
        model.without(f"general.sampling.{key}")
    plan = plan_conversion([write(tmp_path / "m.gguf", model)])
    document = json.loads(plan.checkpoint.assets["generation_config.json"])
    assert (document["temperature"], document["top_k"], document["top_p"]) == (1.0, 64, 0.95)
    assert any("no sampling defaults" in sentence for sentence in remarks(plan))


def test_sampling_defaults_that_are_none(tmp_path: Path, model: Model) -> None:
    refuse(tmp_path, model.set("general.sampling.temp", "hot"), "general.sampling.temp is 'hot'; it must be a number")


def test_the_chat_template_is_only_text_here(tmp_path: Path, model: Model) -> None:
    hostile = "{% for x in range(10**12) %}{{ ''.__class__.__mro__ }}{% endfor %}"
    model.set("tokenizer.chat_template", hostile)
    plan = plan_conversion([write(tmp_path / "m.gguf", model)])
    assert plan.checkpoint.assets["chat_template.jinja"] == hostile.encode()
    assert chat_template(open_gguf([tmp_path / "m.gguf"])) == hostile
    refuse(tmp_path, model.set("tokenizer.chat_template", 7), "tokenizer.chat_template is not text")


def test_a_base_model_has_no_chat_template(tmp_path: Path, model: Model) -> None:
    plan = plan_conversion([write(tmp_path / "m.gguf", model.without("tokenizer.chat_template"))])
    assert "chat_template.jinja" not in plan.checkpoint.assets
    assert any("no chat template" in sentence for sentence in remarks(plan))
