"""Launch configurations of the sampling kernels, per target.

Not measured: chosen for one block per multiprocessor and no spills (tests/kernels/test_sampling_kernel.py compiles
every entry for its target and holds it to that).
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class SampleConfig:
    """How the vocabulary is shared out and how thresholds are searched.

    Attributes:
        block: tokens per program of the passes over the vocabulary.
        num_warps: of those passes; ``passes.tally`` holds one token per thread at a time.
        tally_bits: halvings of the thresholds' range that ``passes.tally`` decides at once.
        search_bits: halvings per round of ``passes.finish``; a divisor of 24.
        finish_warps: of ``passes.finish``, which holds one candidate per thread at a time.
    """

    block: int
    num_warps: int
    tally_bits: int
    search_bits: int
    finish_warps: int


SAMPLE: dict[str, SampleConfig] = {
    "sm_80": SampleConfig(2048, 4, 6, 3, 4),
    "sm_90": SampleConfig(2048, 4, 6, 4, 4),
    "sm_86": SampleConfig(2048, 4, 6, 3, 4),
    "sm_120": SampleConfig(2048, 4, 6, 4, 4),
}


def sample_config(target: Target) -> SampleConfig:
    return SAMPLE[target.name]
