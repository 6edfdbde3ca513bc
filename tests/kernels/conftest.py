"""Triton decides at import whether kernels are compiled or interpreted, so the interpreted tests have a process of
their own.

They run as part of the suite through test_interpreted.py; by hand: ``TRITON_INTERPRET=1 pytest
tests/kernels/interpreter``.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
