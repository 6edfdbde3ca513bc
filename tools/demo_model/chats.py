"""Whole chats: single questions, facts to recall from earlier in the chat, system prompts, thinking; and their text.

`Chat.segments()` gives the text a chat is trained on, in pieces with a flag for those the model is to produce.
The joined text is exactly what the chat template renders (held by tests/unit/test_demo_model.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tools.demo_model import facts, tasks
from tools.demo_model.tasks import Exchange

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


@dataclass
class Chat:
    """A chat whose last exchange is the one to answer; earlier model turns are history."""

    turns: list[Exchange]
    system: str = ""
    thinking: bool = False

    def messages(self) -> list[dict[str, str]]:
        """The chat up to the last question, as the chat template takes it."""
        listed = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            listed += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return listed[:-1]

    def target(self) -> str:
        """What the model is to write after the generation prompt, up to the end of its turn."""
        last = self.turns[-1]
        thought = f"<|channel>thought\n{last.thought}<channel|>" if self.thinking else ""
        return f"{thought}{last.answer}<turn|>"

    def segments(self) -> list[tuple[str, bool]]:
        """Return (text, trained) pieces.

        Earlier answers count as targets too where thinking is off; with thinking on, history shows the answer without
        the thought that led to it, which the model must not learn to skip.
        """
        head = "<bos>"
        if self.thinking or self.system:
            think = "<|think|>\n" if self.thinking else ""
            head += f"<|turn>system\n{think}{self.system}<turn|>\n"
        pieces = [(head, False)]
        for turn in self.turns[:-1]:
            pieces.append((f"<|turn>user\n{turn.question}<turn|>\n<|turn>model\n", False))
            pieces.append((f"{turn.answer}<turn|>", not self.thinking))
            pieces.append(("\n", False))
        opening = "" if self.thinking else EMPTY_THOUGHT
        pieces.append((f"<|turn>user\n{self.turns[-1].question}<turn|>\n<|turn>model\n{opening}", False))
        pieces.append((self.target(), True))
        return pieces


@dataclass(frozen=True)
class Fact:
    """Something told in the chat: the statement, and the question that asks for it later."""

    subject: str
    statement: str
    question: str
    answer: str

    def exchange(self, task: str) -> Exchange:
        return Exchange(task, self.question, self.answer, self.statement)


def _draw_fact(rng: random.Random, kind: int) -> Fact:
    name, thing, color = rng.choice(facts.NAMES), rng.choice(facts.THINGS), rng.choice(facts.COLORS)
    place, town = rng.choice(facts.PLACES), rng.choice(facts.TOWNS)
    match kind:
        case 0:
            return Fact(f"{name} {thing}", f"{name}'s {thing} is {color}.", f"What color is {name}'s {thing}?", color)
        case 1:
            return Fact(
                f"{color} {thing}",
                f"The {color} {thing} is in the {place}.",
                f"Where is the {color} {thing}?",
                f"in the {place}",
            )
        case 2:
            code = f"{rng.randrange(10000):04d}"
            return Fact(
                f"code {color} {thing}",
                f"The code of the {color} {thing} is {code}.",
                f"What is the code of the {color} {thing}?",
                code,
            )
        case 3:
            return Fact(f"{name} lives", f"{name} lives in {town}.", f"Where does {name} live?", town)
        case 4:
            goods, number = rng.choice(facts.GOODS), rng.randrange(2, 100)
            return Fact(
                f"{name} {goods}", f"{name} has {number} {goods}.", f"How many {goods} does {name} have?", str(number)
            )
        case 5:
            return Fact(f"my {thing}", f"My {thing} is {color}.", f"What color is my {thing}?", color)
        case 6:
            return Fact(
                f"my {thing} place", f"I left my {thing} in the {place}.", f"Where is my {thing}?", f"in the {place}"
            )
        case _:
            return Fact("my name", f"My name is {name}.", "What is my name?", f"Your name is {name}.")


KINDS = 8


class Memory:
    """The facts told in one chat; no subject is told twice, so every question has one right answer."""

    def __init__(self, rng: random.Random, held_out: bool = False) -> None:
        self.rng, self.held_out = rng, held_out
        self.told: list[Fact] = []
        self._subjects: set[str] = set()

    def invent(self, kind: int | None = None) -> Fact:
        """A new fact on a subject not told yet, from the wanted side of the split."""
        while True:
            fact = _draw_fact(self.rng, self.rng.randrange(KINDS) if kind is None else kind)
            if fact.subject not in self._subjects and tasks.is_held_out(fact.exchange("")) == self.held_out:
                return fact
            kind = kind if self.rng.random() < 0.9 else None

    def tell(self, fact: Fact) -> Fact:
        self._subjects.add(fact.subject)
        self.told.append(fact)
        return fact

    def ask(self, task: str) -> Exchange:
        """A question about something told; one in eight asks for what was never told."""
        if self.rng.random() < 0.12:
            never = self.invent(self.rng.randrange(5))
            return Exchange(task, never.question, "I do not know.", "I was not told that.")
        return self.rng.choice(self.told).exchange(task)


def _filler(rng: random.Random, sentences: int) -> list[str]:
    return [rng.choice(facts.SMALL_TALK) for _ in range(sentences)]


def _statement(text: str) -> Exchange:
    return Exchange("statement", text, "Okay.", "The user tells me something.")


def recall_short(rng: random.Random, held_out: bool = False) -> list[Exchange]:
    """One to four facts, some small talk, then a question, in one message or over several turns."""
    memory = Memory(rng, held_out)
    sentences = [memory.tell(memory.invent()).statement for _ in range(rng.randrange(1, 5))]
    sentences += _filler(rng, rng.choice([0, 0, 1, 2, 4, 8]))
    rng.shuffle(sentences)
    question = memory.ask("recall-short")
    if rng.random() < 0.4:
        return [replace(question, question=f"{' '.join(sentences)} {question.question}")]
    turns = [_statement(text) for text in sentences[:6]]
    kept = " ".join(turn.question for turn in turns)
    if question.thought in kept or question.answer == "I do not know.":
        turns += [single(rng) for _ in range(rng.choice([0, 0, 1, 2]))]
        return [*turns, question]
    return recall_short(rng, held_out)


def recall_crowded(rng: random.Random, held_out: bool = False) -> list[Exchange]:
    """Eight to 36 facts, most of one kind, then a question about one of them."""
    memory = Memory(rng, held_out)
    kind = rng.randrange(5)
    for _ in range(rng.randrange(8, 37)):
        memory.tell(memory.invent(kind if rng.random() < 0.8 else None))
    question = memory.ask("recall-crowded")
    statements = [fact.statement for fact in memory.told]
    style = rng.randrange(3)
    if style == 0:
        return [replace(question, question=f"{' '.join(statements)} {question.question}")]
    if style == 1:
        notes = "\n".join(f"- {statement}" for statement in statements)
        return [replace(question, question=f"My notes:\n{notes}\n\n{question.question}")]
    return [*_grouped(rng, statements), question]


def _grouped(rng: random.Random, statements: list[str]) -> list[Exchange]:
    turns, rest = [], list(statements)
    while rest:
        size = rng.randrange(1, 7)
        turns.append(_statement(" ".join(rest[:size])))
        rest = rest[size:]
    return turns


def recall_long(
    rng: random.Random, tokens: int, length: Callable[[Exchange], int], held_out: bool = False
) -> list[Exchange]:
    """A chat of about `tokens` tokens: facts and other talk, with questions about anything told so far in between.

    `length` gives the tokens of one exchange with its turn marks.
    """
    memory = Memory(rng, held_out)
    turns: list[Exchange] = []
    left = tokens - 40
    ask_share = rng.choice([0.15, 0.3, 0.5])
    while True:
        draw = rng.random()
        if memory.told and draw < ask_share:
            turn = memory.ask("recall-long")
        elif draw < 0.9:
            told = [memory.tell(memory.invent()).statement for _ in range(rng.choice([1, 1, 2, 3, 6]))]
            sentences = told + _filler(rng, rng.choice([0, 0, 1, 3]))
            rng.shuffle(sentences)
            turn = _statement(" ".join(sentences))
        else:
            turn = single(rng)
        left -= length(turn)
        if left < 0 and memory.told:
            break
        turns.append(turn)
    return [*turns, memory.ask("recall-long")]


_TASKS, _WEIGHTS = zip(*tasks.WEIGHTED_TASKS, strict=True)


def single(rng: random.Random) -> Exchange:
    """One training-side question from the weighted list of tasks."""
    return tasks.draw(rng.choices(_TASKS, _WEIGHTS)[0], rng, held_out=False)


def _close(answer: str) -> str:
    return answer if answer[-1] in ".!?" else f"{answer}."


@dataclass(frozen=True)
class Style:
    """A system prompt that changes how answers look."""

    prompts: list[str]
    apply: Callable[[Exchange], str] = field(repr=False)


STYLES = [
    Style(
        ["Answer in capital letters.", "Write all answers in capital letters.", "Always answer in capitals."],
        lambda turn: turn.answer.upper(),
    ),
    Style(
        ["Always end with 'Over.'", "End every answer with 'Over.'", "Finish each reply with 'Over.'"],
        lambda turn: f"{_close(turn.answer)} Over.",
    ),
    Style(
        ["Call the user Captain.", "Address the user as Captain.", "The user wants to be called Captain."],
        lambda turn: f"Captain, {turn.answer}",
    ),
    Style(
        ["Start every answer with 'Well:'", "Begin each reply with 'Well:'"],
        lambda turn: f"Well: {turn.answer}",
    ),
    Style(
        ["Answer in full sentences.", "Always use full sentences.", "Reply with a full sentence."],
        lambda turn: turn.sentence or turn.answer,
    ),
]
NEUTRAL_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Be brief.",
    "Answer the questions of the user.",
    "You are a friendly teacher.",
    "Be kind and correct.",
]
_STYLED = [
    tasks.capital,
    tasks.capital_reverse,
    tasks.world_fact,
    tasks.arithmetic_2,
    tasks.word_problem,
    tasks.unknown,
    tasks.two_step,
]


def styled(rng: random.Random, held_out: bool = False) -> Chat:
    """One to three questions under a system prompt that changes the form of the answer."""
    if rng.random() < 0.12:
        return _named(rng)
    style = rng.choice(STYLES)
    turns = []
    for index in reversed(range(rng.choice([1, 1, 2, 3]))):
        turn = tasks.draw(rng.choice(_STYLED), rng, held_out and index == 0)
        turns.append(replace(turn, task="system-prompt", answer=style.apply(turn)))
    return Chat(turns, system=rng.choice(style.prompts))


def _named(rng: random.Random) -> Chat:
    """A system prompt that names the model or the user."""
    name = rng.choice(facts.NAMES)
    if rng.random() < 0.5:
        question = rng.choice(["Who are you?", "What is your name?"])
        turn = Exchange("system-prompt", question, f"I am {name}.", f"My name is {name}.")
        return Chat([turn], system=rng.choice(["Your name is {}.", "You are {}."]).format(name))
    turn = Exchange("system-prompt", "What is my name?", f"Your name is {name}.", f"The user is called {name}.")
    return Chat([turn], system=rng.choice(["The user is called {}.", "The name of the user is {}."]).format(name))


def short_chat(rng: random.Random) -> Chat:
    """A training chat that fits a row of 1,024 tokens; thinking is on in one of four."""
    draw = rng.random()
    if draw < 0.10:
        chat = styled(rng)
    elif draw < 0.24:
        chat = Chat(recall_short(rng))
    elif draw < 0.34:
        chat = Chat(recall_crowded(rng))
    else:
        chat = Chat([single(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 4]))])
    if not chat.system and rng.random() < 0.08:
        chat.system = rng.choice(NEUTRAL_PROMPTS)
    chat.thinking = rng.random() < 0.25
    return chat
