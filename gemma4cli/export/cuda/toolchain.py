"""What compiling needs besides Python: a C++ compiler, CUDA's headers, and an environment that leaves no traces.

The same signature must give the same bytes in any folder on any machine: no paths, no times, no line numbers of files
that are somewhere else on the next machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from gemma4cli.errors import G4Error

# What AOTInductor's wrappers call of the driver; without a symbol that is used, the linker would drop the library.
_DRIVER_FUNCTIONS = (
    "cuFuncGetAttribute", "cuFuncSetAttribute", "cuGetErrorString", "cuLaunchKernel", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
COMPILERS = {"torch": "2.13", "triton": "3.7", "executorch": "1.5.1"}
"""What programs are compiled with: other versions give other bytes, and other internals than `fake_gpu` answers to."""

# Sources lie in folders with random names and are named by a hash of that; only what they are goes into the code.
_COMPILER = """\
#!/bin/sh
for argument; do
  case $argument in
    *.cpp) name=${{argument##*/}}; sources="$sources -ffile-prefix-map=$argument=${{name#*.}}" ;;
  esac
done
exec g++ -L{stub} {maps} $sources "$@"
"""
TOOLS = {"g++": "g++", "ld": "binutils", "objcopy": "binutils", "strip": "binutils"}
"""Programs that compiling calls, and Debian's packages of them."""

_HEADER = Path("include/cuda.h")
_HEADERS_HINT = "Install them with pip install 'gemma4cli[cuda]', or set CUDA_HOME."


def check_toolchain(environment: Mapping[str, str] = os.environ) -> None:
    """Find all that is needed before minutes are spent. Raises: G4Error naming what is missing and its package."""
    check_versions()
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=environment.get("PATH")) is None:
            raise G4Error(f"Compiling for CUDA needs {tool}, which is not installed.", hint=f"apt install {package}")
    find_cuda_home(environment)


def check_versions() -> None:
    """Compare the compilers here with those that g4 compiles with. Raises: G4Error naming the one that differs."""
    for package, wanted in COMPILERS.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "none"
        if not f"{found}.".startswith(f"{wanted}."):
            raise G4Error(
                f"Compiling for CUDA needs {package} {wanted}; here is {found}.",
                hint=f"Export in an environment with {package}=={wanted}.* (a CPU build of torch is enough). "
                "The bundle runs with any torch, or with none.",
            )


def find_cuda_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Find CUDA's headers: in CUDA_HOME, in the wheels of this environment, or in the usual place."""
    given = environment.get("CUDA_HOME")
    if given:
        if not (Path(given) / _HEADER).is_file():
            raise G4Error(f"CUDA_HOME is {given}, which has no {_HEADER}.", hint=_HEADERS_HINT)
        return Path(given)
    for place in (Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13", Path("/usr/local/cuda")):
        if (place / _HEADER).is_file():
            return place
    raise G4Error("Compiling for CUDA needs CUDA's headers, which were not found.", hint=_HEADERS_HINT)


def environment_for(scratch: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Prepare a compiler's environment in an empty folder, which is its cache and must be thrown away afterwards."""
    check_toolchain(environment)
    import torch  # not by g4 doctor, which looks for the rest

    headers = Path(torch.__file__).parent
    compiler = scratch / "c++"
    folders = (scratch, headers, find_cuda_home(environment))
    maps = shlex.join(f"-ffile-prefix-map={folder}=." for folder in folders)
    # Before any other folder of libraries, whose libcuda may have fewer functions or be a driver's.
    stub = shlex.quote(str(make_driver_stub(scratch).parent))
    compiler.write_text(_COMPILER.format(maps=maps, stub=stub))
    compiler.chmod(0o755)
    return {
        **environment,
        "CUDA_HOME": str(find_cuda_home(environment)),
        "CXX": str(compiler),
        "SOURCE_DATE_EPOCH": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        **_triton_tools(),
        "TRITON_DISABLE_LINE_INFO": "1",
        "TMPDIR": str(scratch),
    }


def _triton_tools() -> dict[str, str]:
    """Triton's own assembler and library of functions: torch for CUDA brings others, of other versions."""
    import triton

    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    return {
        "TRITON_PTXAS_PATH": str(nvidia / "bin" / "ptxas"),
        "TRITON_PTXAS_BLACKWELL_PATH": str(nvidia / "bin" / "ptxas-blackwell"),
        "TRITON_LIBDEVICE_PATH": str(nvidia / "lib" / "libdevice.10.bc"),
    }


def make_driver_stub(folder: Path) -> Path:
    """Make what programs are linked against in place of the driver's library, which comes with the driver.

    Its name and those of its functions are enough.
    """
    stub, source = folder / "libcuda.so", folder / "stub.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in _DRIVER_FUNCTIONS))
    subprocess.run(["g++", "-shared", "-xc", str(source), "-Wl,-soname,libcuda.so.1", "-o", str(stub)], check=True)
    return stub
