"""What a benchmark runs: sizes as people write them, llama-bench's names, defaults that fit, refusals beforehand."""

from __future__ import annotations

import pytest

from gemma4cli.benchmark.plan import Case, make_plan, parse_sizes
from gemma4cli.errors import G4Error


def names(plan) -> list[str]:
    return [test.name for test in plan.tests if test.path == "model"]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("512", [512]), ("0,2k,8K", [0, 2048, 8192]), ("127k, 1m", [130048, 1 << 20]), ("64,64", [64])],
)
def test_sizes_are_read_as_people_write_them(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "512,", "half", "-1", "2.5k", "k", "1e3"])
def test_anything_else_is_no_list_of_sizes(text: str) -> None:
    with pytest.raises(G4Error, match="is not a list of token counts") as caught:
        parse_sizes(text)
    assert caught.value.exit_code == 2


def test_tests_are_named_as_llama_bench_names_them() -> None:
    plan = make_plan(16384, prompts=[512, 2048], gens=[128], depths=[0, 8192], text=False)
    assert names(plan) == ["pp512", "pp2048", "tg128", "pp512 @ d8192", "pp2048 @ d8192", "tg128 @ d8192"]
    assert Case(2048, 512, 128, "text").name == "pp512+tg128 @ d2048"


@pytest.mark.parametrize(
    ("context", "depths"),
    [(131072, [0, 2048, 8192, 32768, 130048]), (4096, [0, 2048]), (2048, [0]), (96, [0])],
)
def test_the_default_sweep_fits_and_begins_in_an_empty_cache_of_full_size(context: int, depths: list[int]) -> None:
    plan = make_plan(context)
    assert sorted({test.n_depth for test in plan.tests}) == depths
    assert {test.path for test in plan.tests} == {"model", "text"}
    assert max(test.context_needed for test in plan.tests) <= context
    assert plan.repeats == 5


@pytest.mark.parametrize("context", range(8, 40))
def test_defaults_fit_into_the_smallest_contexts(context: int) -> None:
    assert max(test.context_needed for test in make_plan(context).tests) <= context


def test_what_the_context_cannot_hold_is_refused_with_both_numbers() -> None:
    fits = make_plan(1025, prompts=[512], gens=[128], depths=[512], text=False)
    assert names(fits) == ["pp512 @ d512", "tg128 @ d512"]
    with pytest.raises(G4Error, match=r"pp512 @ d512 needs a context of 1,025 tokens; this one holds 1,024\."):
        make_plan(1024, prompts=[512], gens=[128], depths=[512], text=False)
    with pytest.raises(G4Error, match=r"pp512\+tg128 @ d512 needs a context of 1,152 tokens"):
        make_plan(1025, prompts=[512], gens=[128], depths=[512])


def test_nothing_to_measure_is_wrong_usage() -> None:
    with pytest.raises(G4Error, match="nothing to measure") as caught:
        make_plan(1024, prompts=[0], gens=[0])
    assert caught.value.exit_code == 2


def test_a_round_only_goes_deeper() -> None:
    plan = make_plan(4096, prompts=[512, 64], gens=[128], depths=[1024, 0])
    order = plan.order
    assert [test.n_depth for test in order] == sorted(test.n_depth for test in order)
    assert [test.name for test in order[:3]] == ["pp64", "tg128", "pp512"]
    assert sorted(order) == sorted(plan.tests)
