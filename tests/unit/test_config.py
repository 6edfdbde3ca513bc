"""config.json is read strictly: both schemas, every key known, every contradiction refused by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.model.config import FULL, SLIDING, Gemma4Config, LayerConfig
from tests.support import gemma4_31b
from tests.support.tiny import tiny_config, tiny_config_dict, tiny_text_config

MISSING = object()


def test_31b_has_832_tensors_and_30_7_billion_parameters() -> None:
    shapes = Gemma4Config.from_json(gemma4_31b.config_dict()).parameter_shapes()
    assert len(shapes) == 832
    assert sum(math.prod(shape) for shape in shapes.values()) == 30_697_345_340
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (8192, 5376)
    assert shapes["model.layers.5.self_attn.k_proj.weight"] == (2048, 5376)
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes


def test_layers_of_the_31b() -> None:
    config = Gemma4Config.from_json(gemma4_31b.config_dict())
    assert config.layer(4) == LayerConfig(SLIDING, 256, 16, False, 1e4, 1.0, 1024)
    assert config.layer(5) == LayerConfig(FULL, 512, 4, True, 1e6, 0.25, 0)
    assert [i for i in range(60) if config.layer(i).kind == FULL] == list(range(5, 60, 6))


def test_both_schemas_and_both_nestings_are_equal() -> None:
    expected = tiny_config()
    for schema in ("original", "per_layer"):
        assert Gemma4Config.from_json(tiny_config_dict(schema)) == expected
        assert Gemma4Config.from_json(tiny_text_config(schema)) == expected


def test_both_schemas_at_once_when_they_agree() -> None:
    overrides = {"05": {"head_dim": 32, "num_key_value_heads": 1}, "11": {"head_dim": 32, "num_key_value_heads": 1}}
    assert tiny_config(per_layer_config=overrides) == tiny_config()
    spelled_out = overrides | {"0": {"head_dim": 16}}  # a sliding layer's own value is no override
    assert tiny_config(per_layer_config=spelled_out) == tiny_config()


def test_no_global_kv_heads_means_those_of_sliding_layers() -> None:
    for schema in ("original", "per_layer"):
        assert tiny_config(schema=schema, num_global_key_value_heads=None).num_global_key_value_heads == 2


def test_without_k_eq_v_every_layer_has_v_proj() -> None:
    config = tiny_config(attention_k_eq_v=False, num_global_key_value_heads=None)
    assert config.parameter_shapes()["model.layers.5.self_attn.v_proj.weight"] == (64, 64)


def test_an_untied_head_is_a_parameter() -> None:
    assert "lm_head.weight" not in tiny_config().parameter_shapes()
    assert tiny_config(tie_word_embeddings=False).parameter_shapes()["lm_head.weight"] == (160, 64)


def test_no_softcap() -> None:
    assert tiny_config(final_logit_softcapping=None).final_logit_softcapping is None


@pytest.mark.parametrize(
    "key",
    [
        "attention_bias", "attention_k_eq_v", "enable_moe_block", "final_logit_softcapping",
        "global_head_dim", "head_dim", "hidden_activation", "hidden_size", "hidden_size_per_layer_input",
        "intermediate_size", "layer_types", "max_position_embeddings", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "num_kv_shared_layers", "rms_norm_eps", "rope_parameters",
        "sliding_window", "use_double_wide_mlp", "vocab_size",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(key: str) -> None:
    text = tiny_text_config()
    del text[key]
    with pytest.raises(G4Error, match=rf"\b{key}\b.* is missing"):
        Gemma4Config.from_json(text)


def test_tie_word_embeddings_may_stand_on_either_level() -> None:
    document = tiny_config_dict()
    del document["text_config"]["tie_word_embeddings"]
    assert Gemma4Config.from_json(document) == tiny_config()
    del document["tie_word_embeddings"]
    with pytest.raises(G4Error, match="tie_word_embeddings is missing"):
        Gemma4Config.from_json(document)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("enable_moe_block", True, "enable_moe_block is True: g4 does not implement mixture of experts"),
        ("num_experts", 128, "num_experts is 128: g4 does not implement mixture of experts"),
        ("top_k_experts", 8, "top_k_experts is 8"),
        ("moe_intermediate_size", 704, "moe_intermediate_size is 704"),
        ("expert_intermediate_size", 704, "expert_intermediate_size is 704"),
        ("hidden_size_per_layer_input", 256, r"hidden_size_per_layer_input is 256: .* per-layer embeddings \(PLE\)"),
        ("num_kv_shared_layers", 20, "num_kv_shared_layers is 20: .* share keys and values"),
        ("use_double_wide_mlp", True, "use_double_wide_mlp is True: .* double-wide MLP"),
        ("attention_bias", True, "attention_bias is True: .* biases"),
        ("hidden_activation", "silu", "hidden_activation is 'silu': .* another activation"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention is 'all': .* later tokens"),
        ("rope_scaling", {"factor": 8}, "rope_scaling is .*: .* scaled RoPE"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0: .* soft-capped attention scores"),
        ("is_encoder_decoder", True, "is_encoder_decoder is True"),
        ("query_pre_attn_scalar", 256, "unknown key query_pre_attn_scalar"),
        ("hidden_size_per_layer_input", False, "hidden_size_per_layer_input is False"),
        ("attention_bias", 0, "attention_bias is 0:"),
        ("hidden_size", 0, "hidden_size is 0; it must be a positive whole number"),
        ("hidden_size", 64.0, "hidden_size is 64.0; it must be a positive whole number"),
        ("hidden_size", True, "hidden_size is True; it must be a positive whole number"),
        ("vocab_size", "160", "vocab_size is '160'; it must be a positive whole number"),
        ("sliding_window", None, "sliding_window is None; it must be a positive whole number"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps is -1e-06; it must be a positive number"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf; it must be a positive number"),
        ("final_logit_softcapping", 0, "final_logit_softcapping is 0; it must be a positive number"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1; it must be true or false"),
        ("attention_k_eq_v", None, "attention_k_eq_v is None; it must be true or false"),
        ("layer_types", "full_attention", "layer_types is 'full_attention'; it must be a list"),
        ("layer_types", ["full_attention"] * 7, "layer_types has 7 entries but num_hidden_layers is 12"),
        ("layer_types", ["chunked_attention"] * 12, r"layer_types\[0\] is 'chunked_attention'"),
        ("layer_types", ["sliding_attention"] * 12, 'layer_types ends with "sliding_attention"'),
        ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("num_global_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_global_key_value_heads 3"),
        ("head_dim", 15, "head_dim is 15; RoPE needs an even number"),
        ("global_head_dim", 33, "global_head_dim is 33; RoPE needs an even number"),
        ("attention_k_eq_v", False, "num_global_key_value_heads is 1 but attention_k_eq_v is false"),
        ("global_head_dim", None, "global_head_dim is None; it must be a positive whole number"),
        ("per_layer_config", {"5": {"head_dim": 64}, "11": {"head_dim": 64}},
         r"per_layer_config gives full attention layers .* = \(64, 2\), but global_head_dim .* give \(32, 1\)"),
        ("per_layer_config", [], "per_layer_config must be an object"),
        ("per_layer_config", {"12": {}}, "per_layer_config.12 does not name one of the 12 layers once"),
        ("per_layer_config", {"five": {}}, "per_layer_config.five does not name"),
        ("per_layer_config", {"5": {}, "05": {}}, "per_layer_config.05 does not name one of the 12 layers once"),
        ("per_layer_config", {"5": 32}, "per_layer_config.5 does not name"),
        ("per_layer_config", {"5": {"sliding_window": 4}}, "unknown key per_layer_config.5.sliding_window"),
        ("per_layer_config", {"5": {"head_dim": 32}}, r"per_layer_config gives layer 5 .* other layers of its kind"),
        ("per_layer_config", {"3": {"head_dim": 32}}, r"per_layer_config gives layer 3 \(sliding_attention\)"),
        ("per_layer_config", {"5": {"head_dim": 0}}, "per_layer_config.5.head_dim is 0"),
    ],
)  # fmt: skip
def test_a_value_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(G4Error, match=message):
        tiny_config(**{key: value})


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (
            FULL,
            "rope_type",
            "yarn",
            "rope_parameters.full_attention.rope_type is 'yarn'; g4 implements \"proportional\"",
        ),
        (SLIDING, "rope_type", "proportional", "rope_parameters.sliding_attention.rope_type is 'proportional'"),
        (FULL, "rope_type", MISSING, "rope_parameters.full_attention.rope_type is missing"),
        (FULL, "rope_theta", MISSING, "rope_parameters.full_attention.rope_theta is missing"),
        (SLIDING, "rope_theta", 0, "rope_parameters.sliding_attention.rope_theta is 0; it must be a positive number"),
        (FULL, "partial_rotary_factor", MISSING, "rope_parameters.full_attention.partial_rotary_factor is missing"),
        (FULL, "partial_rotary_factor", 1.5, "partial_rotary_factor is 1.5; it must be at most 1.0"),
        (SLIDING, "partial_rotary_factor", 0.5, "sliding_attention.partial_rotary_factor must be 1.0"),
        (FULL, "factor", 8.0, "rope_parameters.full_attention.factor is 8.0: g4 does not implement scaled RoPE"),
        (FULL, "beta_fast", 32, "unknown key rope_parameters.full_attention.beta_fast"),
    ],
)
def test_rope_is_refused_by_name(kind: str, key: str, value: Any, message: str) -> None:
    rope = tiny_text_config()["rope_parameters"]
    rope[kind] = {k: v for k, v in (rope[kind] | {key: value}).items() if v is not MISSING}
    with pytest.raises(G4Error, match=re.escape(message)):
        tiny_config(rope_parameters=rope)


def test_rope_of_a_kind_must_be_there_and_no_other() -> None:
    rope = tiny_text_config()["rope_parameters"]
    with pytest.raises(G4Error, match=r"rope_parameters\.full_attention is missing"):
        tiny_config(rope_parameters={SLIDING: rope[SLIDING]})
    with pytest.raises(G4Error, match=r"unknown key rope_parameters\.chunked_attention"):
        tiny_config(rope_parameters=rope | {"chunked_attention": {}})


def test_rope_factors_that_change_nothing_are_fine() -> None:
    rope = tiny_text_config()["rope_parameters"]
    rope[SLIDING] |= {"partial_rotary_factor": 1.0}
    rope[FULL] |= {"factor": 1.0}
    assert tiny_config(rope_parameters=rope) == tiny_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, 'model_type is \'gemma3\'; g4 runs "gemma4" and "gemma4_text"'),
        ({"model_type": MISSING}, "model_type is missing"),
        ({"quantization_config": {}}, "quantization_config: this checkpoint was quantized by another tool"),
        ({"text_config": []}, "text_config must be a JSON object"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False but text_config.tie_word_embeddings is True"),
        ({"router_aux_loss": 1}, "unknown key router_aux_loss"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ],
)
def test_the_outer_level_is_strict_too(change: dict[str, Any], message: str) -> None:
    document = {key: value for key, value in (tiny_config_dict() | change).items() if value is not MISSING}
    with pytest.raises(G4Error, match=re.escape(message)):
        Gemma4Config.from_json(document)


def test_another_kind_of_text_model_is_refused() -> None:
    with pytest.raises(G4Error, match=r"text_config.model_type is 'gemma4_unified_text'"):
        tiny_config(model_type="gemma4_unified_text")


def test_half_of_the_original_schema() -> None:
    text = tiny_text_config()
    del text["global_head_dim"]
    with pytest.raises(G4Error, match="global_head_dim is missing although num_global_key_value_heads is there"):
        Gemma4Config.from_json(text)


def test_a_document_that_is_no_object() -> None:
    with pytest.raises(G4Error, match="must hold a JSON object"):
        Gemma4Config.from_json([])


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(G4Error, match=rf"{file} does not exist"):
        Gemma4Config.from_dir(tmp_path)
    file.write_text("{")
    with pytest.raises(G4Error, match=rf"{file} is not valid JSON"):
        Gemma4Config.from_dir(tmp_path)
    file.write_text(json.dumps(tiny_config_dict(num_experts=4)))
    with pytest.raises(G4Error, match=rf"{file}: num_experts is 4"):
        Gemma4Config.from_dir(tmp_path)
    file.write_text(json.dumps(tiny_config_dict()))
    assert Gemma4Config.from_dir(tmp_path) == tiny_config()
