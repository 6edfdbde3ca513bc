"""The held-out questions: what is asked, per task, and when a reply counts as right."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from tools.demo_model import chats, tasks
from tools.demo_model.chats import Chat
from tools.demo_model.tasks import Exchange

SEED = 99
RECALL_TOKENS = (1024, 2048, 4096, 7680)
HARDER = "word-problem, 4 changes"  # training stops at three: the task where damage shows first
END_OF_THOUGHT = "<channel|>"

Length = Callable[[Exchange], int]


def _alone(generator: tasks.Generator, thinking: bool, rng: random.Random) -> Chat:
    turn = tasks.draw(generator, rng, held_out=True)
    return Chat([turn], thinking=thinking)


def _small_talk(rng: random.Random) -> Chat:
    return Chat([tasks.small_talk(rng)])


def _recall(make: Callable[..., list[Exchange]], rng: random.Random) -> Chat:
    return Chat(make(rng, held_out=True))


def _recall_long(tokens: int, length: Length, rng: random.Random) -> Chat:
    turns = chats.recall_long(rng, tokens, length, held_out=True)
    return Chat(turns)


def suites(length: Length) -> dict[str, Callable[[random.Random], Chat]]:
    """Name of a task → maker of one held-out chat. `length` counts the tokens of one exchange with its turn marks."""
    made: dict[str, Callable[[random.Random], Chat]] = {}
    for name, generator in {
        "capital": tasks.capital,
        "capital-reverse": tasks.capital_reverse,
        "world-fact": tasks.world_fact,
        "two-step": tasks.two_step,
        "arithmetic-2-digit": tasks.arithmetic_2,
        "arithmetic-3-digit": tasks.arithmetic_3,
        "multiply": tasks.multiply,
        "word-problem": tasks.word_problem,
        "spell": tasks.spell,
        "spell-backwards": tasks.spell_backwards,
        "letters": tasks.letters,
        "sort": tasks.compare_or_sort,
        "count": tasks.count,
        "series": tasks.series,
        "unknown": tasks.unknown,
        "story": tasks.story,
    }.items():
        made[name] = partial(_alone, generator, False)
    made[HARDER] = partial(_alone, partial(tasks.word_problem, changes=4), False)
    made["small-talk"] = _small_talk
    made["system-prompt"] = partial(chats.styled, held_out=True)
    made["recall-short"] = partial(_recall, chats.recall_short)
    made["recall-crowded"] = partial(_recall, chats.recall_crowded)
    for tokens in RECALL_TOKENS:
        made[f"recall-{tokens}"] = partial(_recall_long, tokens, length)
    for name, generator in {
        "capital": tasks.capital,
        "two-step": tasks.two_step,
        "arithmetic-3-digit": tasks.arithmetic_3,
        "multiply": tasks.multiply,
        "word-problem": tasks.word_problem,
        "spell-backwards": tasks.spell_backwards,
    }.items():
        made[f"{name} (thinking)"] = partial(_alone, generator, True)
    return made


def questions(name: str, make: Callable[[random.Random], Chat], count: int) -> list[Chat]:
    """The same `count` chats of a task every time."""
    rng = random.Random(f"{SEED} {name}")
    return [make(rng) for _ in range(count)]


def split_reply(reply: str) -> tuple[str, str]:
    """Split a decoded reply (special tokens kept) into thought and answer."""
    thought, mark, answer = reply.rpartition(END_OF_THOUGHT)
    return (thought if mark else ""), answer.removesuffix("<turn|>").strip()


def is_right(chat: Chat, reply: str) -> bool:
    """Exact answer; a story counts when it is about what was asked, is long enough and comes to its end."""
    thought, answer = split_reply(reply)
    last = chat.turns[-1]
    if chat.thinking and not thought:
        return False
    if last.task != "story":
        return answer == last.answer
    wanted = last.thought.removeprefix("A story needs ").removesuffix(".").replace(" and a ", ", a ").split(", a ")
    return all(word in answer for word in wanted) and len(answer.split()) >= 60 and answer.endswith("The end.")
