"""Which files of a repository are chosen, from their names alone."""

from __future__ import annotations

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.hub.selection import INDEX, Selection, quantization_of, select

REPO = "o/r"
SETTINGS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
UNSLOTH = [
    "BF16/gemma-4-31B-it-BF16-00001-of-00002.gguf",
    "BF16/gemma-4-31B-it-BF16-00002-of-00002.gguf",
    "gemma-4-31B-it-IQ4_XS.gguf",
    "gemma-4-31B-it-Q4_0.gguf",
    "gemma-4-31B-it-Q4_K_M.gguf",
    "gemma-4-31B-it-UD-Q4_K_XL.gguf",
    "mmproj-BF16.gguf",
    "README.md",
]


def choose(names: list[str], selector: str | None = None, index: object = None) -> Selection:
    return select(REPO, names, selector, lambda: index)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("gemma-4-31B-it-Q4_K_M.gguf", "Q4_K_M"),
        ("gemma-4-31B_q4_0-it.gguf", "Q4_0"),
        ("gemma-4-31B-it-qat-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("BF16/gemma-4-31B-it-BF16-00001-of-00002.gguf", "BF16"),
        ("gemma-4-31B-it-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("gemma-4-31B-it.Q6_K.gguf", "Q6_K"),
        ("model-Q4_0_4_4.gguf", None),
        ("model.gguf", None),
    ],
)
def test_the_quantization_in_a_file_name(name: str, quantization: str | None) -> None:
    assert quantization_of(name) == quantization


def test_a_plain_checkpoint_is_its_weights_and_settings() -> None:
    chosen = choose([*SETTINGS, "model.safetensors", "README.md", "pytorch_model.bin", "preprocessor_config.json"])
    assert set(chosen.names) == {*SETTINGS, "model.safetensors"}
    assert chosen.main is None


def test_shards_come_from_the_index_and_those_without_text_do_not() -> None:
    index = {
        "weight_map": {
            "model.language_model.norm.weight": "a.safetensors",
            "model.vision_tower.x": "a.safetensors",
            "lm_head.weight": "b.safetensors",
            "model.embed_vision.x": "c.safetensors",
            "model.audio_tower.x": "d.safetensors",
            "model.embed_audio.x": "d.safetensors",
        }
    }
    chosen = choose([*SETTINGS, INDEX, *(f"{x}.safetensors" for x in "abcd")], index=index)
    assert chosen.weights == ("a.safetensors", "b.safetensors")
    assert chosen.skipped == ("c.safetensors", "d.safetensors")
    assert INDEX in chosen.companions


@pytest.mark.parametrize(
    ("selector", "main"),
    [
        ("Q4_K_M", "gemma-4-31B-it-Q4_K_M.gguf"),
        ("q4_k_m", "gemma-4-31B-it-Q4_K_M.gguf"),
        ("Q4_K_XL", "gemma-4-31B-it-UD-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "gemma-4-31B-it-UD-Q4_K_XL.gguf"),
        ("gemma-4-31B-it-Q4_0.gguf", "gemma-4-31B-it-Q4_0.gguf"),
        ("BF16", UNSLOTH[0]),
        (UNSLOTH[1], UNSLOTH[0]),
        ("gemma-4-31B-it-BF16-00002-of-00002.gguf", UNSLOTH[0]),
    ],
)
def test_a_gguf_is_found_by_quantization_or_name(selector: str, main: str) -> None:
    chosen = choose(UNSLOTH, selector)
    assert chosen.main == main
    assert chosen.weights == (tuple(UNSLOTH[:2]) if "BF16" in main else (main,))
    assert chosen.companions == ()


def test_the_only_gguf_needs_no_choice() -> None:
    chosen = choose(["gemma-4-31B_q4_0-it.gguf", "mmproj-model-f16.gguf"])
    assert chosen.weights == ("gemma-4-31B_q4_0-it.gguf",)


def test_safetensors_are_taken_where_there_are_both() -> None:
    assert choose([*SETTINGS, "model.safetensors", "m-Q4_0.gguf"]).format == "safetensors"
    assert choose([*SETTINGS, "model.safetensors", "m-Q4_0.gguf"], "Q4_0").format == "gguf"


@pytest.mark.parametrize(
    ("names", "selector", "index", "sentence"),
    [
        (UNSLOTH, None, None, "o/r has 5 GGUF models: BF16, IQ4_XS, Q4_0, Q4_K_M, UD-Q4_K_XL."),
        (UNSLOTH, "Q8_0", None, "o/r has no GGUF model Q8_0."),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", None, "Q4_0 fits 2 files of o/r: a-Q4_0.gguf, b-Q4_0.gguf."),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, None, "o/r has 2 GGUF models: a-Q4_0.gguf, b-Q4_0.gguf."),
        ([*SETTINGS, "model.safetensors"], "Q4_0", None, "o/r has no GGUF files."),
        (["README.md", "pytorch_model.bin"], None, None, "o/r has no safetensors and no GGUF weights."),
        (
            ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"],
            None,
            None,
            "o/r has 2 of the 3 parts of m-00001-of-00003",
        ),
        (["config.json", "model.safetensors"], None, None, "o/r has no tokenizer.json; the model cannot be used"),
        ([*SETTINGS, INDEX], None, {"weight_map": {"lm_head.weight": "a"}}, "o/r lacks a, which its index names."),
        (
            [*SETTINGS, INDEX],
            None,
            {"weight_map": {"model.vision_tower.x": "a"}},
            f"{INDEX} of o/r lists no text tensor.",
        ),
        ([*SETTINGS, INDEX], None, [], f"{INDEX} of o/r has no weight_map from tensors to files."),
    ],
)
def test_what_cannot_be_chosen(names: list[str], selector: str | None, index: object, sentence: str) -> None:
    with pytest.raises(G4Error) as caught:
        choose(names, selector, index)
    assert caught.value.message.startswith(sentence)
    assert caught.value.hint
