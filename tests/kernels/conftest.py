"""Triton decides at import whether kernels are compiled or interpreted, so the interpreted tests have a process of
their own.

They run as part of the suite through test_interpreted.py; by hand: ``TRITON_INTERPRET=1 pytest
tests/kernels/interpreter``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gemma4cli.native import load_kernels

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the CPU's kernels that this machine can run."""
    library = load_kernels()
    if not library.g4_select_instruction_set(request.param.encode()):
        assert request.param != "portable"
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    library.g4_select_instruction_set(None)
