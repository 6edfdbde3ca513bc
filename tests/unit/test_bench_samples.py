"""Medians, percentiles and deviations against numpy and the standard library."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4cli.benchmark.plan import Case
from gemma4cli.benchmark.samples import Row, Sample, mean_and_deviation, percentile, spread

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40)


@given(VALUES, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9)


@given(VALUES)
def test_mean_and_deviation_are_the_standard_librarys(values: list[float]) -> None:
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(statistics.fmean(values))
    expected = statistics.stdev(values) if len(values) > 1 else 0
    assert deviation == pytest.approx(expected, rel=1e-6, abs=1e-9 * max(values))


def test_nothing_measured_is_none_and_not_zero() -> None:
    assert math.isnan(percentile([], 50))
    assert spread([]) == {"median": None, "p10": None, "p90": None}


def test_a_rate_counts_every_token_of_the_test() -> None:
    row = Row(Case(0, 96, 32, "text"), [Sample(seconds=0.5), Sample(seconds=1.0)])
    assert row.rates == [256.0, 128.0]
