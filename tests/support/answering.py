"""Greedy answers of a checkpoint folder, as token ids."""

from __future__ import annotations

from pathlib import Path

from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.eager import EagerEngine
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GREEDY

QUESTIONS = ("What is the capital of France?", "Spell garden backwards.")
_ANSWER_TOKENS = 20


def greedy_answers(folder: Path) -> dict[str, list[int]]:
    """Ask a checkpoint with its own tokenizer, template and stop ids."""
    chat, found = Chat.from_dir(folder), {}
    with EagerEngine.from_checkpoint(folder, context_length=256) as engine:
        for question in QUESTIONS:
            prompt = chat.prompt_ids([{"role": "user", "content": question}])
            request = GenerationRequest(tuple(prompt), _ANSWER_TOKENS, GREEDY, chat.stop_ids, session=question)
            found[question] = [*engine.generate(request)]
    return found
