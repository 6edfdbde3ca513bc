"""Measure held-out accuracy per task through g4's own engines: a checkpoint in eager PyTorch, a bundle in the runner.

    python -m tools.demo_model.evaluate gemma4cli/data/demo --label bf16
    python -m tools.demo_model.evaluate CHECKPOINT_OR_BUNDLE --label int4 --questions 64
    python -m tools.demo_model.evaluate --table

Answers are greedy. Every path is asked the same questions.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch

from gemma4cli import __version__, files
from gemma4cli.engine.base import Engine, GenerationRequest
from gemma4cli.model.chat import Chat as ModelChat
from gemma4cli.model.chat import Message
from gemma4cli.model.settings import SamplingSettings
from tools.demo_model import heldout, network
from tools.demo_model.chats import Chat
from tools.demo_model.tasks import Exchange

GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
TURN_MARKS = 9  # as in training rows, so that the long chats are the same
LONG_ANSWERS = {"story", "count"}  # a few hundred tokens each: a quarter of the questions
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "demo-model-accuracy.json"


def open_engine(path: Path) -> tuple[str, Engine]:
    """A bundle goes to the C++ runner, a checkpoint to eager PyTorch."""
    if (path / "model.pte").is_file():
        from gemma4cli.engine.runner import RunnerEngine

        return "runner", RunnerEngine(path)
    from gemma4cli.engine.eager import EagerEngine

    return "eager", EagerEngine.from_checkpoint(path, context_length=network.CONTEXT)


def reply(engine: Engine, model_chat: ModelChat, chat: Chat) -> str:
    """Ask one question greedily and return the whole reply with its control tokens."""
    messages = [Message(role=message["role"], content=message["content"]) for message in chat.messages()]
    prompt = model_chat.prompt_ids(messages, thinking=chat.thinking)
    room = 8 + len(model_chat.tokenizer.encode(chat.target()))
    generation = engine.generate(
        GenerationRequest(tuple(prompt), room, GREEDY, stop_ids=frozenset(model_chat.stop_ids))
    )
    return model_chat.tokenizer.decode(list(generation), skip_special=False)


def measure(path: Path, questions: int, long_questions: int, only: list[str]) -> dict[str, Any]:
    """Ask every task its questions; `long_questions` for those of thousands of tokens."""
    model_chat = ModelChat.from_dir(path)
    encode = model_chat.tokenizer.encode

    def length(exchange: Exchange) -> int:
        return len(encode(exchange.question)) + len(encode(exchange.answer)) + TURN_MARKS

    kind, engine = open_engine(path)
    accuracy: dict[str, Any] = {}
    started = time.perf_counter()
    with engine:
        for name, make in heldout.suites(length).items():
            if only and name not in only:
                continue
            is_long = name in {f"recall-{tokens}" for tokens in heldout.RECALL_TOKENS}
            count = long_questions if is_long else questions // 4 if name in LONG_ANSWERS else questions
            asked = heldout.questions(name, make, count)
            right = sum(heldout.is_right(chat, reply(engine, model_chat, chat)) for chat in asked)
            accuracy[name] = {"right": right, "asked": len(asked)}
            print(f"{name:32s} {right:4d}/{len(asked)}  {time.perf_counter() - started:6.0f} s", flush=True)
    return {
        "engine": kind,
        "accuracy": accuracy,
        "gemma4cli": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def table(results: dict[str, Any]) -> str:
    """A Markdown table: tasks down, measured paths across, in percent."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["accuracy"]))
    lines = ["| task | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for name in names:
        cells = []
        for result in results.values():
            found = result["accuracy"].get(name)
            cells.append(f"{100 * found['right'] / found['asked']:.1f}" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a checkpoint, plain or quantized, or a bundle")
    parser.add_argument("--label", help="name of this measurement in the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file that keeps all measurements")
    parser.add_argument("--questions", type=int, default=64, help="questions per task")
    parser.add_argument("--long-questions", type=int, default=24, help="questions per task of thousands of tokens")
    parser.add_argument(
        "--task", action="append", default=[], help="only this task (may be repeated); keeps the label's others"
    )
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    arguments = parser.parse_args()
    results = files.read_json(arguments.results) if arguments.results.exists() else {}
    if arguments.path is not None:
        label = arguments.label or parser.error("--label names the measurement")
        measured = measure(arguments.path, arguments.questions, arguments.long_questions, arguments.task)
        if arguments.task and label in results:
            measured["accuracy"] = {**results[label]["accuracy"], **measured["accuracy"]}
        results[label] = measured
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(arguments.results, results)
    if arguments.table:
        print(table(results))


if __name__ == "__main__":
    main()
