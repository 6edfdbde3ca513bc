"""CUDA exports on a machine without a GPU: what is compiled, what it depends on, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import DeviceType

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import open_bundle
from gemma4cli.export.contract import METHODS
from gemma4cli.export.cuda import toolchain
from gemma4cli.export.cuda.compile import _compile_apart
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.packed import fill
from gemma4cli.export.trace import Step, trace_method
from gemma4cli.inspection.delegates import CUDA, read_blob
from gemma4cli.inspection.elf import Elf
from gemma4cli.inspection.library import read_library
from gemma4cli.inspection.program import read_program
from gemma4cli.inspection.ptd import read_data_file
from gemma4cli.kernels.quantized_matmul.configs import matvec_config
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.kernels.sampling import sample_cuda
from gemma4cli.kernels.targets import TARGETS, compiling_for
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.sampling import sample
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support import tiny
from tests.support.bundles import PACKAGE, Run, home_of, made, run_g4

G4 = Callable[..., Any]
TARGET = "sm_120"
CONTEXT, CHUNK = 96, 12
# One of each kind of layer, wide enough for blocks of 256 weights.
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "global_head_dim": 128, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
# Launches of one decoded token in two layers, sampling included. More of them is a regression; fewer, lower this.
MOST_DECODE_LAUNCHES = 28


def model(seed: int) -> Path:
    return tiny.write_checkpoint(home_of("cuda-models") / f"wide-{seed}", seed=seed, **WIDE)


def export(seed: int, home: Path) -> Run:
    return run_g4("export", model(seed), "--target", TARGET, "--ctx", str(CONTEXT), "--chunk", str(CHUNK), "--kv",
                  "folded", "--json", home=home)  # fmt: skip


@cache
def bundle() -> Path:
    return made("cuda", lambda home: export(0, home))


def checkpoint() -> Path:
    return bundle().parents[1] / "checkpoints" / "wide-0-default"


def libraries(folder: Path) -> dict[str, bytes]:
    program = read_program(open_bundle(folder).program_for(TARGET))
    found = {}
    for method in program.methods:
        for delegate in method.delegates:
            blob = read_blob(delegate.backend, program.read(delegate.blob))
            found[method.name] = bytes(program.read(program.named_data[blob.library]))
    return found


def test_the_program_is_one_call_per_method() -> None:
    opened = open_bundle(bundle())
    program = deserialize_pte_binary(opened.program_for(TARGET).read_bytes()).program
    plans = {plan.name: plan for plan in program.execution_plan}
    for method in METHODS:
        assert [delegate.id for delegate in plans[method].delegates] == [CUDA]
        assert plans[method].operators == []
        assert len(plans[method].inputs) == 7
        assert len(plans[method].outputs) == 2
        (call,) = [step.instr_args for chain in plans[method].chains for step in chain.instructions]
        assert call.args == [*plans[method].inputs, *plans[method].outputs]
        # On the device, in the caller's memory: ExecuTorch refuses to copy into device memory that it planned itself.
        for tensor in (plans[method].values[index].val for index in plans[method].inputs):
            assert tensor.extra_tensor_info.device_type == DeviceType.CUDA
            assert tensor.allocation_info is None
    assert set(plans) == {*METHODS, *opened.contract.constant_methods()}
    assert opened.manifest.targets == (TARGET,)


def test_every_constant_lies_in_the_weights_file() -> None:
    opened = open_bundle(bundle())
    program = read_program(opened.program_for(TARGET))
    entries = read_data_file(opened.weights[0]).entries
    for method in program.methods:
        for delegate in method.delegates:
            weights = read_blob(CUDA, program.read(delegate.blob)).weights
            assert len(weights) > 30
            for weight in weights:
                assert entries[weight.key].span.size == weight.nbytes, weight.name


def test_the_machine_code_fits_its_target() -> None:
    for code in libraries(bundle()).values():
        kernels = read_library(memoryview(code)).kernels
        assert len(kernels) > 15
        for kernel in kernels:
            assert kernel.architecture.capability == TARGETS[TARGET].capability, kernel.name
            assert kernel.shared_bytes <= TARGETS[TARGET].shared_bytes_per_block, kernel.name


def test_no_launch_was_added_to_a_token() -> None:
    kernels = read_library(memoryview(libraries(bundle())["decode"])).kernels
    assert sum(kernel.launches for kernel in kernels) <= MOST_DECODE_LAUNCHES


def test_kernels_that_wait_by_themselves_are_launched_early() -> None:
    imported = {symbol.name for symbol in Elf(memoryview(libraries(bundle())["decode"])).symbols}
    assert {"cuLaunchKernel", "cuLaunchKernelEx"} <= imported


def test_a_token_reads_each_weight_once_and_packed() -> None:
    """What `decode` is bound to, apart from caches, is the matrices at their formats' bits and small vectors."""
    reader = open_checkpoint(checkpoint())
    formats = Signature.of(reader, CacheSpec(CONTEXT, CHUNK, torch.bfloat16), "folded").formats
    packed = sum(fmt.bits_per_weight / 8 * reader.tensor(name).numel() for name, fmt in formats.items())
    program = read_program(open_bundle(bundle()).program_for(TARGET))
    (decode,) = (method for method in program.methods if method.name == "decode")
    weights = read_blob(CUDA, program.read(decode.delegates[0].blob)).weights
    bound = {weight.key: weight.nbytes for weight in weights if "kv_cache" not in weight.name}
    assert len(bound) == len([weight for weight in weights if "kv_cache" not in weight.name])
    assert packed <= sum(bound.values()) < packed + (64 << 10)


def test_compilers_are_tritons_own_whatever_else_is_installed(tmp_path: Path) -> None:
    environment = toolchain.environment_for(tmp_path, {"PATH": os.environ["PATH"], "TRITON_PTXAS_PATH": "/elsewhere"})
    tools = [value for name, value in environment.items() if name.startswith("TRITON_") and name.endswith("_PATH")]
    assert len(tools) == 3
    for tool in tools:
        assert Path(tool).is_file() and Path(tool).is_relative_to(Path(triton.__file__).parent)


def test_another_stub_of_the_driver_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of libraries that comes first otherwise, with a libcuda that has no function."""
    subprocess.run(["g++", "-shared", "-xc", "/dev/null", "-o", tmp_path / "libcuda.so"], check=True)
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = toolchain.environment_for(scratch)
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text('extern "C" int cuLaunchKernel(); int a() { return cuLaunchKernel(); }')
    subprocess.run(
        [environment["CXX"], source, "-shared", "-fPIC", "-Wl,--as-needed", "-L", tmp_path, "-lcuda", "-o", library],
        check=True, env=environment,
    )  # fmt: skip
    assert b"libcuda.so.1" in library.read_bytes()


def test_nothing_of_this_machine_is_in_the_code() -> None:
    for code in libraries(bundle()).values():
        for trace in (str(Path.home()), str(Path(torch.__file__).parent), str(bundle().parents[1]), "/tmp/"):
            assert trace.encode() not in code, trace


def test_other_weights_compile_nothing_and_change_only_the_weights() -> None:
    home = bundle().parents[1]
    run = export(1, home)
    assert run.code == 0, run.stderr
    assert "compile" not in run.stderr
    other = Path(json.loads(run.stdout)["bundle"])
    assert (other / "model.pte").read_bytes() == (bundle() / "model.pte").read_bytes()
    assert (other / "weights.ptd").read_bytes() != (bundle() / "weights.ptd").read_bytes()


def test_compiling_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = CacheSpec(CONTEXT, CHUNK, torch.bfloat16)
    signature = Signature.of(open_checkpoint(checkpoint()), spec, "folded")
    library = _compile_apart(signature, "decode", TARGETS[TARGET], tmp_path)
    assert library.code == libraries(bundle())["decode"]


@pytest.mark.parametrize(
    ("target", "kv_format", "head_dim"),
    [("sm_80", "tq4", 128), ("sm_86", "bf16", 512), ("sm_90", "folded-q8", 512), ("sm_90", "folded-tq4", 128)],
)
def test_every_target_and_kv_format_compiles(target: str, kv_format: str, head_dim: int, tmp_path: Path) -> None:
    """One full layer, its keys of 6 bits beside queries of 4, with small heads and with the 31B's.

    Rotations of small ones are 16 by 16, which Inductor would pad after timing it on a GPU that is not there.
    """
    only_full = WIDE | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "global_head_dim": head_dim}
    source = tiny.write_checkpoint(tmp_path / "model", seed=3, **only_full)
    quantize_checkpoint(source, tmp_path / "quantized", load_recipe("default"))
    spec = CacheSpec(CONTEXT, CHUNK, torch.bfloat16)
    signature = Signature.of(open_checkpoint(tmp_path / "quantized"), spec, kv_format)
    keys = "model.layers.0.self_attn.k_proj.weight"
    signature = replace(signature, formats={**signature.formats, keys: WeightFormat(6, 16, False)})
    library = _compile_apart(signature, "decode", TARGETS[target], tmp_path)
    assert any("rotation" in name for name in library.constants) == kv_format.endswith("tq4")
    kernels = read_library(memoryview(library.code)).kernels
    assert [kernel.launches for kernel in kernels if kernel.facts.entry == "split"] == [1]
    if kv_format == "folded-q8":  # the kernel for wide heads, which has two tiles in shared memory
        (split,) = (usage for name, usage in library.kernels.items() if name.startswith("split"))
        assert split.shared_bytes > 80_000
    assert {kernel.architecture.capability for kernel in kernels} == {TARGETS[target].capability}
    assert [kernel.launches for kernel in kernels if kernel.facts.entry == "matvec_pair"] == [1]
    early = {symbol.name for symbol in Elf(memoryview(library.code)).symbols if symbol.name == "cuLaunchKernelEx"}
    assert bool(early) == TARGETS[target].dependent_launch
    # A limit of registers reaches the assembler: EIATTR_MAXREG_COUNT (0x1B), a half word (0x03), in `.nv.info`.
    limit = matvec_config(TARGETS[target], 64, 256).registers
    assert (bytes((0x03, 0x1B, limit, 0x00)) in library.code) == (limit > 0)


def test_a_program_that_came_ready_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the folder of programs alone, another home exports the same bytes."""
    ready = bundle().parents[1] / "programs"
    monkeypatch.setenv("G4_PROGRAMS", str(ready))
    run = run_g4("export", checkpoint(), "--target", TARGET, "--ctx", str(CONTEXT), "--chunk", str(CHUNK), "--kv", "folded",
                 "--json", home=tmp_path)  # fmt: skip
    assert run.code == 0, run.stderr
    assert "compile" not in run.stderr and f"came ready from {ready}" in run.stderr
    made = Path(json.loads(run.stdout)["bundle"])
    assert (made / "model.pte").read_bytes() == (bundle() / "model.pte").read_bytes()
    assert not (tmp_path / "programs").exists()


def test_programs_are_built_ahead_from_a_config_alone() -> None:
    """By the same name as the export's: what that compiled is found, and nothing is compiled."""
    ready = bundle().parents[1] / "programs"
    before = sorted(ready.rglob("*"))
    tool = PACKAGE.parent / "tools" / "prebuild_programs.py"
    run = subprocess.run(
        [sys.executable, tool, model(0) / "config.json", "--mix", "default", "--ctx", str(CONTEXT), "--chunk", str(CHUNK),
         "--kv", "folded", "--target", TARGET, "--out", ready],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "compile" not in run.stderr
    assert sorted(ready.rglob("*")) == before


def test_a_folder_of_programs_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G4_PROGRAMS", str(tmp_path / "none"))
    run = run_g4("export", checkpoint(), "--target", TARGET, "--ctx", str(CONTEXT), "--chunk", str(CHUNK), "--kv", "folded",
                 home=tmp_path)  # fmt: skip
    assert run.code == 1
    assert "G4_PROGRAMS" in run.stderr and "hint:" in run.stderr
    assert not list(tmp_path.rglob("model.pte"))


@torch.no_grad()
def test_the_exported_graph_gives_the_models_tokens() -> None:
    """On the CPU implementations of the kernels: prompts in chunks, then one token after the other, sampled."""
    reader = open_checkpoint(checkpoint())
    signature = Signature.of(reader, CacheSpec(CONTEXT, CHUNK, torch.bfloat16), "folded")
    prompt = torch.randint(0, 160, (1, 30), generator=torch.Generator().manual_seed(3))
    settings = [torch.tensor([10.0]), torch.tensor([50]), torch.tensor([0.9]), torch.tensor([0.0]), torch.tensor([5])]

    def answer(step: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
        for start in range(0, 30, 10):
            token, _ = step(prompt[:, start : start + 10], torch.arange(start, start + 10), *settings)
        tokens = [int(token)]
        for position in range(30, 50):
            token, _ = step(token[None], torch.tensor([position]), *settings)
            tokens.append(int(token))
        return tokens

    eager = answer(Step(fill(CudaModel(signature), reader).eval(), sample))
    with compiling_for(TARGETS[TARGET]):
        traced = Step(fill(CudaModel(signature), reader).eval(), sample_cuda)
        # The methods of one module share its buffers: the caches.
        methods = {method: trace_method(traced, method, CHUNK).module() for method in METHODS}
        shared = dict(methods["prefill"].named_buffers())
        for name, buffer in methods["decode"].named_buffers():
            assert buffer.data_ptr() == shared[name].data_ptr() or ".kv_cache." not in name
        exported = answer(lambda *inputs: methods["decode" if inputs[0].shape[1] == 1 else "prefill"](*inputs))
    assert exported == eager
    assert len(set(eager)) > 5


@pytest.mark.parametrize(
    ("arguments", "code", "sentence", "hint"),
    [
        (["--target", "sm_75"], 1, "Unknown GPU target 'sm_75'.", "sm_80, sm_86, sm_90, sm_120"),
        (["--target", TARGET, "--kv", "q5"], 1, "Unknown KV format 'q5'.", "folded-tq4"),
        (["--target", TARGET, "--ctx", "8k"], 1, "outside 2 to 4,096", "--ctx 4096"),
        (["--target", TARGET, "--vram", "0.5"], 1, "512 MiB are there", "shorter --ctx"),
        (["--target", TARGET, "--backend", "cpu"], 2, "--target names GPU architectures", "--backend cuda"),
        (["--target", TARGET, "--vram", "many"], 2, "is not a size of memory", ""),
        (["--verify"], 2, "--verify checks compiled CUDA code", "--target"),
        (["--kv", "tq4"], 2, "--kv is about GPUs", "--target"),
        (["--backend", "cpu", "--vram", "8"], 2, "--vram is about GPUs", "--target"),
        (["--target", TARGET, "--verify"], 1, "--verify needs a GPU", "where one is"),
    ],
)
def test_refusals(g4: G4, arguments: list[str], code: int, sentence: str, hint: str) -> None:
    outcome = g4("export", checkpoint(), *arguments, "--dry-run")
    assert outcome.code == code
    assert sentence in outcome.err
    assert hint in outcome.err


def test_a_dry_run_says_what_fits(g4: G4) -> None:
    outcome = g4("export", checkpoint(), "--target", TARGET, "--ctx", str(CONTEXT), "--chunk", str(CHUNK), "--kv",
                 "folded", "--dry-run", "--json")  # fmt: skip
    document = json.loads(outcome.out)
    manifest = open_bundle(bundle()).manifest
    assert document["run_memory_bytes"] == manifest.memory.total_bytes
    assert document["files"]["weights.ptd"] == pytest.approx(manifest.files["weights.ptd"].bytes, rel=0.5)


def test_missing_tools_are_named_with_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(G4Error, match="needs g\\+\\+, which is not installed") as error:
        toolchain.check_toolchain({"PATH": str(tmp_path)})
    assert error.value.hint == "apt install g++"
    with pytest.raises(G4Error, match=r"which has no include/cuda\.h"):
        toolchain.find_cuda_home({"CUDA_HOME": str(tmp_path)})
    monkeypatch.setitem(toolchain.COMPILERS, "torch", "2.99")
    with pytest.raises(G4Error, match=r"needs torch 2\.99; here is"):
        toolchain.check_toolchain()


def test_a_bundle_for_another_gpu_says_how_to_make_one(g4: G4) -> None:
    with pytest.raises(G4Error, match="is for sm_120; this machine needs sm_80") as error:
        open_bundle(bundle()).program_for("sm_80")
    assert error.value.hint == "Export it for this machine: g4 export --target sm_80"
    outcome = g4("run", bundle(), "--engine", "torch", "--prompt", "x")
    assert outcome.code == 1
    assert "PyTorch sees no GPU here" in outcome.err
