"""Compile a program of two kernels in Gluon as the export compiles methods; a process of its own, as for methods.

python -m tests.support.gluon_program TARGET FOLDER      leaves a pickled Library in FOLDER
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from gemma4cli.export.cuda.compile import Library
from gemma4cli.export.cuda.fake_gpu import fake_gpu
from gemma4cli.export.cuda.lower import _compile
from gemma4cli.kernels.targets import compiling_for, current_target, get_target
from tests.support.gluon_kernel import NUM_WARPS, stream_add

COUNT, BLOCK = 4096, 1024


@triton_op("g4_test::stream_add", mutates_args={})
def stream_add_op(weight: Tensor, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    wrap_triton(stream_add)[(1,)](
        weight, x, y, COUNT, STEPS=COUNT // BLOCK, BLOCK=BLOCK, AHEAD=2, OUTSTANDING=1,
        PDL=current_target().dependent_launch, REGISTERS=64, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(COUNT), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return stream_add_op(self.weight, stream_add_op(self.weight, x))


def compile_program(target_name: str) -> Library:
    target = get_target(target_name)
    with torch.no_grad(), compiling_for(target):
        program = torch.export.export(Model(), (torch.zeros(COUNT),), strict=False)
        with fake_gpu(target) as usage:
            return _compile(program, "toy", {"weight": SimpleNamespace(shape=(COUNT,))}, usage)


if __name__ == "__main__":
    (Path(sys.argv[2]) / "library").write_bytes(pickle.dumps(compile_program(sys.argv[1])))
