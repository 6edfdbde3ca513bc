"""Our model against transformers' on the same random weights, in float32, with every feature of the 31B on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma4Config as TransformersConfig
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.eager import EagerEngine
from gemma4cli.model.attention import attend
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.settings import GREEDY
from tests.parity.reference import layer_errors, logit_error, our_model, read_in_chunks, transformers_model
from tests.support.tiny import random_weights, tiny_config, tiny_text_config, write_checkpoint

CACHE = CacheSpec(256, 16, torch.float32)
LENGTH = 60


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(tiny_config(), seed=1)


@pytest.fixture(scope="module")
def theirs(weights: dict[str, Tensor]) -> Gemma4ForCausalLM:
    return transformers_model(tiny_text_config(), weights, torch.float32)


@pytest.fixture
def ours(weights: dict[str, Tensor]) -> Gemma4:
    return our_model(tiny_config(), weights, CACHE)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 160, (1, LENGTH), generator=torch.Generator().manual_seed(2))


def test_every_layer_is_within_3e5(theirs: Gemma4ForCausalLM, weights: dict[str, Tensor], tokens: Tensor) -> None:
    ours = our_model(tiny_config(), weights, replace(CACHE, prefill_chunk=LENGTH))
    errors = layer_errors(theirs, ours, tokens)
    assert len(errors) == 12
    assert max(errors) <= 3e-5, errors


def test_embedding_is_equal(theirs: Gemma4ForCausalLM, ours: Gemma4, tokens: Tensor) -> None:
    assert torch.equal(theirs.model.embed_tokens(tokens), ours.model.embed_tokens(tokens))


def test_logits_agree_far_past_the_ring(theirs: Gemma4ForCausalLM, ours: Gemma4, tokens: Tensor) -> None:
    assert logit_error(theirs, ours, tokens) <= 5e-4


def test_32_greedy_tokens_are_the_same(theirs: Gemma4ForCausalLM, ours: Gemma4, tokens: Tensor) -> None:
    prompt = tokens[:, :40]
    expected = theirs.generate(
        prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )[0, 40:].tolist()
    request = GenerationRequest(tuple(prompt[0].tolist()), 32, GREEDY, frozenset())
    assert list(EagerEngine(ours).generate(request)) == expected
    assert len(set(expected)) > 5, "the random model repeats itself, so the comparison says little"


def _scaled_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    return attend(q * q.shape[-1] ** -0.5, k, v, input_pos, window)


def _wider_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    return attend(q, k, v, input_pos, window + 1 if window else 0)


def _rope_over_the_rotated_part(model: Gemma4) -> None:
    """Use rotated / D as the exponent's step, the usual partial RoPE, in full layers."""
    rotary = model.model.rotary_emb["full_attention"]
    rotated = int((rotary.inv_freq > 0).sum())
    rotary.inv_freq[:rotated] = 1_000_000.0 ** -(torch.arange(rotated) / rotated)


def _no_layer_scalar(model: Gemma4) -> None:
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1.0)


def _scaled_v(model: Gemma4) -> None:
    """Give v the weight of k_norm, which K=V tempts one to do: v must be normalized without a weight."""
    for layer in model.model.layers:
        if layer.self_attn.v_proj is None:
            layer.self_attn.o_proj.weight *= layer.self_attn.k_norm.weight.repeat(4)


@pytest.mark.parametrize(
    ("attend", "change"),
    [
        (_scaled_attention, None),
        (_wider_attention, None),
        (attend, _rope_over_the_rotated_part),
        (attend, _no_layer_scalar),
        (attend, _scaled_v),
    ],
    ids=["scale 1/sqrt(D)", "window + 1", "rope exponent", "layer scalar 1", "weighted v"],
)
def test_a_wrong_model_is_noticed(
    theirs: Gemma4ForCausalLM,
    weights: dict[str, Tensor],
    tokens: Tensor,
    attend: Callable[..., Tensor],
    change: Callable[[Gemma4], None] | None,
) -> None:
    """Each of these mistakes moves the logits a hundred times further than the tolerance."""
    wrong = our_model(tiny_config(), weights, replace(CACHE, prefill_chunk=17), attend)
    if change is not None:
        with torch.no_grad():
            change(wrong)
    assert logit_error(theirs, wrong, tokens) > 5e-2


def test_bfloat16_is_as_exact_as_theirs(tokens: Tensor) -> None:
    """Our error against float32 is at most 1.5 times that of transformers in bfloat16 (we rotate in float32)."""
    rounded = random_weights(tiny_config(), seed=3, dtype=torch.bfloat16)
    exact = transformers_model(tiny_text_config(), {k: v.float() for k, v in rounded.items()}, torch.float32)
    theirs = transformers_model(tiny_text_config(), rounded, torch.bfloat16)
    ours = our_model(tiny_config(), rounded, replace(CACHE, dtype=torch.bfloat16))
    with torch.no_grad():
        reference = exact(tokens).logits
        their_error = (theirs(tokens).logits.float() - reference).pow(2).mean().sqrt()
    our_error = (read_in_chunks(ours, tokens, [16]) - reference).pow(2).mean().sqrt()
    assert our_error <= 1.5 * their_error


def test_without_softcap_and_with_a_head_of_its_own(tokens: Tensor) -> None:
    changes = {"final_logit_softcapping": None, "tie_word_embeddings": False, "attention_k_eq_v": False,
               "num_global_key_value_heads": None}  # fmt: skip
    config = tiny_config(**changes)
    weights = random_weights(config, seed=4)
    theirs = transformers_model(tiny_text_config(**changes), weights, torch.float32)
    assert logit_error(theirs, our_model(config, weights, CACHE), tokens) <= 2e-3


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_written_by_transformers_reads_the_same(nested: bool) -> None:
    """transformers 5.20 and later write `per_layer_config` instead of `global_head_dim`."""
    keys = {key: value for key, value in tiny_text_config().items() if key not in ("model_type", "dtype")}
    written = Gemma4TextConfig(**keys)
    document = TransformersConfig(text_config=written).to_dict() if nested else written.to_dict()
    assert "global_head_dim" not in str(document)
    assert Gemma4Config.from_json(document) == tiny_config()


def test_a_checkpoint_written_by_transformers_loads(theirs: Gemma4ForCausalLM, tokens: Tensor, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    engine = EagerEngine.from_checkpoint(tmp_path, context_length=256, prefill_chunk=16)
    assert logit_error(theirs, engine.model, tokens) <= 5e-4


def test_a_checkpoint_of_ours_loads_in_transformers(tmp_path: Path) -> None:
    """The tiny checkpoint that many tests use is one that transformers reads without a missing or unexpected key."""
    folder = write_checkpoint(tmp_path / "checkpoint", vision=False)
    _, info = Gemma4ForCausalLM.from_pretrained(
        folder,
        config=Gemma4TextConfig(**tiny_text_config()),
        key_mapping={"^model.language_model": "model"},
        output_loading_info=True,
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_parameter_names_and_shapes_are_theirs() -> None:
    keys = {key: value for key, value in tiny_text_config().items() if key not in ("model_type", "dtype")}
    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig(**keys))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert tiny_config().parameter_shapes() == theirs
