"""The clockwork on a real, tiny model: depths are what they are called, work is not repeated, Ctrl-C keeps results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma4cli.benchmark.measure import Probe, exact_text, measure
from gemma4cli.benchmark.plan import Case, Plan, make_plan
from gemma4cli.benchmark.samples import GpuState
from gemma4cli.engine.base import Engine, Generation, GenerationRequest, GenerationResult
from gemma4cli.engine.eager import EagerEngine
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat
from tests.support.bundles import DEMO_MODEL
from tests.support.tiny import write_checkpoint

CONTEXT, CHUNK, VOCAB = 96, 12, 160


class Watched(Engine):
    """Passes everything on to a real engine and keeps the requests and their results."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[tuple[GenerationRequest, GenerationResult]] = []
        self.before_request = lambda number: None
        self.change = lambda result: result

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    def generate(self, request: GenerationRequest) -> Generation:
        self.before_request(len(self.seen))
        generation = self.engine.generate(request)

        def stream(cancelled) -> Iterator[int]:
            yield from generation
            result = self.change(generation.result)
            self.seen.append((request, result))
            return result

        return Generation(stream)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", num_hidden_layers=2,
                            layer_types=["sliding_attention", "full_attention"])  # fmt: skip


@pytest.fixture
def engine(folder: Path) -> Watched:
    return Watched(EagerEngine.from_checkpoint(folder, context_length=CONTEXT, prefill_chunk=CHUNK))


@pytest.fixture
def probe(engine: Watched, folder: Path) -> Probe:
    return Probe(engine, VOCAB, Chat.from_dir(folder))


def plan(repeats: int = 2, warmup: int = 0, **sizes) -> Plan:
    sizes = {"prompts": [20], "gens": [8], "depths": [0, 16, 40], **sizes}
    return make_plan(CONTEXT, repeats=repeats, warmup=warmup, **sizes)


def test_every_sample_begins_at_its_depth_and_reads_what_it_says(probe: Probe, engine: Watched) -> None:
    measured = measure(plan(), probe)
    assert measured.complete
    assert [len(row.samples) for row in measured.rows] == [2] * 9
    timed = [(request, result.stats) for request, result in engine.seen if result.stats.reused_tokens in (0, 16, 40)]
    for row in measured.rows:
        test = row.test
        chunk = 1 if test.path == "model" and test.n_gen else None
        read = test.n_depth + (test.n_prompt if test.path == "text" else test.tokens)
        matching = [
            stats
            for request, stats in timed
            if (stats.reused_tokens, stats.prompt_tokens, request.chunk) == (test.n_depth, read, chunk)
            and stats.generated_tokens == (test.n_gen if test.path == "text" else 1)
        ]
        assert len(matching) >= 2, test.name


def test_a_depth_is_reached_from_the_one_before(probe: Probe, engine: Watched) -> None:
    """Going deeper reads only what is new."""
    measure(plan(repeats=1, gens=[8], prompts=[], text=False), probe)
    computed = sum(result.stats.prompt_tokens - result.stats.reused_tokens for _, result in engine.seen)
    # 8 at depth 0; then 16 from nothing and 8; these 24 stay, so 16 more lead to 40, and 8.
    assert computed == 8 + (16 + 8) + (16 + 8)


def test_two_runs_at_depth_zero_share_no_prefix(probe: Probe, engine: Watched) -> None:
    measure(plan(repeats=5, depths=[0], text=False), probe)
    firsts = [request.tokens[0] for request, _ in engine.seen]
    assert all(one != following for one, following in itertools.pairwise(firsts))


@pytest.mark.parametrize("field", ["reused_tokens", "prompt_tokens"])
def test_an_engine_that_measures_something_else_is_found_out(probe: Probe, engine: Watched, field: str) -> None:
    def wrong(result: GenerationResult) -> GenerationResult:
        return replace(result, stats=replace(result.stats, **{field: getattr(result.stats, field) + 1}))

    engine.change = wrong
    for test in (Case(16, 0, 8), Case(16, 20, 8, "text")):
        probe.begin_round(60)
        with pytest.raises(RuntimeError, match="began at depth"):
            probe.run(test)


def test_an_engine_that_stops_early_is_found_out(probe: Probe, engine: Watched) -> None:
    class Short(Watched):
        def generate(self, request: GenerationRequest) -> Generation:
            return super().generate(replace(request, max_new_tokens=1))

    probe.engine = Short(engine)
    probe.begin_round(60)
    with pytest.raises(RuntimeError, match=r"pp20\+tg8 decoded 1 tokens"):
        probe.run(Case(0, 20, 8, "text"))


def test_times_are_those_of_the_work(probe: Probe) -> None:
    """A sample lies within what a clock around it shows, and is most of it."""
    probe.begin_round(60)
    for test in (Case(0, 0, 24), Case(0, 60, 0), Case(0, 40, 24, "text")):
        probe.run(test)
        started = time.perf_counter()
        sample = probe.run(test)
        around = time.perf_counter() - started
        assert 0.05 * around < sample.seconds <= around, test.name
        if test.path == "text":
            assert sample.ttft_s is not None and sample.decode_s is not None
            assert sample.ttft_s + sample.decode_s == pytest.approx(sample.seconds)


def test_warm_up_rounds_leave_no_samples(probe: Probe, engine: Watched) -> None:
    measured = measure(plan(repeats=3, warmup=2, depths=[0], prompts=[], text=False), probe)
    assert len(measured.rows[0].samples) == 3
    assert len(engine.seen) == 5


def test_rounds_alternate_with_something_else(probe: Probe, engine: Watched) -> None:
    seen: list[int] = []
    measure(
        plan(repeats=3, warmup=1, depths=[0], text=False), probe, between_rounds=lambda: seen.append(len(engine.seen))
    )
    assert seen == [4, 6, 8]


def test_ctrl_c_keeps_what_was_measured(probe: Probe, engine: Watched) -> None:
    def interrupt(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    engine.before_request = interrupt
    measured = measure(plan(repeats=4, depths=[0], text=False), probe)
    assert not measured.complete
    assert sum(len(row.samples) for row in measured.rows) == 5


def test_ctrl_c_before_anything_was_measured_is_an_interruption(probe: Probe, engine: Watched) -> None:
    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    engine.before_request = interrupt
    with pytest.raises(KeyboardInterrupt):
        measure(plan(), probe)


def test_energy_is_the_difference_over_the_timed_part(probe: Probe) -> None:
    class Meter:
        energy = 100.0

        def read(self) -> GpuState:
            self.energy += 2.5
            return GpuState(1980, 41, 300.0, self.energy, 1 << 30)

    probe.gpu = Meter()
    probe.begin_round(60)
    sample = probe.run(Case(16, 0, 8))
    assert sample.joules == 2.5
    assert sample.gpu is not None and sample.gpu.sm_clock_mhz == 1980


def test_peak_memory_is_the_largest_that_was_reported(probe: Probe) -> None:
    measure(plan(repeats=1, depths=[0], text=False), probe)
    assert probe.peaks.host_bytes is not None and probe.peaks.host_bytes > 1 << 20
    assert probe.peaks.device_bytes is None


@pytest.mark.parametrize("count", [2, 3, 20, 511])
def test_a_text_has_exactly_the_tokens_that_are_asked_for(count: int, folder: Path) -> None:
    for source in (DEMO_MODEL, folder):
        chat = Chat.from_dir(source)
        text, ids = exact_text(chat, count)
        assert tuple(chat.raw_ids(text)) == ids
        assert len(ids) == count
        assert exact_text(chat, count + 7)[1][:count] == ids


def test_a_tokenizer_that_merges_every_word_is_refused() -> None:
    class Merging:
        def raw_ids(self, text: str) -> list[int]:
            return [2, 9] if text else [2]

    with pytest.raises(G4Error, match="gives no text of exactly 12 tokens"):
        exact_text(Merging(), 12)
