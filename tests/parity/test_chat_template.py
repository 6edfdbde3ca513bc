"""Our rendering of a chat template is transformers' own, id for id."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

from gemma4cli.model.chat import Chat, Message
from tests.support.chat_fixture import make_chat_folder

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": " Answer\nin one word. "}, {"role": "user", "content": "  Hi 👩‍🚀\n\n"}],
    [
        {"role": "user", "content": "Remember: Anna likes tea."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "What does Anna like? {{ 1 + 1 }}"},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("parity") / "model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return GemmaTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_same_ids_as_apply_chat_template(
    folder: Path, reference: PreTrainedTokenizerFast, messages: list[Message], thinking: bool
) -> None:
    theirs = reference.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=True
    )
    assert Chat.from_dir(folder).prompt_ids(messages, thinking=thinking) == theirs["input_ids"]
