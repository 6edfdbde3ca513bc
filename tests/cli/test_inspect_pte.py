"""`g4 inspect-pte` as people and scripts use it: what it prints, its documents, exit codes and refusals."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.workspace import Workspace
from tests.support import programs
from tests.support.gpu_library import FakeKernel, build_library, cubin
from tests.support.mini_program import mini_program

G4 = Callable[..., Any]
VIEWS = ("--methods", "--delegates", "--weights", "--state", "--memory")
LONG_NAME = "triton_tem_fused__to_copy__unsafe_view_add_mean_mm_mul_pow_rsqrt_t_16"
KERNELS = (FakeKernel(LONG_NAME, dynamic_shared=150_000, launches=2), FakeKernel("gather", local=64, warps=2))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    images = {kernel.name: cubin(kernel, "sm_90a") for kernel in KERNELS}
    return build_library(tmp_path_factory.mktemp("library"), KERNELS, images)


@pytest.fixture
def bundle(tmp_path: Path, library: bytes) -> Path:
    return programs.write_cuda_bundle(tmp_path / "tiny-cuda", library)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that is not g4's."""
    plan = programs.method("forward", [programs.tensor(programs.ScalarType.FLOAT, [8], memory=0)], [0], [0],
                           buffers=[0, 64])  # fmt: skip
    (tmp_path / "other.pte").write_bytes(programs.serialize([plan]))
    return tmp_path / "other.pte"


def test_overview(g4: G4, bundle: Path) -> None:
    outcome = g4("inspect-pte", bundle)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"{bundle}: bundle, ")
    for line in (
        "model         tiny, safetensors",
        "recipe        none: not quantized",
        "context       1,024 tokens, read in chunks of up to 128",
        "full cache    64.0 KiB bfloat16, 1 layer of 1,024 slots",
        "backend       cuda, sm_90",
        "built with    g4 0, torch 2.13.0",
        "methods       prefill, decode",
        "delegates     2 to CudaBackend",
        "GPU code      sm_90a",
        "contract      this g4 can run it",
        "checked       sizes and SHA-256 of all 3 files",
        "quality       not measured (g4 bench --quality --save-receipt)",
    ):
        assert line in lines


def test_every_view_fits_80_columns(g4: G4, bundle: Path) -> None:
    outcome = g4("inspect-pte", bundle, *VIEWS, "--check-gpu", "5090")  # fmt: skip
    too_wide = [line for line in outcome.out.splitlines()[1:] if len(line) > 80]
    assert too_wide == []
    assert "triton_tem_fuse…rsqrt_t_16   sm_90a       2" in outcome.out
    assert "library of prefill, decode: " in outcome.out
    assert "2 kernels, 3 launches per call" in outcome.out
    assert "layers 0-1, each: 2.00 KiB" in outcome.out
    assert "64 bytes per token for 1,024 tokens, and 8.44 KiB fixed" in outcome.out
    assert "in    tokens        int64     ≤ [1, 128]  T = 2 to 128   cuda:0" in outcome.out


def test_the_document_has_every_view(g4: G4, bundle: Path) -> None:
    outcome = g4("inspect-pte", bundle, *VIEWS, "--check-gpu", "h200", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert list(document) == ["overview", "methods", "delegates", "weights", "state", "memory", "check"]
    assert document["overview"]["contract"] == {"problems": [], "runs": True}
    assert document["overview"]["hashed"] == ["config.json", "model.pte", "weights.ptd"]
    assert document["methods"]["constant_methods"]["get_eos_ids"] == [1, 6]
    kernels = {kernel["name"]: kernel for kernel in document["delegates"]["libraries"][0]["kernels"]}
    assert kernels[LONG_NAME]["dynamic_shared_bytes"] == 150_000
    assert kernels["gather"]["local_bytes"] == 64
    assert document["delegates"]["outside"]["decode"] == {"et_copy::_h2d_copy.out": 2}
    assert document["weights"]["total_bytes"] == sum(w["bytes"] for w in document["weights"]["weights"])
    assert [row["tokens"] for row in document["memory"]["by_context"]] == [1024, 4096]
    assert document["check"]["fits"] is True


def test_only_the_views_asked_for_are_made(g4: G4, bundle: Path) -> None:
    assert list(json.loads(g4("inspect-pte", bundle, "--json").out)) == ["overview"]
    assert list(json.loads(g4("inspect-pte", bundle, "--state", "--json").out)) == ["overview", "state"]


@pytest.mark.parametrize(("gpu", "code", "word"), [("h200", 0, "fits"), ("4090", 1, "does not fit")])
def test_the_exit_code_says_whether_it_fits(g4: G4, bundle: Path, gpu: str, code: int, word: str) -> None:
    outcome = g4("inspect-pte", bundle, "--check-gpu", gpu, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (code, f"{word}\n", "")
    outcome = g4("inspect-pte", bundle, "--check-gpu", gpu, "--json")
    assert (outcome.code, json.loads(outcome.out)["check"]["fits"]) == (code, code == 0)
    outcome = g4("inspect-pte", bundle, "--check-gpu", gpu)
    assert f": {word}" in outcome.out
    assert ("do not run on sm_89: they are for sm_90a" in outcome.out) == bool(code)


def test_a_bundle_for_several_gpus(g4: G4, tmp_path: Path) -> None:
    kernel = FakeKernel("scale", static_shared=2048)
    libraries = {
        target: build_library(tmp_path, [kernel], {"scale": cubin(kernel, f"{target}{suffix}")})
        for target, suffix in (("sm_80", ""), ("sm_90", "a"))
    }
    bundle = programs.write_cuda_bundle(tmp_path / "both", libraries)
    outcome = g4("inspect-pte", bundle)
    assert "backend       cuda, sm_80, sm_90; below: sm_80 (--target)" in outcome.out
    assert "GPU code      sm_80" in outcome.out
    assert "GPU code      sm_90a" in g4("inspect-pte", bundle, "--target", "sm_90").out
    codes = {gpu: g4("inspect-pte", bundle, "--check-gpu", gpu, "-q").code for gpu in ("a100", "4090", "h200", "5090")}
    assert codes == {"a100": 0, "4090": 0, "h200": 0, "5090": 1}
    assert g4("inspect-pte", bundle, bundle, "--diff", "--target", "sm_90", "-q").out == "same\n"


def test_a_program_that_is_not_ours(g4: G4, program: Path) -> None:
    outcome = g4("inspect-pte", program, *VIEWS)
    assert outcome.code == 0
    assert "contract      none: this is not a program for g4 run" in outcome.out
    assert "in    input 0    float32   [8]     cpu" in outcome.out
    assert "No buffers that live between calls are named in this program." in outcome.out
    assert json.loads(g4("inspect-pte", program, "--json").out)["overview"]["contract"] is None


def test_a_program_with_its_data_files_and_a_data_file_alone(g4: G4, bundle: Path) -> None:
    together = json.loads(g4("inspect-pte", bundle / "model.pte", bundle / "weights.ptd", "--weights", "--json").out)
    whole = json.loads(g4("inspect-pte", bundle, "--weights", "--json").out)
    assert together["weights"] == whole["weights"]
    alone = g4("inspect-pte", bundle / "weights.ptd", "--weights")
    assert alone.out.startswith(f"{bundle / 'weights.ptd'}: data file, ")


def test_a_broken_contract_is_said(g4: G4, tmp_path: Path, library: bytes) -> None:
    for name, arguments, problem in (
        ("version", {"g4_contract_version": 7}, "cannot run: it follows method contract 7, this g4 follows 1"),
        ("chunk", {"get_max_prefill_chunk": 64}, "prefill's tokens is int64 [1, 128] instead of int64 [1, 64]"),
    ):
        outcome = g4("inspect-pte", programs.write_cuda_bundle(tmp_path / name, library, **arguments))
        assert problem in " ".join(outcome.out.split())


def test_a_missing_method_is_said(g4: G4, tmp_path: Path) -> None:
    parts = [programs._cuda_method("prefill", programs.CHUNK), *programs.constant_methods()]
    data = programs.serialize(parts, constants=[bytes(16)], blobs=[programs.cuda_blob()])
    (tmp_path / "model.pte").write_bytes(data)
    assert "cannot run: it has no method decode" in g4("inspect-pte", tmp_path / "model.pte").out
    plan = programs.method("prefill", [], outputs=[], inputs=[], instructions=[programs.schema.MoveCall(0, 0)])
    (tmp_path / "model.pte").write_bytes(
        programs.serialize([plan, *programs.constant_methods()], constants=[bytes(16)])
    )
    assert "prefill has 0 inputs instead of 7" in g4("inspect-pte", tmp_path / "model.pte").out


def test_the_receipt_is_shown(g4: G4, bundle: Path) -> None:
    from gemma4cli.export.bundle import open_bundle
    from gemma4cli.export.receipt import write_receipt

    result = {"perplexity": 12.3456, "reference_perplexity": 12.0, "kl": {"mean": 0.01234}, "top1_agreement": 0.953}
    document = {"environment": {}, "text": {"name": "eval.txt"}, "reference": {}, "result": result, "floor": {}}
    write_receipt(open_bundle(bundle), document)
    said = " ".join(g4("inspect-pte", bundle).out.split())
    assert "quality perplexity 12.35, unquantized 12; KL 0.01234 nats; top-1 agreement 95.3%; on eval.txt" in said
    (bundle / "g4.json").write_text((bundle / "g4.json").read_text() + "\n")
    assert "measured on another export of this folder" in " ".join(g4("inspect-pte", bundle).out.split())
    write_receipt(open_bundle(bundle), {**document, "result": {"perplexity": None}})
    outcome = g4("inspect-pte", bundle)
    assert (outcome.code, "receipt.json is damaged: a number is missing." in outcome.err) == (1, True)


def test_the_last_bundle_and_names_of_the_workspace(g4: G4, workspace_root: Path, library: bytes) -> None:
    assert "No bundle was given and none has been exported yet." in g4("inspect-pte").err
    path = programs.write_cuda_bundle(workspace_root / "bundles" / "mine", library)
    Workspace(workspace_root).remember("bundle", path)
    assert g4("inspect-pte", "--quiet").out == f"{path}\n"
    assert "(the last bundle exported)" in g4("inspect-pte").err
    assert g4("inspect-pte", "mine", "-q").out == f"{path}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["missing.pte"], 1, "missing.pte does not exist"),
        (["{bundle}", "--check-gpu", "gtx970"], 2, "Unknown GPU 'gtx970'."),
        (["{bundle}", "--diff"], 2, "--diff takes two, not 1."),
        (["{bundle}", "{bundle}", "--diff", "--check-gpu", "h200"], 2, "--diff goes with neither --check-gpu nor"),
        (["{bundle}", "{program}"], 2, "is a bundle and brings its data files along."),
        (["{program}", "{bundle}"], 1, "tiny-cuda is not a file."),
        (["{program}", "{program}"], 1, "other.pte is not an ExecuTorch data file"),
        (["{program}", "--verify"], 2, "other.pte is not a bundle: it has no manifest."),
        (["{program}", "--target", "sm_90"], 2, "other.pte is not a bundle: it has no manifest."),
        (["{bundle}", "--target", "sm_80"], 1, "tiny-cuda has no program for sm_80."),
        (["{bundle}/g4.json"], 1, "g4.json is the manifest of a bundle."),
        (["{bundle}/config.json"], 1, "config.json is not an ExecuTorch program"),
        (["{program}", "--plot", "x.svg"], 1, "does not say what its context length is"),
        (["{bundle}", "--plot", "x.gif"], 2, "x.gif is neither a .png nor an .svg file."),
        (["{bundle}", "--plot", "no-such-folder/x.svg"], 1, "no-such-folder does not exist."),
    ],
)
def test_refusals(
    g4: G4, bundle: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    code: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = g4("inspect-pte", *(text.format(bundle=bundle, program=program) for text in arguments))
    assert (outcome.code, outcome.out) == (code, "")
    assert sentence in outcome.err


def test_damage_is_one_sentence(g4: G4, bundle: Path) -> None:
    (bundle / "weights.ptd").write_bytes((bundle / "weights.ptd").read_bytes()[:-1])
    outcome = g4("inspect-pte", bundle)
    assert outcome.code == 1
    assert "weights.ptd has" in outcome.err and "it is incomplete or damaged." in outcome.err
    outcome = g4("inspect-pte", bundle / "weights.ptd", "--json")
    assert "is damaged: segment" in json.loads(outcome.out)["error"]["message"]
    assert "Traceback" not in outcome.err


def test_pictures(g4: G4, bundle: Path, tmp_path: Path) -> None:
    for name, start in (("memory.svg", b"<?xml"), ("memory.png", b"\x89PNG")):
        outcome = g4("inspect-pte", bundle, "--check-gpu", "h200", "--plot", tmp_path / name)
        assert (outcome.code, f"Wrote {tmp_path / name}." in outcome.err) == (0, True)
        first = (tmp_path / name).read_bytes()
        assert first.startswith(start)
        g4("inspect-pte", bundle, "--check-gpu", "h200", "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    picture = (tmp_path / "memory.svg").read_text()
    assert "context length in tokens" in picture and "<dc:date>" not in picture


def test_pictures_need_matplotlib(g4: G4, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = g4("inspect-pte", bundle, "--plot", tmp_path / "memory.svg")
    assert (outcome.code, "Plots need matplotlib, which is not installed." in outcome.err) == (1, True)
    assert "pip install 'gemma4cli[plot]'" in outcome.err


def test_diff(g4: G4, bundle: Path, tmp_path: Path, library: bytes) -> None:
    other = programs.write_cuda_bundle(tmp_path / "other", library, fill=1, created_with={"g4": "1"}, get_bos_id=3)
    outcome = g4("inspect-pte", "--diff", bundle, other)
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80
    for line in ("versions: 2 differences", "  g4: 0 → 1", "  torch: 2.13.0 → none", "  get_bos_id(): 2 → 3",
                 "weights: 4 differ", "  model.embed_tokens.codes: other values"):  # fmt: skip
        assert line in outcome.out.splitlines()
    document = json.loads(g4("inspect-pte", bundle, other, "--diff", "--json").out)
    assert (document["same"], document["a"]) == (False, str(bundle))
    assert g4("inspect-pte", bundle, bundle, "--diff").out == "No differences.\n"
    assert g4("inspect-pte", bundle, other, "--diff", "--quiet").out == "different\n"


def test_a_bundle_of_twenty_gigabytes_opens_at_once(g4: G4, bundle: Path) -> None:
    """The weights are a hole in the file: whoever read them would need half a minute."""
    size, path = 1_234_567, bundle / "weights.ptd"
    data = programs.data_file({"cuda_fqn_weight:cuda:model.norm.weight": bytes(size)})
    large = data[:-size].replace(struct.pack("<Q", size), struct.pack("<Q", 20 << 30))
    path.write_bytes(large)
    os.truncate(path, len(large) + (20 << 30))
    manifest = json.loads((bundle / "g4.json").read_text())
    manifest["files"]["weights.ptd"]["bytes"] = path.stat().st_size
    (bundle / "g4.json").write_text(json.dumps(manifest))
    started = time.process_time()
    outcome = g4("inspect-pte", bundle, *VIEWS)
    assert time.process_time() - started < 2
    assert outcome.code == 0, outcome.err
    assert "20.0 GiB" in outcome.out.splitlines()[0]
    checked = "checked sizes of all 3 files, SHA-256 of 2; not of weights.ptd (--verify)"
    assert checked in " ".join(outcome.out.split())


def test_verify_reads_large_files(g4: G4, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4cli.export import bundle as bundle_module
    from gemma4cli.inspection import artifact

    for module in (bundle_module, artifact):
        monkeypatch.setattr(module, "ALWAYS_VERIFIED_BYTES", 60_000)
    weights = bytearray((bundle / "weights.ptd").read_bytes())
    weights[-1] ^= 1
    (bundle / "weights.ptd").write_bytes(weights)
    assert "not of weights.ptd (--verify)" in " ".join(g4("inspect-pte", bundle).out.split())
    outcome = g4("inspect-pte", bundle, "--verify")
    assert (outcome.code, "weights.ptd is damaged: its SHA-256" in outcome.err) == (1, True)


def test_nothing_heavy_is_imported(bundle: Path) -> None:
    probe = (
        "import sys; from gemma4cli.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'executorch', 'numpy', 'triton', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", probe, "inspect-pte", bundle, *VIEWS, "--check-gpu", "h200"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_an_export_of_our_own(g4: G4, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(mini_program())
    outcome = g4("inspect-pte", tmp_path / "model.pte", "--delegates", "--weights")
    assert "this g4 can run it" in outcome.out
    assert "decode: 1 delegate to XnnpackBackend, 1 call, " in outcome.out
    assert "  operators   FullyConnected" in outcome.out
