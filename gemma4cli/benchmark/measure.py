"""The clockwork: brings an engine's cache to a depth, times what comes next, and checks that it measured what it says.

One round runs every test once, from depth 0 to the deepest, so that a disturbance of the machine spreads over all tests
and a deep cache is filled once per round. A test of the model feeds fixed random tokens: `pp` in the engine's chunks,
`tg` one by one through the same steps that decoding takes. Time is taken inside the engine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from gemma4cli.benchmark.plan import Case, Plan
from gemma4cli.benchmark.samples import GpuState, Row, Sample
from gemma4cli.engine.base import Engine, GenerationRequest, GenerationResult
from gemma4cli.errors import G4Error
from gemma4cli.model.settings import GREEDY
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from gemma4cli.model.chat import Chat

_SESSION = "bench"
_WORDS = (" the", " a", "a", "1", ".")


class GpuReader(Protocol):
    """Something that knows a GPU's state; `device.Gpu` is one."""

    def read(self) -> GpuState: ...


@dataclass
class Peaks:
    """The most memory that the engine has reported; None where it reports none."""

    host_bytes: int | None = None
    device_bytes: int | None = None

    def see(self, result: GenerationResult) -> None:
        stats = result.stats
        self.host_bytes = max(filter(None, (self.host_bytes, stats.peak_host_bytes)), default=None)
        self.device_bytes = max(filter(None, (self.device_bytes, stats.peak_device_bytes)), default=None)


@dataclass
class Probe:
    """Runs single tests on an engine.

    chat: the model's tokenizer and sampling; needed for tests of the text path only.
    """

    engine: Engine
    vocab_size: int
    chat: Chat | None = None
    gpu: GpuReader | None = None
    peaks: Peaks = field(default_factory=Peaks)
    _streams: int = 0
    _base: tuple[int, ...] = ()

    def begin_round(self, deepest: int) -> None:
        """Draw the tokens that fill the cache in this round."""
        self._base = self._stream(deepest)

    def run(self, test: Case) -> Sample:
        """Run a test once.

        Raises: RuntimeError when the engine did not start at the depth asked for, or read another number of tokens.
        """
        prepared = self.prepare(test)
        before = self.gpu.read() if self.gpu else None
        sample = prepared()
        if self.gpu is None or before is None:
            return sample
        after = self.gpu.read()
        known = after.energy_j is not None and before.energy_j is not None
        return replace(sample, gpu=after, joules=after.energy_j - before.energy_j if known else None)

    def prepare(self, test: Case) -> Callable[[], Sample]:
        """Bring the cache to a test's depth; what is returned does the timed part, once."""
        return self._prepare_text(test) if test.path == "text" else self._prepare_model(test)

    def _prepare_model(self, test: Case) -> Callable[[], Sample]:
        if test.n_depth:
            self._generate(self._base[: test.n_depth])
            tokens = self._base[: test.n_depth + test.tokens]
        else:
            tokens = self._stream(test.tokens)  # begins with a token that the cache does not hold at position 0

        def measure() -> Sample:
            result = self._generate(tokens, chunk=1 if test.n_gen else None)
            self._check(test, result, len(tokens))
            rate = result.stats.prefill_tok_s
            if rate is None:
                raise RuntimeError(f"the engine gave no time for {test.name}")
            seconds = test.tokens / rate
            return Sample(seconds, ttft_s=None if test.n_gen else seconds)

        return measure

    def _prepare_text(self, test: Case) -> Callable[[], Sample]:
        if self.chat is None:
            raise RuntimeError(f"{test.name} needs a tokenizer")
        chat = self.chat
        text, ids = exact_text(chat, test.n_depth + test.n_prompt)
        # At depth 0 the cache is left with one token that no prompt begins with.
        self._generate(ids[: test.n_depth] if test.n_depth else ((ids[0] + 1) % self.vocab_size,))
        sampling = chat.defaults.sampling(seed=self._streams)
        self._streams += 1

        def measure() -> Sample:
            started = time.perf_counter()
            prompt = chat.raw_ids(text)
            splitter = chat.splitter(prompt)
            generation = self.engine.generate(
                GenerationRequest(tuple(prompt), test.n_gen, sampling, frozenset(), session=_SESSION)
            )
            times = []
            for token in generation:
                splitter.push(token)
                times.append(time.perf_counter())
            self.peaks.see(generation.result)
            self._check(test, generation.result, test.n_depth + test.n_prompt)
            if len(times) != test.n_gen:
                raise RuntimeError(f"{test.name} decoded {len(times)} tokens")
            return Sample(times[-1] - started, ttft_s=times[0] - started, decode_s=times[-1] - times[0])

        return measure

    def _generate(self, tokens: Iterable[int], chunk: int | None = None) -> GenerationResult:
        generation = self.engine.generate(
            GenerationRequest(tuple(tokens), 1, GREEDY, frozenset(), session=_SESSION, chunk=chunk)
        )
        for _ in generation:
            pass
        self.peaks.see(generation.result)
        return generation.result

    def _stream(self, count: int) -> tuple[int, ...]:
        """Return random tokens; two streams in a row differ in the first."""
        self._streams += 1
        source = random.Random(self._streams)
        first = self._streams % self.vocab_size
        return (first, *(source.randrange(self.vocab_size) for _ in range(count - 1)))

    @staticmethod
    def _check(test: Case, result: GenerationResult, tokens: int) -> None:
        stats = result.stats
        if (stats.reused_tokens, stats.prompt_tokens) != (test.n_depth, tokens):
            raise RuntimeError(
                f"{test.name} began at depth {stats.reused_tokens} and read up to {stats.prompt_tokens} of {tokens}"
            )


@dataclass
class Measured:
    """The rows of a plan in its order; `complete` is False when Ctrl-C ended it early."""

    rows: list[Row]
    complete: bool


def measure(
    plan: Plan,
    probe: Probe,
    *,
    between_rounds: Callable[[], None] | None = None,
    progress: Progress = SILENT,
) -> Measured:
    """Run the rounds of a plan: `warmup` of them without keeping anything, then `repeats`.

    between_rounds: what is to be measured alternately with this; called after every timed round.
    Raises: KeyboardInterrupt when Ctrl-C came before anything was measured.
    """
    rows = {test: Row(test) for test in plan.tests}
    rounds = plan.warmup + plan.repeats
    deepest = max(test.context_needed for test in plan.tests)
    try:
        with progress.phase("measure", rounds * len(plan.tests), "runs") as task:
            for number in range(rounds):
                probe.begin_round(deepest)
                for test in plan.order:
                    task.advance(0, f"{'warm up' if number < plan.warmup else test.path} {test.name}")
                    sample = probe.run(test)
                    if number >= plan.warmup:
                        rows[test].samples.append(sample)
                    task.advance(1)
                if number >= plan.warmup and between_rounds is not None:
                    between_rounds()
    except KeyboardInterrupt:
        if not any(row.samples for row in rows.values()):
            raise
        return Measured([row for row in rows.values() if row.samples], complete=False)
    return Measured(list(rows.values()), complete=True)


def exact_text(chat: Chat, count: int) -> tuple[str, tuple[int, ...]]:
    """Return a text that the model's tokenizer turns into exactly `count` ids, BOS included, and these ids.

    Every beginning of the text has the beginning of the ids, because it repeats a word that is always one token.
    Raises: G4Error when the tokenizer merges every word that is tried.
    """
    fixed = len(chat.raw_ids(""))
    for word in _WORDS:
        text = word * (count - fixed)
        ids = tuple(chat.raw_ids(text))
        if len(ids) == count and len(set(ids[fixed + 1 :])) <= 1:
            return text, ids
    raise G4Error(
        f"This model's tokenizer gives no text of exactly {count} tokens to measure with.",
        hint="Measure the model alone: --no-text.",
    )
