"""Launch kernels of a compiled library that wait for their predecessor by themselves before it has ended.

AOTInductor launches every kernel in plain order. ``dependent_launches`` gives the library a second way, programmatic
dependent launch, and takes it for kernels compiled with ``PDL``, which wait (``kernels.dependent_launch``); captured
into a CUDA graph it becomes a programmatic edge. What is patched here belongs to torch 2.13 and is not public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor.codegen.cpp_wrapper_gpu import DeferredTritonCallWrapper
from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

_LAUNCH = """
struct WaitingKernel {
    CUfunction function;
};

static inline void launchKernel(
        WaitingKernel kernel,
        uint32_t gridX,
        uint32_t gridY,
        uint32_t gridZ,
        uint32_t numWarps,
        uint32_t sharedMemBytes,
        void* args[],
        cudaStream_t stream) {
    CUlaunchAttribute attribute = {};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config = {};
    config.gridDimX = gridX;
    config.gridDimY = gridY;
    config.gridDimZ = gridZ;
    config.blockDimX = 32 * numWarps;
    config.blockDimY = 1;
    config.blockDimZ = 1;
    config.sharedMemBytes = sharedMemBytes;
    config.hStream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CUDA_DRIVER_CHECK(cuLaunchKernelEx(&config, kernel.function, args, nullptr));
}
"""


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """Compile libraries that launch waiting kernels early."""
    driver_source = CUDADeviceOpOverrides.kernel_driver
    generate = DeferredTritonCallWrapper.generate_launch_kernel

    def kernel_driver(self: CUDADeviceOpOverrides) -> str:
        return driver_source(self) + _LAUNCH

    def generate_launch_kernel(self: Any, prefix: Any, wrapper: Any, kernel: str, params: dict[str, Any]) -> None:
        if params["triton_meta"]["constants"].get("PDL"):
            kernel = f"WaitingKernel{{{kernel}}}"  # the overload above
        generate(self, prefix, wrapper, kernel, params)

    with (
        mock.patch.object(CUDADeviceOpOverrides, "kernel_driver", kernel_driver),
        mock.patch.object(DeferredTritonCallWrapper, "generate_launch_kernel", generate_launch_kernel),
    ):
        yield
