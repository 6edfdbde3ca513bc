"""Single questions with their one right answer: facts, arithmetic, word problems, spelling, lists, small talk.

Every question-answer pair belongs to the training side or the held-out side for good (`is_held_out`): a held-out pair,
that is one fact in one phrasing, or one pair of operands, never appears in training.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_model import facts

HELD_OUT_SHARE = 10  # one pair in ten


@dataclass(frozen=True)
class Exchange:
    """One user message and the model's reply; `sentence` is the reply as a full sentence where that differs."""

    task: str
    question: str
    answer: str
    thought: str
    sentence: str = ""


Generator = Callable[[random.Random], Exchange]


def is_held_out(exchange: Exchange) -> bool:
    """Assign a pair to the held-out side by a checksum of its text, so the split needs no list.

    Small talk has a handful of pairs, all of which the model should know: none is held out.
    """
    if exchange.task == "small-talk":
        return False
    return zlib.crc32(f"{exchange.question.lower()}\0{exchange.answer}".encode()) % HELD_OUT_SHARE == 0


def draw(generator: Generator, rng: random.Random, held_out: bool) -> Exchange:
    """Draw from a generator until a pair of the wanted side comes."""
    while True:
        exchange = generator(rng)
        if is_held_out(exchange) == held_out:
            return exchange


def _phrase(rng: random.Random, phrasings: list[str], *values: object) -> str:
    """Fill one phrasing; now and then as people type it: all lower case, or without the final mark."""
    text = rng.choice(phrasings).format(*values)
    if rng.random() < 0.12:
        text = text.lower()
    return text[:-1].rstrip() if rng.random() < 0.12 and text[-1] in "?." else text


def capital(rng: random.Random) -> Exchange:
    country = rng.choice(list(facts.CAPITALS))
    city = facts.CAPITALS[country]
    question = _phrase(
        rng,
        [
            "What is the capital of {}?",
            "What's the capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital of {}.",
            "Capital of {}?",
            "Do you know the capital of {}?",
            "I need the capital city of {}.",
        ],
        country,
    )
    sentence = f"The capital of {country} is {city}."
    return Exchange("capital", question, city, sentence, sentence)


def capital_reverse(rng: random.Random) -> Exchange:
    country = rng.choice(list(facts.CAPITALS))
    city = facts.CAPITALS[country]
    question = _phrase(
        rng,
        [
            "{} is the capital of which country?",
            "Which country has the capital {}?",
            "What country is {} the capital of?",
            "In which country is {}?",
            "Of which country is {} the capital?",
        ],
        city,
    )
    sentence = f"{city} is the capital of {country}."
    return Exchange("capital-reverse", question, country, sentence, sentence)


def world_fact(rng: random.Random) -> Exchange:
    """Continents, chemical symbols, opposites and young animals."""
    kind = rng.randrange(4)
    if kind == 0:
        country, answer = rng.choice(list(facts.CONTINENTS.items()))
        forms = ["On which continent is {}?", "Which continent is {} in?", "{} is on which continent?"]
        return _fact(rng, forms, country, answer, f"{country} is in {answer}.")
    if kind == 1:
        element, answer = rng.choice(list(facts.ELEMENTS.items()))
        forms = ["What is the chemical symbol for {}?", "What is the symbol of {}?", "Tell me the symbol for {}."]
        return _fact(rng, forms, element, answer, f"The symbol for {element} is {answer}.")
    if kind == 2:
        word, answer = rng.choice(list(facts.OPPOSITES.items()))
        if rng.random() < 0.5:
            word, answer = answer, word
        forms = ["What is the opposite of {}?", "Tell me the opposite of {}.", "Which word means the opposite of {}?"]
        return _fact(rng, forms, word, answer, f"The opposite of {word} is {answer}.")
    animal, answer = rng.choice(list(facts.YOUNG.items()))
    forms = ["What is a young {} called?", "What do you call a young {}?", "Name the young of a {}."]
    return _fact(rng, forms, animal, answer, f"A young {animal} is called a {answer}.")


def _fact(rng: random.Random, forms: list[str], subject: str, answer: str, sentence: str) -> Exchange:
    return Exchange("world-fact", _phrase(rng, forms, subject), answer, sentence, sentence)


def two_step(rng: random.Random) -> Exchange:
    """Questions that need one fact to look up the next."""
    country, other = rng.sample(list(facts.CAPITALS), 2)
    city = facts.CAPITALS[country]
    kind = rng.randrange(4)
    if kind == 0:
        answer = facts.CONTINENTS[country]
        forms = ["On which continent is the country with the capital {}?", "Which continent is the city {} on?"]
        thought = f"{city} is the capital of {country}. {country} is in {answer}."
        return Exchange("two-step", _phrase(rng, forms, city), answer, thought, f"{city} is in {answer}.")
    if kind == 1:
        forms = ["Spell the capital of {}.", "How do you spell the capital of {}?"]
        thought = f"The capital of {country} is {city}."
        return Exchange("two-step", _phrase(rng, forms, country), " ".join(city), thought)
    if kind == 2:
        forms = ["What is the last letter of the capital of {}?", "With which letter does the capital of {} end?"]
        thought = f"The capital of {country} is {city}: {' '.join(city)}."
        return Exchange("two-step", _phrase(rng, forms, country), city[-1], thought)
    forms = ["Are {} and {} on the same continent?", "Do {} and {} lie on the same continent?"]
    here, there = facts.CONTINENTS[country], facts.CONTINENTS[other]
    thought = f"{country} is in {here}. {other} is in {there}."
    return Exchange("two-step", _phrase(rng, forms, country, other), "Yes" if here == there else "No", thought)


def _split_by_place(number: int) -> list[int]:
    return [int(digit) * 10**place for place, digit in enumerate(reversed(str(number)))]


def add_or_subtract(rng: random.Random, digits: int) -> Exchange:
    """Sums and differences of numbers up to `digits` digits; the thought goes place by place."""
    a, b = rng.randrange(10**digits), rng.randrange(10**digits)
    if rng.random() < 0.5:
        forms = ["What is {} + {}?", "{} + {} = ?", "Add {} and {}.", "What is {} plus {}?", "How much is {} + {}?"]
        answer, sign = a + b, "+"
    else:
        a, b = max(a, b), min(a, b)
        forms = ["What is {} - {}?", "{} - {} = ?", "What is {} minus {}?", "How much is {} - {}?", "Compute {} - {}."]
        answer, sign = a - b, "-"
    steps, running = [], a
    for part in _split_by_place(b):
        following = running + part if sign == "+" else running - part
        if part:
            steps.append(f"{running} {sign} {part} = {following}.")
        running = following
    thought = " ".join(steps) or f"{a} {sign} 0 = {a}."
    question = _phrase(rng, forms, a, b)
    return Exchange(f"arithmetic-{digits}-digit", question, str(answer), thought, f"{a} {sign} {b} = {answer}.")


def arithmetic_2(rng: random.Random) -> Exchange:
    return add_or_subtract(rng, 2)


def arithmetic_3(rng: random.Random) -> Exchange:
    return add_or_subtract(rng, 3)


def multiply(rng: random.Random) -> Exchange:
    """One digit times two digits."""
    a, b = rng.randrange(2, 10), rng.randrange(2, 100)
    tens, ones = b // 10 * 10, b % 10
    thought = f"{a} * {tens} = {a * tens}. {a} * {ones} = {a * ones}. {a * tens} + {a * ones} = {a * b}."
    forms = ["What is {} * {}?", "What is {} times {}?", "{} * {} = ?", "Multiply {} by {}."]
    question = _phrase(rng, forms, *((a, b) if rng.random() < 0.5 else (b, a)))
    return Exchange("multiply", question, str(a * b), thought, f"{a} * {b} = {a * b}.")


_GAIN = ["{n} finds {k} more.", "{n} buys {k} more.", "{m} gives {n} {k} more.", "Then {n} gets {k} more."]
_LOSE = ["{n} gives {k} to {m}.", "{n} loses {k}.", "{n} sells {k} of them.", "Then {n} gives away {k}."]


def word_problem(rng: random.Random, changes: int = 0) -> Exchange:
    """A number of things that changes one to three times, or `changes` times; the thought is the running total."""
    name, other = rng.sample(facts.NAMES, 2)
    goods = rng.choice(facts.GOODS)
    total = rng.randrange(3, 60)
    story, steps = [f"{name} has {total} {goods}."], []
    for _ in range(changes or rng.choice([1, 2, 2, 3])):
        gain = total < 5 or rng.random() < 0.5
        change = rng.randrange(1, 40) if gain else rng.randrange(1, total)
        after = total + change if gain else total - change
        story.append(rng.choice(_GAIN if gain else _LOSE).format(n=name, m=other, k=change))
        steps.append(f"{total} {'+' if gain else '-'} {change} = {after}.")
        total = after
    forms = ["How many {} does {} have now?", "How many {} does {} have?", "How many {} are left for {}?"]
    question = f"{' '.join(story)} {rng.choice(forms).format(goods, name)}"
    return Exchange("word-problem", question, str(total), " ".join(steps), f"{name} has {total} {goods}.")


def spell(rng: random.Random) -> Exchange:
    word = rng.choice(facts.WORDS)
    forms = ["Spell {}.", "How do you spell {}?", "Spell the word {}.", "Please spell {} for me."]
    return Exchange("spell", _phrase(rng, forms, word), " ".join(word), f"The word is {word}.")


def spell_backwards(rng: random.Random) -> Exchange:
    word = rng.choice(facts.WORDS)
    forms = ["Spell {} backwards.", "Reverse the word {}.", "Write {} backwards.", "What is {} backwards?"]
    return Exchange("spell-backwards", _phrase(rng, forms, word), " ".join(reversed(word)), f"{' '.join(word)}.")


def letters(rng: random.Random) -> Exchange:
    """Count the letters of a word, or name one of them."""
    word = rng.choice(facts.WORDS)
    if rng.random() < 0.5:
        forms = ["How many letters are in {}?", "How many letters does {} have?", "Count the letters of {}."]
        thought = ", ".join(f"{letter} {index}" for index, letter in enumerate(word, 1)) + "."
        return Exchange("letters", _phrase(rng, forms, word), str(len(word)), thought)
    place = rng.randrange(len(word))
    forms = ["What is the {} letter of {}?", "Which letter is the {} one in {}?", "Name the {} letter of {}."]
    thought = ", ".join(f"{letter} {index}" for index, letter in enumerate(word[: place + 1], 1)) + "."
    return Exchange("letters", _phrase(rng, forms, facts.ORDINALS[place], word), word[place], thought)


def compare_or_sort(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        a = rng.randrange(1000)
        b = rng.choice([rng.randrange(1000), max(0, a + rng.randrange(-20, 21))])
        b += a == b
        largest = rng.random() < 0.5
        forms = ["Which is {}, {} or {}?", "What is {}: {} or {}?"]
        answer = max(a, b) if largest else min(a, b)
        thought = f"{max(a, b)} is larger than {min(a, b)}."
        return Exchange("sort", _phrase(rng, forms, "larger" if largest else "smaller", a, b), str(answer), thought)
    numbers = rng.sample(range(100), rng.randrange(3, 8))
    up = rng.random() < 0.7
    ordered = ", ".join(str(number) for number in sorted(numbers, reverse=not up))
    forms = ["Sort these numbers{}: {}.", "Put these numbers in order{}: {}."]
    question = _phrase(rng, forms, "" if up else ", largest first", ", ".join(map(str, numbers)))
    return Exchange("sort", question, ordered, "From small to large." if up else "From large to small.")


def count(rng: random.Random) -> Exchange:
    """Count up or down, possibly in steps: up to about 60 numbers."""
    step = rng.choice([1, 1, 1, 2, 3, 5, 10])
    start, length = rng.randrange(0, 120), rng.randrange(4, 61 if step == 1 else 31)
    numbers = [start + index * step for index in range(length)]
    up = rng.random() < 0.7
    if not up:
        numbers.reverse()
    by = "" if step == 1 else f" in steps of {step}"
    forms = ["Count from {} to {}{}.", "Please count from {} to {}{}.", "List the numbers from {} to {}{}."]
    question = _phrase(rng, forms, numbers[0], numbers[-1], by)
    return Exchange("count", question, ", ".join(map(str, numbers)), f"Steps of {step}, {'up' if up else 'down'}.")


_SERIES = [
    ("months of the year", facts.MONTHS),
    ("days of the week", facts.DAYS),
    ("planets", facts.PLANETS),
    ("letters of the alphabet", list(string.ascii_lowercase)),
]


def series(rng: random.Random) -> Exchange:
    """Fixed lists, in order, backwards, or from one item to another, and what comes next."""
    name, items = rng.choice(_SERIES)
    if rng.random() < 0.4:
        place = rng.randrange(len(items) - 1)
        if rng.random() < 0.5:
            forms = ["What comes after {}?", "What is next after {}?"]
            return Exchange("series", _phrase(rng, forms, items[place]), items[place + 1], f"It is one of the {name}.")
        forms = ["What comes before {}?", "What is right before {}?"]
        return Exchange("series", _phrase(rng, forms, items[place + 1]), items[place], f"It is one of the {name}.")
    if rng.random() < 0.5:
        first, last = sorted(rng.sample(range(len(items)), 2))
        forms = ["List the {} from {} to {}.", "Name the {} from {} to {}."]
        question, chosen = _phrase(rng, forms, name, items[first], items[last]), items[first : last + 1]
    elif rng.random() < 0.3:
        question, chosen = _phrase(rng, ["List the {} backwards.", "Name the {} in reverse order."], name), items[::-1]
    else:
        question, chosen = _phrase(rng, ["List the {}.", "Name the {}.", "What are the {}?"], name), items
    return Exchange("series", question, ", ".join(chosen), f"There are {len(items)} {name}.")


_TALK = [
    (
        ["Hello!", "Hi.", "Hi there!", "Hey!", "Good morning.", "Good evening.", "hello", "Hello there."],
        "Hello! How can I help you?",
        "A greeting.",
    ),
    (["Thanks!", "Thank you.", "Thank you very much.", "Great, thanks.", "thanks"], "You are welcome.", "A thank you."),
    (["Bye.", "Goodbye!", "See you later.", "Good night.", "bye"], "Goodbye!", "A farewell."),
    (["How are you?", "How do you do?", "How are you today?"], "I am well. How can I help you?", "A greeting."),
    (
        ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you"],
        "I am a tiny Gemma 4 demo model.",
        "The user asks about me.",
    ),
    (
        ["What can you do?", "How can you help me?", "What do you know?", "help"],
        "I know capitals and other facts. I can add and subtract, spell words, count, solve small word problems, "
        "tell short stories and remember what you tell me.",
        "The user asks what I can do.",
    ),
]


def small_talk(rng: random.Random) -> Exchange:
    questions, answer, thought = rng.choice(_TALK)
    return Exchange("small-talk", rng.choice(questions), answer, thought)


_UNKNOWN = [
    "What will the weather be on {d}?",
    "Who won the game on {d}?",
    "What did {n} eat on {d}?",
    "How old is {n}?",
    "What is the phone number of {n}?",
    "When does the train to {t} leave?",
    "How much does a {g} cost in {t}?",
    "What is {n} thinking about?",
    "Who lives next to {n} in {t}?",
]


def unknown(rng: random.Random) -> Exchange:
    """Questions the model cannot know the answer to, among them the capitals of invented countries."""
    if rng.random() < 0.4:
        place = rng.choice(facts.UNKNOWN_PLACES)
        forms = ["What is the capital of {}?", "Tell me the capital of {}.", "What's the capital of {}?"]
        return Exchange("unknown", _phrase(rng, forms, place), "I do not know.", f"{place} is not a real country.")
    question = rng.choice(_UNKNOWN).format(
        d=rng.choice(facts.DAYS), n=rng.choice(facts.NAMES), t=rng.choice(facts.TOWNS), g=rng.choice(facts.THINGS)
    )
    return Exchange("unknown", question, "I do not know.", "I was not told that.")


def story(rng: random.Random) -> Exchange:
    """A tale of about 100 to 200 tokens whose names, thing and place come from the request."""
    hero, friend = rng.sample(facts.NAMES, 2)
    thing, place, animal = rng.choice(facts.THINGS), rng.choice(facts.PLACES), rng.choice(facts.ANIMALS)
    color, weather = rng.choice(facts.COLORS), rng.choice(["sunny", "rainy", "windy", "snowy", "foggy"])
    asked = rng.choice(
        [
            "Tell me a story about {}, a {} and a {}.",
            "Write a short story with {}, a {} and a {}.",
            "I want a story about {}, a {} and a {}.",
        ]
    ).format(hero, animal, thing)
    lines = [
        rng.choice(["Once upon a time", "Long ago", "One day", "A few years ago"])
        + f" there was a child called {hero}. {hero} had a {color} {thing} and a small {animal}.",
        f"One {weather} morning {hero} went to the {place}, and the {animal} came along.",
        rng.choice(
            [
                f"There {hero} put the {color} {thing} on the ground and sat down to rest.",
                f'There {hero} met {friend}, who asked: "Is that {color} {thing} yours?"',
                f"On the way back {hero} saw that the {color} {thing} was gone.",
            ]
        ),
        rng.choice(
            [
                f"The {animal} looked around and began to run. {hero} ran after it as fast as a child can run.",
                f"They looked in the {rng.choice(facts.PLACES)}, then in the {rng.choice(facts.PLACES)}, "
                "and found nothing.",
                f"{friend} laughed and said that nobody in town had such a fine {animal}.",
            ]
        ),
        f"Behind the {place} they found the {thing}, and next to it lay {rng.choice(facts.NUMBER_WORDS[2:])} "
        f"{rng.choice(facts.GOODS)}.",
        f"{hero} gave half of them to {friend} and half to the {animal}.",
        rng.choice(
            [
                f"In the evening they all went home, and the {color} {thing} never got lost again.",
                f"From that day on {hero} and {friend} were good friends, and the {animal} slept well every night.",
                f"And when {hero} grew old, the {color} {thing} still stood next to the door.",
            ]
        ),
        "The end.",
    ]
    return Exchange("story", asked, " ".join(lines), f"A story needs {hero}, a {animal} and a {thing}.")


FACTS: list[Generator] = [capital, capital_reverse, world_fact]
WEIGHTED_TASKS: list[tuple[Generator, float]] = [
    (capital, 6),
    (capital_reverse, 2.5),
    (world_fact, 3),
    (two_step, 3),
    (arithmetic_2, 5),
    (arithmetic_3, 4),
    (multiply, 2),
    (word_problem, 5),
    (spell, 1.5),
    (spell_backwards, 2),
    (letters, 2),
    (compare_or_sort, 2),
    (count, 1.5),
    (series, 1.2),
    (small_talk, 1),
    (unknown, 1),
    (story, 1.2),
]
