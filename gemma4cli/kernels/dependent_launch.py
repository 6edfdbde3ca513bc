"""Programmatic dependent launch: a kernel starts while the one before it still runs, and fetches weights meanwhile.

A kernel compiled with ``PDL`` waits for its predecessor before it touches anything that a kernel writes. What it may
read before is what no kernel of a step writes: weights, the position, and what earlier steps left in a cache. Because
every such kernel waits, the end of one means the end of all before it, so buffers can be reused as in plain order.

When a kernel lets its successor start was measured (bench/notes.md): products and norms at once, because they have
weights to fetch and more programs than fit, or a few; the others only when their own wait is over. Letting all of them
start at once is slower than plain order: programs that wait take the places of a kernel that has just fitted.

GPUs before Hopper have none of it (``Target.dependent_launch``); eager mode launches in plain order, where these
functions do nothing.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_successor(PDL: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and its writes can be seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()
