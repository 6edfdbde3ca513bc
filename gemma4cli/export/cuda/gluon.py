"""Let Inductor compile kernels written in Gluon, which it knows nothing of.

It copies a kernel's source, that of the functions it calls and the constants it uses into a module of its own, where
all are `@triton.jit`; of a Gluon kernel all become `@gluon.jit` here, helpers from elsewhere included, as Triton takes
them itself. What is patched belongs to torch 2.13 and is not public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._higher_order_ops.triton_kernel_wrap as triton_kernel_wrap
import torch._inductor.runtime.triton_heuristics as triton_heuristics
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.dependencies import ReadWrites, StarDep
from torch._inductor.ir import TensorBox
from torch.utils._ordered_set import OrderedSet

from gemma4cli.kernels.compile import source_type
from gemma4cli.kernels.gluon import written_arguments

_AUTOTUNE = "@triton_heuristics.user_autotune("
_IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
"""


@contextlib.contextmanager
def gluon_kernels() -> Iterator[None]:
    """Compile Gluon kernels as well as Triton's."""
    analyze = triton_kernel_wrap.identify_accessed_tensors
    define = PythonWrapperCodegen.define_user_defined_triton_kernel

    def accesses(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        function = bare_kernel(kernel)
        return _declared(function, arguments) if function.is_gluon() else analyze(kernel, arguments, descriptors)

    def define_kernel(self: PythonWrapperCodegen, kernel: Any, *arguments: Any, **options: Any) -> Any:
        if not kernel.is_gluon():
            return define(self, kernel, *arguments, **options)
        write = self.define_kernel

        def write_gluon(name: str, source: str, metadata: str) -> None:
            source = source.replace(_AUTOTUNE, _IMPORTS + _AUTOTUNE, 1)
            write(name, source.replace("@triton.jit\n", "@gluon.jit\n"), metadata)

        with mock.patch.object(self, "define_kernel", write_gluon):
            return define(self, kernel, *arguments, **options)

    with (
        mock.patch.object(triton_kernel_wrap, "identify_accessed_tensors", accesses),
        mock.patch.object(PythonWrapperCodegen, "define_user_defined_triton_kernel", define_kernel),
        mock.patch.object(triton_heuristics, "ASTSource", lambda kernel, *facts: source_type(kernel)(kernel, *facts)),
    ):
        yield


def bare_kernel(kernel: Any) -> Any:
    """Return the kernel itself: launch options wrap it in an autotuner of one configuration."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel


def _declared(kernel: Any, arguments: dict[str, Any]) -> triton_kernel_wrap.TensorAccesses:
    # A tensor here is a fake one or Inductor's own.
    tensors = [name for name, value in arguments.items() if isinstance(value, (torch.Tensor, TensorBox))]
    written = written_arguments(kernel)
    return triton_kernel_wrap.TensorAccesses(
        ReadWrites(
            reads=OrderedSet(StarDep(name) for name in tensors),
            writes=OrderedSet(StarDep(name) for name in tensors if name in written),
            index_exprs=OrderedSet(),
        ),
        can_fuse_epilogue=False,
    )
