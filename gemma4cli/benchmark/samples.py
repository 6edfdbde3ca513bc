"""What measuring gives: samples, and the numbers that stand for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma4cli.benchmark.plan import Case


@dataclass(frozen=True)
class GpuState:
    """What a GPU says of itself; a value it does not give is None. `energy_j` counts from some moment on."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    energy_j: float | None
    used_bytes: int | None


@dataclass(frozen=True)
class Sample:
    """One run of a test.

    seconds: from the request to the last token.
    ttft_s: to the first token; a test of decoding alone has none.
    decode_s: between the first token and the last, of a test that reads and decodes.
    gpu, joules: the GPU right after it, and the energy it took; None without NVML.
    """

    seconds: float
    ttft_s: float | None = None
    decode_s: float | None = None
    gpu: GpuState | None = None
    joules: float | None = None


@dataclass
class Row:
    """A test and its samples so far."""

    test: Case
    samples: list[Sample] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every sample, all tokens of the test counted."""
        return [self.test.tokens / sample.seconds for sample in self.samples]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated between the two nearest values; nan when there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return median, p10 and p90; None for each when there are no values."""
    if not values:
        return {"median": None, "p10": None, "p90": None}
    return {name: percentile(values, percent) for name, percent in (("median", 50), ("p10", 10), ("p90", 90))}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample's standard deviation (0 for one value), as llama-bench reports them."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
