"""What a program takes and which GPU has it, against numbers counted by hand."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from executorch.exir._serialize._program import deserialize_pte_binary

from gemma4cli.errors import G4Error
from gemma4cli.inspection import gpus
from gemma4cli.inspection.artifact import Artifact, open_artifact
from gemma4cli.inspection.gpus import GPUS, Gpu, find_gpu
from gemma4cli.inspection.predict import check_gpu, interesting_lengths, memory_model
from gemma4cli.inspection.weights import is_state, list_state, list_weights
from tests.support import programs
from tests.support.gpu_library import FakeKernel, build_library, cubin, fatbin
from tests.support.mini_program import CONTEXT as MINI_CONTEXT
from tests.support.mini_program import HEAD_DIM, KV_HEADS, RING_SLOTS, mini_program

SMALL = FakeKernel("small", static_shared=2048, dynamic_shared=4096)
# More than a consumer card has per block, less than an A100.
WIDE = FakeKernel("wide", dynamic_shared=150_000, launches=2)


def library(folder: Path, *targets: str, kernels: tuple[FakeKernel, ...] = (SMALL, WIDE)) -> bytes:
    images = {k.name: fatbin([("elf", target, cubin(k, target), False) for target in targets]) for k in kernels}
    return build_library(folder, kernels, images)


def program(folder: Path, code: bytes) -> Artifact:
    (folder / "model.pte").write_bytes(programs.cuda_program(code))
    (folder / "weights.ptd").write_bytes(programs.cuda_data())
    return open_artifact([folder / "model.pte", folder / "weights.ptd"])


def nbytes(name: str) -> int:
    dtype, shape = programs.CUDA_WEIGHTS[name]
    return math.prod(shape) * {"CHAR": 1, "INT": 4, "BFLOAT16": 2}[dtype.name]


def test_memory_of_a_cuda_bundle(tmp_path: Path) -> None:
    artifact = open_artifact([programs.write_cuda_bundle(tmp_path / "bundle", library(tmp_path, "sm_90a"))])
    model = memory_model(artifact)
    caches = [name for name in programs.CUDA_WEIGHTS if "kv_cache" in name]
    assert model.device == "cuda"
    assert model.weights == sum(nbytes(name) for name in programs.CUDA_WEIGHTS if name not in caches)
    assert model.state_per_token == 2 * 32  # the full layer: one head of 32, bfloat16
    assert model.state_fixed == nbytes(caches[0])
    assert model.workspace == 1 << 20
    use = model.at(None, 1000)
    assert use.total == model.weights + sum(map(nbytes, caches)) + (1 << 20) + 1000
    assert model.at(2048).state - model.at(1024).state == 1024 * 64
    assert interesting_lengths(artifact, model) == [1024, 4096]


def test_caches_without_names_count_as_workspace(tmp_path: Path) -> None:
    """Other exports keep no names of buffers; nothing tells them from activations then."""
    (tmp_path / "mini.pte").write_bytes(mini_program())
    model = memory_model(open_artifact([tmp_path / "mini.pte"]))
    caches = 2 * KV_HEADS * HEAD_DIM * 4 * (RING_SLOTS + MINI_CONTEXT)  # keys and values, float32
    assert (model.device, model.context_length, model.state_per_token) == ("cpu", MINI_CONTEXT, 0)
    plans = deserialize_pte_binary(mini_program()).program.execution_plan
    assert model.workspace == max(sum(plan.non_const_buffer_sizes) for plan in plans) > caches


def test_memory_that_does_not_depend_on_a_context(tmp_path: Path) -> None:
    plan = programs.method("forward", [programs.tensor(programs.ScalarType.FLOAT, [8], memory=0)], [0], [0],
                           buffers=[0, 64])  # fmt: skip
    (tmp_path / "other.pte").write_bytes(programs.serialize([plan]))
    artifact = open_artifact([tmp_path / "other.pte"])
    model = memory_model(artifact)
    assert (model.context_length, model.workspace, model.at(None).total) == (None, 64, 64)
    assert model.longest(1 << 40, 0) is None
    assert interesting_lengths(artifact, model) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.kv_cache.k", True),
        ("layers.3.v_cache", True),
        ("kv_cache.k_scale", True),
        ("cached_sin", False),
        ("model.layers.0.self_attn.k_proj.weight", False),
    ],
)
def test_caches_are_known_by_name(name: str, expected: bool) -> None:
    assert is_state(name) is expected


def test_weights_have_layer_and_role(tmp_path: Path) -> None:
    artifact = program(tmp_path, library(tmp_path, "sm_80"))
    found = {w.name: (w.layer, w.role, w.short_name, w.file) for w in list_weights(artifact)}
    assert found["model.layers.1.self_attn.q_proj.codes"] == (1, "attention", "self_attn.q_proj.codes", "weights.ptd")
    assert found["model.embed_tokens.codes"] == (None, "embedding", "embed_tokens.codes", "weights.ptd")
    assert found["model.norm.weight"][:2] == (None, "norm")
    assert len(found) == 4
    assert [(b.name[13:], b.methods) for b in list_state(artifact)] == [
        ("0.self_attn.kv_cache.k", ("prefill", "decode")),
        ("1.self_attn.kv_cache.k", ("prefill", "decode")),
    ]


def test_weights_without_their_file_are_still_listed(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(programs.cuda_program(library(tmp_path, "sm_80")))
    weights = list_weights(open_artifact([tmp_path / "model.pte"]))
    assert {w.file for w in weights if w.name.startswith("model.")} == {"(not given)"}


@pytest.mark.parametrize(
    ("targets", "gpu", "problem"),
    [
        (("sm_80",), "a100", None),
        (("sm_80",), "4090", "kernel wide takes 150,000 bytes of shared memory per block, and it has 101,376"),
        (("sm_80",), "h200", "2 of 2 kernels do not run on sm_90: they are for sm_80"),
        (("sm_90a",), "h200", None),
        (("sm_90a",), "h100", None),
        (("sm_80", "sm_90a"), "h200", None),
        (("sm_80", "sm_90a"), "5090", "2 of 2 kernels do not run on sm_120: they are for sm_80, sm_90a"),
        (("sm_120a",), "5090", "kernel wide takes 150,000 bytes of shared memory per block, and it has 101,376"),
    ],
)
def test_architecture_and_shared_memory(
    tmp_path: Path, targets: tuple[str, ...], gpu: str, problem: str | None
) -> None:
    found = check_gpu(program(tmp_path, library(tmp_path, *targets)), GPUS[gpu])
    assert list(found.problems) == ([] if problem is None else [problem])
    assert found.fits is (problem is None)
    if problem is None:
        assert found.worst_kernel is not None and found.worst_kernel.name == "wide"


def test_memory_that_a_gpu_lacks(tmp_path: Path) -> None:
    artifact = open_artifact([programs.write_cuda_bundle(tmp_path / "bundle", library(tmp_path, "sm_90a"))])
    model = memory_model(artifact)
    gpu = replace(GPUS["h200"], context_bytes=1 << 20)
    needed = model.at(None, 1 << 20).total
    enough = check_gpu(artifact, replace(gpu, memory_bytes=needed))
    assert enough.fits and enough.longest_context == programs.CONTEXT
    short = check_gpu(artifact, replace(gpu, memory_bytes=needed - 1))
    assert short.problems == ("it takes 2.08 MiB, 1 B more than its 2.08 MiB",)
    assert short.longest_context == programs.CONTEXT - 1
    assert check_gpu(artifact, replace(gpu, memory_bytes=1)).longest_context == 0
    assert check_gpu(artifact, gpu).longest_context == 4096, "no more than the model can be exported with"


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    remark = "the program does not say what its kernels allocate while they run; that comes on top"
    assert check_gpu(program(tmp_path, library(tmp_path, "sm_90a")), GPUS["h200"]).remarks == (remark,)

    image = fatbin([("elf", "sm_90a", cubin(SMALL, "sm_90a"), True), ("ptx", "sm_80", b"ptx", False)])
    closed = program(tmp_path, build_library(tmp_path, [SMALL], {"small": image}))
    assert "compressed code was not read (kernels: 1)" in check_gpu(closed, GPUS["h200"]).remarks
    compiled = "there is only PTX for sm_120, which its driver would compile at load (kernels: 1)"
    assert compiled in check_gpu(closed, GPUS["5090"]).remarks

    data = build_library(tmp_path, [SMALL], {"small": cubin(SMALL, "sm_90a")})
    nameless = program(tmp_path, data.replace(b"__small_start", b"__other_thing"))
    assert "dynamic shared memory is not known (kernels: 1)" in check_gpu(nameless, GPUS["h200"]).remarks

    entry = programs.serialize([programs._cuda_method("decode", 1)], blobs=[programs.cuda_blob("absent")])
    (tmp_path / "model.pte").write_bytes(entry)
    without = check_gpu(open_artifact([tmp_path / "model.pte"]), GPUS["h200"])
    assert without.fits
    assert without.remarks[0] == "its compiled library was not given, so architecture and shared memory are unchecked"


def test_a_cpu_program_fits_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "mini.pte").write_bytes(mini_program())
    found = check_gpu(open_artifact([tmp_path / "mini.pte"]), GPUS["a100"])
    assert found.problems == ("the program runs on the CPU: it has no GPU code",)


def test_the_table_agrees_with_the_targets_kernels_are_compiled_for() -> None:
    from gemma4cli.kernels.targets import TARGETS

    by_capability = {gpu.capability: gpu for gpu in GPUS.values()}
    for target in TARGETS.values():
        assert by_capability[target.capability].shared_bytes_per_block == target.shared_bytes_per_block
        assert max(g.memory_bytes for g in GPUS.values() if g.capability == target.capability) <= target.memory_bytes
    assert all(gpu.key == key for key, gpu in GPUS.items())


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGet(int* device, int ordinal) { *device = 7; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "NVIDIA Test", size); return device != 7; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 5000000000ul; return device != 7; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 97 ? 101376 : -1;
    return device != 7;
}
"""


def build_driver(folder: Path, init: int) -> str:
    (folder / "driver.c").write_text(DRIVER)
    path = folder / f"driver-{init}.so"
    subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT={init}", folder / "driver.c", "-o", path], check=True)
    return str(path)


def test_this_gpu_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_DRIVER", build_driver(tmp_path, 0))
    assert find_gpu("this") == Gpu("this", "NVIDIA Test", (8, 6), 5_000_000_000, 101376, GPUS["3090"].context_bytes)


def test_machines_without_a_gpu_get_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_DRIVER", str(tmp_path / "absent.so"))
    with pytest.raises(G4Error, match="This machine has no CUDA driver"):
        find_gpu("this")
    monkeypatch.setattr(gpus, "_DRIVER", build_driver(tmp_path, 100))
    with pytest.raises(G4Error, match=r"The CUDA driver finds no usable GPU \(cuInit: error 100\)"):
        find_gpu("this")


def test_unknown_gpus_are_wrong_usage() -> None:
    with pytest.raises(G4Error, match="Unknown GPU 'gtx970'") as caught:
        find_gpu("gtx970")
    assert caught.value.exit_code == 2
    assert find_gpu("H200") is GPUS["h200"]
