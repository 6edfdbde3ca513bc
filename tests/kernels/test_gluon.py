"""Kernels in Gluon, compiled alone and by the export: what they are made of, and what they are taken to write."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._higher_order_ops.triton_kernel_wrap as triton_kernel_wrap
from triton.experimental import gluon

from gemma4cli.export.cuda.compile import Library
from gemma4cli.export.cuda.gluon import gluon_kernels
from gemma4cli.export.cuda.toolchain import environment_for
from gemma4cli.kernels.compile import KernelCode, KernelUsage, compile_kernel
from gemma4cli.kernels.gluon import writes
from gemma4cli.kernels.targets import TARGETS
from tests.support.gluon_kernel import NUM_WARPS, SLOTS, stream_add
from tests.support.gluon_program import BLOCK, COUNT

ROOT = Path(__file__).parents[2]


def compiled(target_name: str, registers: int) -> KernelCode:
    target = TARGETS[target_name]
    pointers = dict.fromkeys(("weight_ptr", "x_ptr", "y_ptr"), "*fp32")
    constants = {"STEPS": COUNT // BLOCK, "BLOCK": BLOCK, "AHEAD": 2, "OUTSTANDING": 1, "REGISTERS": registers}
    arguments = {**pointers, "n": "i32:16", **constants, "PDL": target.dependent_launch}
    return compile_kernel(stream_add, arguments, target, num_warps=NUM_WARPS, num_stages=1)


@pytest.mark.parametrize("target_name", ["sm_80", "sm_90", "sm_120"])
def test_compiled_alone(target_name: str) -> None:
    code = compiled(target_name, registers=64)
    assert "cp.async.cg.shared.global" in code.ptx and "cp.async.wait_group" in code.ptx
    assert ".maxnreg 64" in code.ptx and ".maxnreg" not in compiled(target_name, registers=0).ptx
    assert ("griddepcontrol.wait" in code.ptx) == TARGETS[target_name].dependent_launch
    assert (code.shared_bytes, code.local_bytes) == (SLOTS.value * BLOCK * 4, 0)


@pytest.mark.parametrize("target_name", ["sm_80", "sm_90"])
def test_exported(target_name: str, tmp_path: Path) -> None:
    """With the kernel there is nothing else in the library, such as one that copies a weight thought to be written."""
    environment = environment_for(tmp_path) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.gluon_program", target_name, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    library: Library = pickle.loads((tmp_path / "library").read_bytes())
    alone = compiled(target_name, registers=64)
    assert library.kernels == {"stream_add": KernelUsage(alone.registers, alone.local_bytes, alone.shared_bytes)}
    assert library.constants == ("weight",)
    (source,) = tmp_path.rglob("stream_add.ptx")
    assert "cp.async.cg.shared.global" in source.read_text() and ".maxnreg 64" in source.read_text()
    (host,) = tmp_path.rglob("*.wrapper.cpp")
    assert ("launchKernel(WaitingKernel{" in host.read_text()) == TARGETS[target_name].dependent_launch


@gluon.jit
def undeclared(x_ptr):
    pass


def test_what_a_kernel_writes_is_what_it_declares() -> None:
    tensors = dict.fromkeys(("weight_ptr", "x_ptr", "y_ptr"), torch.zeros(1))
    with gluon_kernels():
        accesses = triton_kernel_wrap.identify_accessed_tensors(stream_add, {**tensors, "n": 1, "STEPS": 2}, {})
        with pytest.raises(TypeError, match="undeclared does not say what it writes"):
            triton_kernel_wrap.identify_accessed_tensors(undeclared, {"x_ptr": torch.zeros(1)}, {})
    assert {access.name for access in accesses.read_writes.writes} == {"y_ptr"}
    assert {access.name for access in accesses.read_writes.reads} == set(tensors)


def test_a_declaration_names_arguments() -> None:
    with pytest.raises(ValueError, match="y_ptr"):
        writes("y_ptr")(undeclared)
    with pytest.raises(ValueError, match="name"):
        writes()(undeclared)
