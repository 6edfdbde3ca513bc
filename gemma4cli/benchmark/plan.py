"""What to measure: tests with llama-bench's names and meaning, checked against the context before anything is loaded.

`pp512 @ d2048` reads 512 tokens of prompt when the cache holds 2,048; `tg128 @ d2048` decodes 128 tokens one by one
from there. A test of the text path, `pp512+tg128`, goes from text to text: tokenizer, sampling, detokenizer included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma4cli.errors import G4Error

Route = Literal["model", "text"]

DEFAULT_PROMPT = 512
DEFAULT_GEN = 128
DEFAULT_DEPTHS = (0, 2 << 10, 8 << 10, 32 << 10, 127 << 10)
_UNITS = {"k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True, order=True)
class Case:
    """One thing to time.

    n_depth: tokens that the cache holds when it begins.
    n_prompt, n_gen: tokens to read in chunks, and tokens to decode one by one.
    path: "model" takes token ids and is greedy, as llama-bench is; "text" is what a user of `g4 run` gets.
    """

    n_depth: int
    n_prompt: int
    n_gen: int
    path: Route = "model"

    @property
    def name(self) -> str:
        """Name the test as llama-bench does."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are processed while the clock runs."""
        return self.n_prompt + self.n_gen

    @property
    def context_needed(self) -> int:
        """Tokens of context; reading a prompt always samples one token more."""
        return self.n_depth + self.tokens + (self.path == "model")


@dataclass(frozen=True)
class Plan:
    """Tests in the order they are reported, how often each is timed, and how many untimed rounds come first."""

    tests: tuple[Case, ...]
    repeats: int
    warmup: int

    @property
    def order(self) -> list[Case]:
        """The order of one round: the depth only grows, and what takes back least comes first at each."""
        return sorted(self.tests, key=lambda test: (test.n_depth, test.path, test.tokens))


def make_plan(
    context_length: int,
    *,
    prompts: Sequence[int] | None = None,
    gens: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    text: bool = True,
    repeats: int = 5,
    warmup: int = 1,
) -> Plan:
    """Cross sizes with depths; None takes defaults that fit.

    The default depths begin at 0: a short prompt in a cache of full size, where losing a context bound shows.

    Raises: G4Error naming the first test that the context cannot hold.
    """
    prompts = [min(DEFAULT_PROMPT, context_length // 2)] if prompts is None else prompts
    gens = [min(DEFAULT_GEN, context_length // 4)] if gens is None else gens
    if depths is None:
        largest = max((*prompts, *gens), default=0)
        pair = max(prompts, default=0) + max(gens, default=0) if text else 0
        room = context_length - max(largest + 1, pair)
        depths = [0, *(depth for depth in DEFAULT_DEPTHS[1:] if depth <= room)]
    tests = []
    for depth in depths:
        tests += [Case(depth, prompt, 0) for prompt in prompts if prompt]
        tests += [Case(depth, 0, gen) for gen in gens if gen]
        if text:
            tests += [Case(depth, prompt, gen, "text") for prompt in prompts for gen in gens if prompt and gen > 1]
    tests = list(dict.fromkeys(tests))
    if not tests:
        raise G4Error("There is nothing to measure: every size is 0.", hint="Give --prompt or --gen.", exit_code=2)
    for test in tests:
        if test.context_needed > context_length:
            raise G4Error(
                f"{test.name} needs a context of {test.context_needed:,} tokens; this one holds {context_length:,}.",
                hint="Use a smaller --depth, --prompt or --gen, or a longer context (--ctx).",
            )
    return Plan(tuple(tests), repeats, warmup)


def parse_sizes(text: str) -> list[int]:
    """Read numbers of tokens as people write them: 0,512,2k (k = 1,024).

    Raises: G4Error for anything else.
    """
    sizes = []
    for part in text.split(","):
        word = part.strip().lower()
        number, unit = (word[:-1], _UNITS[word[-1]]) if word[-1:] in _UNITS else (word, 1)
        if not (number.isascii() and number.isdigit()):
            raise G4Error(
                f"{text!r} is not a list of token counts.", hint="Write numbers like 0,512,2k,32k.", exit_code=2
            )
        sizes.append(int(number) * unit)
    return list(dict.fromkeys(sizes))
