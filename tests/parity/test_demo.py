"""The demo checkpoint as it lies in the package: ours against transformers', far past the sliding window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import gemma4cli
from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.eager import EagerEngine
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GREEDY
from tests.parity.reference import layer_errors, logit_error

DEMO = Path(gemma4cli.__file__).parent / "data" / "demo"
FILLER = "The river is calm and the shop opens at nine. " * 30


@pytest.fixture(scope="module")
def theirs() -> Gemma4ForCausalLM:
    text = json.loads((DEMO / "config.json").read_text())["text_config"]
    model, info = Gemma4ForCausalLM.from_pretrained(
        DEMO,
        config=Gemma4TextConfig(**text),
        key_mapping={"^model.language_model": "model"},
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    """A chat turn five windows long."""
    messages = [{"role": "user", "content": f"My name is Ada. {FILLER}What is my name?"}]
    ids = torch.tensor([Chat.from_dir(DEMO).prompt_ids(messages, thinking=False)])
    assert ids.shape[1] > 5 * json.loads((DEMO / "config.json").read_text())["text_config"]["sliding_window"]
    return ids


def test_every_layer_is_within_3e5(theirs: Gemma4ForCausalLM, prompt: Tensor) -> None:
    count = prompt.shape[1]
    with EagerEngine.from_checkpoint(DEMO, context_length=1024, prefill_chunk=count) as engine:
        errors = layer_errors(theirs, engine.model, prompt)
    assert max(errors) <= 3e-5, errors


def test_logits_agree(theirs: Gemma4ForCausalLM, prompt: Tensor) -> None:
    with EagerEngine.from_checkpoint(DEMO, context_length=1024, prefill_chunk=64) as engine:
        assert logit_error(theirs, engine.model, prompt, chunk=64) <= 5e-4


def test_32_greedy_tokens_are_the_same(theirs: Gemma4ForCausalLM, prompt: Tensor) -> None:
    generated = theirs.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    with EagerEngine.from_checkpoint(DEMO, context_length=1024, prefill_chunk=64) as engine:
        request = GenerationRequest(tuple(prompt[0].tolist()), 32, GREEDY, frozenset())
        assert list(engine.generate(request)) == generated[0, prompt.shape[1] :].tolist()
