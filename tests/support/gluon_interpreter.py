"""Run kernels in Gluon on CPU tensors, in Triton's interpreter: needs TRITON_INTERPRET=1 before Triton is imported.

    interpreted(kernel)[grid](*arguments, CONSTANT=…)

Python runs the kernel's code with stand-ins for ``gl`` and ``async_copy``. Layouts mean nothing; shared memory and
copies into it are taken at their word: what no awaited copy and no store has written is poison, NaN or 0xDEADBEEF.
``gl.max`` and ``gl.min`` overlook NaN here, as the interpreter does everywhere.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.runtime import interpreter

from gemma4cli.kernels.gluon import barrier


class interpreted:
    """A Gluon kernel that runs on the CPU; options of the launch, such as num_warps, are ignored."""

    def __init__(self, kernel: GluonJITFunction) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        parameters = {parameter.name: parameter.is_constexpr for parameter in self._kernel.params}
        named = {name: value for name, value in named.items() if name in parameters}
        copies = _AsyncCopies()
        function = _Translation(copies).function(self._kernel)
        bound = inspect.signature(function).bind(*arguments, **named)
        bound.apply_defaults()
        values = {
            name: value if parameters[name] else interpreter._implicit_cvt(value)
            for name, value in bound.arguments.items()
        }
        programs = (*grid, 1, 1)[:3]
        builder = interpreter.interpreter_builder
        scope = interpreter._patch_lang(function)
        try:
            builder.set_grid_dim(*programs)
            for program in np.ndindex(*programs):
                builder.set_grid_idx(*program)
                copies.restart()
                function(**values)
        finally:
            scope.restore()


class _Translation:
    """Gluon functions as Python functions, whose modules are copies with the stand-ins in place."""

    def __init__(self, copies: _AsyncCopies) -> None:
        self._copies = copies
        self._modules: dict[int, dict[str, Any]] = {}

    def function(self, kernel: GluonJITFunction) -> FunctionType:
        function = FunctionType(kernel.fn.__code__, self._module(kernel.fn.__globals__), kernel.__name__)
        return interpreter.FunctionRewriter(function).rewrite_ast()

    def _module(self, original: dict[str, Any]) -> dict[str, Any]:
        if id(original) not in self._modules:
            module = self._modules[id(original)] = dict(original)  # known before its functions, which look for it
            for name, value in original.items():
                if value is gl:
                    module[name] = _Language()
                elif value is async_copy:
                    module[name] = self._copies
                elif value is mma_v2:
                    module[name] = _mma
                elif value is barrier:
                    module[name] = lambda: None
                elif isinstance(value, gl.constexpr):
                    module[name] = value.value
                elif isinstance(value, GluonJITFunction):
                    module[name] = self.function(value)
        return self._modules[id(original)]


class _Language:
    """Stands for ``gl``: what ``tl`` has under the same name is the interpreter's, for the rest see below."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(gl, name):
            raise AttributeError(f"gl.{name} does not exist")
        if name.endswith("Layout"):
            return _no_layout
        return getattr(tl, name)  # not sooner: the interpreter puts its own in place while a kernel runs

    def arange(self, start: Any, end: Any, layout: Any = None) -> tl.tensor:
        return tl.arange(start, end)

    def full(self, shape: Any, value: Any, dtype: Any, layout: Any = None) -> tl.tensor:
        return tl.full(shape, value, dtype)

    def zeros(self, shape: Any, dtype: Any, layout: Any = None) -> tl.tensor:
        return tl.full(shape, 0, dtype)

    def convert_layout(self, value: tl.tensor, layout: Any, assert_trivial: bool = False) -> tl.tensor:
        return value

    def set_auto_layout(self, value: tl.tensor, layout: Any) -> tl.tensor:
        return value

    def allocate_shared_memory(self, element_ty: Any, shape: Any, layout: Any, value: Any = None) -> _SharedMemory:
        data = np.empty([operator.index(size) for size in shape], interpreter._get_np_dtype(element_ty))
        memory = _SharedMemory(element_ty, data)
        memory.poison()
        if value is not None:
            memory.store(value)
        return memory


def _mma(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    return tl.dot(a, b, acc, input_precision="ieee")


def _no_layout(*arguments: Any, **named: Any) -> None:
    return None


class _SharedMemory:
    """Shared memory or a part of it, as a view."""

    def __init__(self, dtype: tl.dtype, data: np.ndarray) -> None:
        self.dtype, self.shape, self._data = dtype, list(data.shape), data

    def index(self, index: Any) -> _SharedMemory:
        place = operator.index(index)
        if not 0 <= place < self.shape[0]:
            raise IndexError(f"{place} of {self.shape[0]}")
        return _SharedMemory(self.dtype, self._data[place, ...])

    def slice(self, start: Any, length: Any, dim: Any = 0) -> _SharedMemory:
        first, count, axis = operator.index(start), operator.index(length), operator.index(dim)
        if not 0 <= first <= first + count <= self.shape[axis]:
            raise IndexError(f"{first} and {count} more of {self.shape[axis]}")
        return _SharedMemory(self.dtype, self._data[(slice(None),) * axis + (slice(first, first + count),)])

    def reshape(self, shape: Any) -> _SharedMemory:
        data = self._data.view()
        data.shape = tuple(operator.index(size) for size in shape)  # refuses what would be a copy
        return _SharedMemory(self.dtype, data)

    def permute(self, order: Any) -> _SharedMemory:
        return _SharedMemory(self.dtype, self._data.transpose([operator.index(axis) for axis in order]))

    def load(self, layout: Any = None) -> tl.tensor:
        handle = interpreter.TensorHandle(self._data.copy(), self.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, self.shape))

    def store(self, value: tl.tensor) -> None:
        self.check(value.dtype, value.shape)
        self._data[...] = value.handle.data

    def check(self, dtype: tl.dtype, shape: Any) -> None:
        """Raises: TypeError when a tensor does not fit."""
        if (dtype, list(shape)) != (self.dtype, self.shape):
            raise TypeError(f"{dtype} {shape} into shared memory of {self.dtype} {self.shape}")

    def poison(self) -> None:
        pattern = b"\xff" if self.dtype.is_floating() else b"\xef\xbe\xad\xde"
        repeated = np.resize(np.frombuffer(pattern, np.uint8), self._data.nbytes)
        self._data[...] = repeated.view(self._data.dtype).reshape(self.shape)


class _AsyncCopies:
    """Stands for ``async_copy``. A copy may write from its start on, and has written when its group was waited for."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._open: list[tuple[_SharedMemory, tl.tensor]] = []
        self._groups: list[list[tuple[_SharedMemory, tl.tensor]]] = []

    def async_copy_global_to_shared(
        self, smem: _SharedMemory, pointer: tl.tensor, mask: Any = None, cache_modifier: Any = "",
        eviction_policy: Any = "", volatile: Any = False,
    ) -> None:  # fmt: skip
        """What is masked off becomes 0: such a copy has no source bytes, which the hardware fills up with zeros."""
        smem.check(pointer.dtype.element_ty, pointer.shape)
        smem.poison()
        self._open.append((smem, tl.load(pointer, mask=mask, other=None if mask is None else 0)))

    def commit_group(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait_group(self, num_outstanding: Any = 0) -> None:
        done = max(len(self._groups) - operator.index(num_outstanding), 0)
        finished, self._groups = self._groups[:done], self._groups[done:]
        for memory, value in (copy for group in finished for copy in group):
            memory.store(value)
        for memory, _ in (copy for group in (*self._groups, self._open) for copy in group):
            memory.poison()  # where two copies are under way to the same place, the first does not settle it
