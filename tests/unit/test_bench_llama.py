"""The client of llama-bench, against a program that prints what llama-bench prints, and against others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma4cli.benchmark.llama_bench import LlamaBench, parse_rival
from gemma4cli.benchmark.plan import Case, make_plan
from gemma4cli.errors import G4Error
from tests.support.fake_llama_bench import write_llama_bench, write_script

TESTS = make_plan(4096, prompts=[64, 512], gens=[16], depths=[0, 1000]).tests


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def rival(program: Path, gguf: Path, device: str = "cpu", threads: int | None = 2) -> LlamaBench:
    return LlamaBench(program, gguf, TESTS, device, threads)


def test_it_is_asked_for_the_same_tests_and_answers_for_each(tmp_path: Path, gguf: Path) -> None:
    program, log = write_llama_bench(tmp_path)
    other = rival(program, gguf)
    other.run_round()
    other.run_round()
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert asked[0] == asked[1]
    options = dict(zip(asked[0][::2], asked[0][1::2], strict=True))
    assert options == {"-m": str(gguf), "-r": "1", "-o": "json", "-p": "64,512", "-n": "16", "-d": "0,1000",
                       "-ngl": "0", "-t": "2"}  # fmt: skip
    assert set(other.rates) == {test for test in TESTS if test.path == "model"}
    assert other.rates[Case(0, 0, 16)] == [100.0, 100.0]
    assert other.rates[Case(1000, 0, 16)] == [50.0, 50.0]


def test_the_ratio_is_above_one_where_g4_is_faster(tmp_path: Path, gguf: Path) -> None:
    other = rival(write_llama_bench(tmp_path)[0], gguf)
    other.run_round()
    document = other.to_json({Case(0, 0, 16): 150.0, Case(1000, 0, 16): 25.0})
    ratios = {row["test"]: row["ratio"] for row in document["tests"]}
    assert ratios["tg16"] == pytest.approx(1.5)
    assert ratios["tg16 @ d1000"] == pytest.approx(0.5)
    assert ratios["pp64"] is None
    assert (document["build_commit"], document["n_threads"], document["type_k"]) == ("8cf427ff", 2, "f16")


def test_a_gpu_gets_all_layers_and_no_thread_count_of_ours(tmp_path: Path, gguf: Path) -> None:
    command = rival(write_llama_bench(tmp_path)[0], gguf, "cuda", None).command()
    assert command[command.index("-ngl") + 1] == "999"
    assert "-t" not in command


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'main: n_gpu_layers = 0' >&2; echo 'error: failed to load model' >&2; exit 1",
         "exit status 1: error: failed to load model"),
        ("exit 3", "ended with exit status 3."),
        ("echo '| model | size |'", "did not print llama-bench's JSON: '| model | size |'"),
        ("echo '[{\"n_prompt\": 64}]'", "did not print llama-bench's JSON"),
        ("echo '[]'", "gave no result for pp64, pp512, tg16, pp64 @ d1000"),
    ],
)  # fmt: skip
def test_a_program_that_fails_is_reported(tmp_path: Path, gguf: Path, body: str, message: str) -> None:
    with pytest.raises(G4Error) as caught:
        rival(write_script(tmp_path, body), gguf).run_round()
    assert message in caught.value.message


def test_what_cannot_work_is_refused_beforehand(tmp_path: Path, gguf: Path) -> None:
    program, _ = write_llama_bench(tmp_path)
    with pytest.raises(G4Error, match="is not an executable file"):
        rival(gguf, gguf)
    with pytest.raises(G4Error, match="is not an executable file"):
        rival(tmp_path, gguf)
    with pytest.raises(G4Error, match="does not exist"):
        rival(program, tmp_path / "none.gguf")
    with pytest.raises(G4Error, match="is not a GGUF file"):
        rival(program, program)


def test_the_option_names_the_program_and_its_path() -> None:
    assert parse_rival("llama-bench=/opt/llama-bench") == Path("/opt/llama-bench")
    # Without its folder a program is looked for on the PATH, and `./` is dropped from a path.
    assert parse_rival("llama-bench=./llama-bench") == Path.cwd() / "llama-bench"
    for text in ("llama-bench", "llama-bench=", "vllm=/x", "/opt/llama-bench"):
        with pytest.raises(G4Error, match="is not a program to compare with") as caught:
            parse_rival(text)
        assert caught.value.exit_code == 2
