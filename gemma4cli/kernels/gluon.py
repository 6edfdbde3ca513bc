"""What has to be said about a kernel in Gluon, Triton's language with layouts and shared memory in the open.

torch reads in a kernel's code which arguments it writes, and of Gluon it cannot: it would take all of them for written,
and keep a copy of every weight. So such a kernel says it itself::

    @writes("y_ptr")
    @gluon.jit
    def matvec(codes_ptr, x_ptr, y_ptr, ...):

The export finds ``gl`` and ``async_copy`` under these names (export/cuda/gluon.py); layouts are made inside kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
from triton.experimental.gluon import language as gl

# All warps of a program wait for one another; Triton 3.6, which torch 2.11 has, names it otherwise.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def writes(*names: str) -> Callable[[triton.JITFunction], triton.JITFunction]:
    """Declare the pointers that a kernel writes; what is not named is only read."""

    def declare(kernel: triton.JITFunction) -> triton.JITFunction:
        unknown = set(names) - set(kernel.arg_names)
        if unknown or not names:
            raise ValueError(f"{kernel.__name__} has no arguments {sorted(unknown)}" if unknown else "name an argument")
        kernel.written_arguments = frozenset(names)
        return kernel

    return declare


def written_arguments(kernel: triton.JITFunction) -> frozenset[str]:
    """What `kernel` declared with ``writes``. Raises: TypeError when it declared nothing."""
    try:
        return kernel.written_arguments
    except AttributeError:
        raise TypeError(f"the Gluon kernel {kernel.__name__} does not say what it writes: @writes(...)") from None
