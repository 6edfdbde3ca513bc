"""Let Inductor, AOTInductor and Triton compile for a GPU that is not there.

Compiling needs facts about the GPU (its architecture, shared memory, number of multiprocessors) and, as these libraries
are written, a device that answers. ``fake_gpu`` answers for a target of ``kernels.targets``, whether or not a GPU is
present, so that every machine makes the same decisions. Nothing is launched, and no configuration is chosen by timing.

The facts are cached for the life of a process by the libraries: one process per target (see ``compile``). What is
patched here belongs to torch 2.13 and Triton 3.7 and is not public, so compiling is pinned to that torch; programs run
with others.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._higher_order_ops.triton_kernel_wrap as triton_kernel_wrap
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch._inductor.utils as inductor_utils
import torch.utils._triton as torch_triton
import triton
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler as triton_compiler

from gemma4cli.export.cuda.gluon import bare_kernel, gluon_kernels
from gemma4cli.kernels.compile import KernelUsage, register_limit, resource_usage
from gemma4cli.kernels.targets import Target

CUDA_VERSION = "13.0"

_REGISTERS_PER_SM = 65536
_STATIC_SHARED_BYTES = 48 << 10
_MAX_THREADS = 1024


@contextlib.contextmanager
def fake_gpu(target: Target) -> Iterator[dict[str, KernelUsage]]:
    """Pretend that `target` is the machine's one GPU; yields what each kernel compiled meanwhile needs, by name."""
    usage: dict[str, KernelUsage] = {}
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        _pretend_in_torch(target, patch)
        _pretend_in_triton(target, usage, patch, stack)
        _never_launch(patch)
        stack.enter_context(gluon_kernels())
        _analyze_kernels_once(patch)
        stack.enter_context(inductor_config.patch(_settings(target)))
        _forget_device_facts()
        stack.callback(_forget_device_facts)
        yield usage


def _settings(target: Target) -> dict[str, Any]:
    return {
        "deterministic": True,
        "compile_threads": 1,  # child processes would not know of the target
        "cuda.arch": str(target.arch),
        "force_disable_caches": True,
        "cpp.march": "x86-64-v2",  # the host code runs on other machines too
        "use_static_cuda_launcher": False,
        "triton.autotune_at_compile_time": True,
    }


def _pretend_in_torch(target: Target, patch: Callable[[Any, str, Any], None]) -> None:
    properties = types.SimpleNamespace(
        name=target.card,
        major=target.capability[0],
        minor=target.capability[1],
        multi_processor_count=target.multiprocessors,
        total_memory=target.memory_bytes,
        warp_size=target.warp_size,
        regs_per_multiprocessor=_REGISTERS_PER_SM,
        max_threads_per_multi_processor=target.threads_per_sm,
        max_threads_per_block=_MAX_THREADS,
        shared_memory_per_block=_STATIC_SHARED_BYTES,
        shared_memory_per_block_optin=target.shared_bytes_per_block,
        shared_memory_per_multiprocessor=target.shared_bytes_per_sm,
        L2_cache_size=target.l2_bytes,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
    )

    def zero(*_: Any, **__: Any) -> int:
        return 0

    def nothing(*_: Any, **__: Any) -> None:
        return None

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": zero,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: target.capability,
        "get_device_name": lambda device=None: target.card,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: True,
        "mem_get_info": lambda device=None: (target.memory_bytes, target.memory_bytes),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "_lazy_init": nothing,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
    }
    for name, answer in answers.items():
        patch(torch.cuda, name, answer)
    for name in ("current_device", "device_count", "get_device_properties", "is_bf16_supported", "synchronize"):
        patch(device_interface.CudaInterface, name, staticmethod(answers[name]))
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
        patch(device_interface.CudaInterface, name, staticmethod(zero))
    patch(device_interface.CudaInterface, "set_device", staticmethod(nothing))
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        patch(torch._C, f"_cuda_{name}", zero)
    for name in ("setDevice", "synchronize"):
        patch(torch._C, f"_cuda_{name}", nothing)
    patch(torch._C, "_cuda_getDeviceCount", lambda: 1)
    patch(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
    patch(torch.version, "cuda", CUDA_VERSION)
    # torch keys this on is_available(): fake tensors must never try to set the device up.
    patch(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    # Builds its patterns by running examples on the device; none of them occurs in our graphs.
    patch(misc_patterns, "_misc_patterns_init", nothing)


def _pretend_in_triton(
    target: Target,
    usage: dict[str, KernelUsage],
    patch: Callable[[Any, str, Any], None],
    stack: contextlib.ExitStack,
) -> None:
    driver = _Driver(target, usage)
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    stack.callback(triton.runtime.driver.set_active, previous)
    patch(type(triton.runtime.driver), "default", property(lambda self: driver))
    backend = triton.backends.backends["nvidia"]

    class Driver(_Driver):
        def __new__(cls) -> _Driver:
            return driver

    driver.__class__ = Driver
    replaced = {"nvidia": type(backend)(backend.compiler, Driver)}
    stack.enter_context(mock.patch.dict(triton.backends.backends, replaced))


class _Driver:
    """Triton's driver for a GPU that can be compiled for and never launched on."""

    def __init__(self, target: Target, usage: dict[str, KernelUsage]) -> None:
        self._target, self._usage = target, usage
        self.launcher_cls = _NoLauncher
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": target.shared_bytes_per_block,
                "max_num_regs": _REGISTERS_PER_SM,
                "multiprocessor_count": target.multiprocessors,
                "warpSize": target.warp_size,
            },
            load_binary=self._load,
        )

    def _load(self, name: str, cubin: bytes, shared_bytes: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads): what loading would tell, read from the machine code."""
        registers, local_bytes = resource_usage(cubin)
        self._usage[name] = KernelUsage(registers, local_bytes, shared_bytes)
        return 0, 0, registers, local_bytes // 4, _MAX_THREADS

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._target.arch, self._target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._target.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> types.ModuleType:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("nothing is timed while compiling for a GPU that is not there")

    @staticmethod
    def is_active() -> bool:
        return True


class _NoLauncher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> None:
        raise RuntimeError("nothing is launched while compiling for a GPU that is not there")


def _never_launch(patch: Callable[[Any, str, Any], None]) -> None:
    def compile_only(self: CachingAutotuner, *arguments: Any, stream: int, **options: Any) -> None:
        """All that CachingAutotuner.run does before it launches."""
        if not self.launchers:
            self.precompile()
        if len(self.launchers) > 1:
            self.autotune_to_one_config(*arguments, **options)
        (launcher,) = self.launchers
        if launcher.store_cubin:
            self.save_gpu_kernel(stream, launcher)

    def choose(self: CachingAutotuner, *_: Any, **__: Any) -> None:
        """Take the configuration that spills least, the earliest of equals."""
        self.launchers = [min(self.launchers, key=lambda launcher: launcher.n_spills or 0)]

    def refuse(self: CachingAutotuner, config: Any) -> None:
        raise RuntimeError(f"{config} exceeds the target's shared memory")

    compile_options = CachingAutotuner._create_compile_options

    def limited_options(self: CachingAutotuner, config: Any, compile_meta: dict[str, Any]) -> dict[str, Any]:
        return compile_options(self, config, compile_meta) | register_limit(compile_meta["constants"])

    patch(CachingAutotuner, "_create_compile_options", limited_options)
    patch(CachingAutotuner, "run", compile_only)
    patch(CachingAutotuner, "autotune_to_one_config", choose)
    # It would quietly retry without pipelining: another kernel than the one asked for.
    patch(CachingAutotuner, "compile_by_disabling_pipelining", refuse)
    run_block = PythonWrapperCodegen.generate_and_run_autotune_block

    def run_block_on_fakes(self: PythonWrapperCodegen) -> None:
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
            run_block(self)

    patch(PythonWrapperCodegen, "generate_and_run_autotune_block", run_block_on_fakes)


def _analyze_kernels_once(patch: Callable[[Any, str, Any], None]) -> None:
    """Remember what a kernel reads and writes: torch compiles it anew for each of hundreds of calls to find out."""
    analyze = triton_kernel_wrap.identify_accessed_tensors
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        function = bare_kernel(kernel)
        constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
        facts = []
        for name, value in arguments.items():
            if name in constants:
                facts.append((name, repr(value)))
            else:
                # A tensor here is a fake one or Inductor's own; of either, the type of its elements is what counts.
                facts.append((name, str(value.get_dtype() if hasattr(value, "get_dtype") else _dtype(value))))
        key = (function.fn, *facts)
        if descriptors or key not in known:
            # Waiting for a predecessor is assembly, which torch takes for writing to everything.
            plain = arguments | {"PDL": False} if "PDL" in constants else arguments
            known[key] = analyze(kernel, plain, descriptors)
        return known[key]

    patch(triton_kernel_wrap, "identify_accessed_tensors", remembered)


def _dtype(value: Any) -> Any:
    return value.dtype if isinstance(value, torch.Tensor) else type(value)


def _forget_device_facts() -> None:
    for module in (torch_triton, inductor_utils):
        for value in vars(module).values():
            if callable(value) and hasattr(value, "cache_clear"):
                value.cache_clear()
    for function in (DeviceProperties.create, triton_compiler.max_shared_mem):
        getattr(function, "cache_clear", lambda: None)()
    device_interface.caching_worker_device_properties.clear()
    device_interface.caching_worker_current_devices.clear()
