"""Write the text that shows what quantization costs: held-out chats with long model turns, one after another.

The demo model learned to write model turns only, so perplexity means something inside `<|turn>model … <turn|>` and
nothing in the users' words. Every chat begins with `<bos>`.

    python -m tools.demo_model.write_eval_text gemma4cli/data/demo/eval.txt
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tools.demo_model import chats, tasks
from tools.demo_model.chats import Chat

SEED = 7
SIZE_BYTES = 48_000
_ALONE = [
    (tasks.story, False, 5),
    (tasks.count, False, 3),
    (tasks.series, False, 1),
    (tasks.word_problem, True, 4),
    (tasks.arithmetic_3, True, 3),
    (tasks.multiply, True, 3),
    (tasks.letters, True, 2),
    (tasks.two_step, True, 2),
]


def held_out_chats(rng: random.Random) -> Iterator[Chat]:
    """Mostly one question with a long answer or a thought; now and then facts to recall."""
    generators, thinking, weights = zip(*_ALONE, strict=True)
    while True:
        if rng.random() < 0.12:
            yield Chat(chats.recall_short(rng, held_out=True), thinking=True)
        else:
            index = rng.choices(range(len(generators)), weights)[0]
            yield Chat([tasks.draw(generators[index], rng, held_out=True)], thinking=thinking[index])


def eval_text() -> str:
    text = ""
    for chat in held_out_chats(random.Random(SEED)):
        text += "".join(piece for piece, _ in chat.segments()) + "\n"
        if len(text.encode()) >= SIZE_BYTES:
            return text
    raise AssertionError("unreachable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.parse_args().target.write_text(eval_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
