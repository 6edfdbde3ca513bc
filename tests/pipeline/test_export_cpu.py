"""Exported CPU programs compute what the eager model computes, in ExecuTorch's Python runtime and in the C++ runner."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4cli import native
from gemma4cli.engine.base import GenerationRequest
from gemma4cli.engine.runner import RunnerEngine
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import open_bundle
from gemma4cli.export.cpu import build_cpu_model
from gemma4cli.export.export import ExportSpec, plan_export
from gemma4cli.export.sources import plan_quantization
from gemma4cli.export.trace import Step
from gemma4cli.inspection.artifact import open_artifact
from gemma4cli.inspection.documents import delegates
from gemma4cli.kernels.cpu_sampling import sample
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GREEDY, SamplingSettings
from gemma4cli.native import load_kernels
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.bundles import (
    DEMO_MODEL,
    PACKAGE,
    TINY_CHUNK,
    TINY_CONTEXT,
    demo_bundle,
    demo_checkpoint,
    run_g4,
    run_of,
    tiny_bundle,
    tiny_checkpoint,
    tiny_export,
)

SAMPLED = SamplingSettings(temperature=1.0, top_k=64, top_p=0.95, seed=11)
DEMO_TOKENS = 64

Call = Callable[..., tuple[Tensor, Tensor]]


def python_runtime(bundle: Path) -> Call:
    """The bundle's methods in ExecuTorch's own Python runtime, with caches of their own."""
    from executorch.runtime import Runtime

    load_kernels()
    program = Runtime.get().load_program(bundle / "model.pte", data_path=bundle / "weights.ptd")
    methods = {name: program.load_method(name) for name in ("prefill", "decode")}
    return lambda *inputs: methods["decode" if inputs[0].shape[1] == 1 else "prefill"].execute(inputs)


def eager(checkpoint: Path, bundle: Path) -> Call:
    contract = open_bundle(bundle).contract
    return Step(build_cpu_model(open_checkpoint(checkpoint), contract.context_length, contract.prefill_chunk), sample)


def inputs(tokens: list[int], position: int, settings: SamplingSettings) -> tuple[Tensor, ...]:
    return (
        torch.tensor([tokens]),
        torch.arange(position, position + len(tokens)),
        torch.tensor([settings.temperature], dtype=torch.float32),
        torch.tensor([settings.top_k]),
        torch.tensor([settings.top_p], dtype=torch.float32),
        torch.tensor([settings.min_p], dtype=torch.float32),
        torch.tensor([settings.seed]),
    )


def generate(
    call: Call, prompt: list[int], chunks: list[int], count: int, settings: SamplingSettings = GREEDY
) -> tuple[list[int], Tensor]:
    """Read a prompt in the given chunks, generate, and return the tokens and the logits they came from."""
    assert sum(chunks) == len(prompt)
    position = 0
    for size in chunks:
        token, logits = call(*inputs(prompt[position : position + size], position, settings))
        position += size
    tokens, seen = [int(token)], [logits.clone()]
    while len(tokens) < count:
        token, logits = call(*inputs([tokens[-1]], position, settings))
        position += 1
        tokens.append(int(token))
        seen.append(logits.clone())
    return tokens, torch.cat(seen)


def tiny_prompt(length: int) -> list[int]:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(5)).tolist()


@cache
def demo_prompt() -> list[int]:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return Chat.from_dir(demo_bundle()).prompt_ids(messages, thinking=False)


@cache
def demo_eager(settings: SamplingSettings, count: int) -> tuple[list[int], Tensor]:
    return generate(eager(demo_checkpoint(), demo_bundle()), demo_prompt(), [len(demo_prompt())], count, settings)


def runner_tokens(bundle: Path, prompt: list[int], count: int, settings: SamplingSettings) -> list[int]:
    with RunnerEngine(bundle) as engine:
        return list(engine.generate(GenerationRequest(tuple(prompt), count, settings, frozenset())))


def test_float_program_is_the_eager_model() -> None:
    """Without quantization nothing amplifies rounding, so logits agree to 1e-4 through several wraps of the ring."""
    call = python_runtime(tiny_bundle("none"))
    reference = eager(tiny_checkpoint(), tiny_bundle("none"))
    prompt = tiny_prompt(40)
    chunks = [12, 12, 1, 7, 8]
    expected, logits = generate(reference, prompt, chunks, 40)
    tokens, found = generate(call, prompt, chunks, 40)
    assert tokens == expected
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("recipe", ["none", "sensitive"])
def test_chunks_do_not_change_the_answer(recipe: str) -> None:
    call = python_runtime(tiny_bundle(recipe))
    prompt = tiny_prompt(49)
    whole, logits = generate(call, prompt, [12, 12, 12, 12, 1], 40, SAMPLED)
    for chunks in ([1] * 49, [2] * 24 + [1], [11, 5, 12, 3, 12, 6]):
        tokens, found = generate(call, prompt, chunks, 40, SAMPLED)
        assert tokens == whole
        torch.testing.assert_close(found, logits, rtol=0, atol=2e-3 if recipe == "none" else 0.5)


def test_quantized_programs_follow_the_eager_model_step_by_step() -> None:
    """Rounding of a float may move an 8-bit activation by a step, so most steps must agree closely, and all roughly."""
    checkpoint = tiny_bundle("sensitive").parents[1] / "checkpoints" / "tiny-sensitive"
    call, reference = python_runtime(tiny_bundle("sensitive")), eager(checkpoint, tiny_bundle("sensitive"))
    differences = []
    for position, token in enumerate(tiny_prompt(60)):
        arguments = inputs([token], position, GREEDY)
        differences.append(float((call(*arguments)[1] - reference(*arguments)[1]).abs().max()))
    assert torch.tensor(differences).median() < 1e-3
    assert max(differences) < 2.0


def test_demo_answers_the_same_everywhere() -> None:
    prompt = demo_prompt()
    expected, logits = demo_eager(GREEDY, DEMO_TOKENS)
    tokens, found = generate(python_runtime(demo_bundle()), prompt, [len(prompt)], DEMO_TOKENS)
    assert Chat.from_dir(demo_bundle()).tokenizer.decode(tokens[: tokens.index(16)]) == "Paris"
    assert tokens == expected
    assert runner_tokens(demo_bundle(), prompt, DEMO_TOKENS, GREEDY) == expected
    assert (found - logits).abs().amax(-1).median() < 0.5


def test_demo_samples_the_same_everywhere() -> None:
    prompt, count = demo_prompt(), 24
    expected, _ = demo_eager(SAMPLED, count)
    call = python_runtime(demo_bundle())
    assert generate(call, prompt, [len(prompt)], count, SAMPLED)[0] == expected
    assert runner_tokens(demo_bundle(), prompt, count, SAMPLED) == expected
    hot = SamplingSettings(temperature=3.0, seed=1)
    other = SamplingSettings(temperature=3.0, seed=2)
    first = generate(call, prompt, [len(prompt)], count, hot)[0]
    assert runner_tokens(demo_bundle(), prompt, count, hot) == first
    assert generate(call, prompt, [len(prompt)], count, other)[0] != first


def test_caches_are_written_in_place_and_only_once_there() -> None:
    """A copy of a cache anywhere in a method would cost its whole allocation at every step."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    bundle = open_bundle(demo_bundle())
    program = deserialize_pte_binary(bundle.program_for("cpu").read_bytes()).program
    smallest = min(record.bytes // (2 * record.layers) for record in bundle.manifest.kv.values())
    places = {}
    for plan in program.execution_plan[:2]:
        big = [
            value.val
            for value in plan.values
            if type(value.val).__name__ == "Tensor"
            and value.val.allocation_info is not None
            and 4 * torch.Size(value.val.sizes).numel() >= smallest
        ]
        places[plan.name] = sorted(
            (tensor.extra_tensor_info.fully_qualified_name, tensor.allocation_info.memory_offset_low) for tensor in big
            if tensor.extra_tensor_info
        )  # fmt: skip
        if plan.name == "decode":
            assert len(places[plan.name]) == len(big) == 24
            assert plan.non_const_buffer_sizes[1] < smallest
        assert plan.non_const_buffer_sizes[2] == sum(record.bytes for record in bundle.manifest.kv.values())
    assert places["decode"] == [place for place in places["prefill"] if "kv_cache" in place[0]]


def test_a_program_is_made_of_few_operators_of_ours() -> None:
    """Nothing is delegated, and nothing that touches weights or whole caches is left to ExecuTorch's own kernels."""
    found = delegates(open_artifact([demo_bundle()]))
    assert found["delegates"] == []
    layers = 12
    for method, outside in found["outside"].items():
        ours = {name.partition(".")[0]: count for name, count in outside.items() if name.startswith("g4::")}
        assert ours == {
            "g4::cpu_embedding": 1,
            "g4::cpu_linear": 7 * layers - 2 + 1,  # two layers have no v_proj; the head
            "g4::cpu_rms_norm": 2 * layers + 1,
            "g4::cpu_head_rope": 3 * layers,
            "g4::cpu_attention": layers,
            "g4::cpu_norm_add": 2 * layers,
            "g4::cpu_gelu_mul": layers,
            "g4::cpu_softcap": 1,
            "g4::sample": 1,
        }, method
        per_layer = sum(count for name, count in outside.items() if not name.startswith("g4::")) / layers
        assert per_layer < 6, outside


def test_weights_are_mapped_once_and_read_where_they_lie() -> None:
    """ExecuTorch's loader maps every constant of every method by itself: twice the pages, and twice their faults."""
    with RunnerEngine(demo_bundle()) as engine:
        maps = Path(f"/proc/{engine._process.pid}/maps").read_text().splitlines()
    assert [line.split()[1] for line in maps if line.endswith("weights.ptd")] == ["r--s"]


def test_a_program_without_its_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(demo_bundle(), tmp_path / "bundle")
    weights = tmp_path / "bundle" / "weights.ptd"
    refusals = {}
    for kept in (100_000, 0, None):
        weights.unlink() if kept is None else os.truncate(weights, kept)
        command = [native.find_runner(), "--bundle", tmp_path / "bundle", "--tokens", "2"]
        run = subprocess.run(command, env=native.runner_environment(), capture_output=True, text=True, timeout=60)
        assert run.returncode == 1
        refusals[kept] = run.stderr
    assert "weights.ptd is not a valid weight file" in refusals[100_000]
    assert "weights.ptd cannot be read (No data available)." in refusals[0]
    assert refusals[None].startswith("error: model.pte needs weights, and no .ptd file lies beside it.\nhint: Copy")


def test_export_says_nothing_but_its_result() -> None:
    run = run_of(demo_bundle())
    document = json.loads(run.stdout)
    assert document["bundle"] == str(demo_bundle())
    allowed = ("demo is not quantized; quantizing", "quantize: ", "trace and lower: ", "pack: ", "hash ")
    noise = [line for line in run.stderr.splitlines() if not line.startswith(allowed)]
    assert noise == []


def test_manifest_accounts_for_the_bundle() -> None:
    bundle = open_bundle(demo_bundle(), verify=True)
    manifest = bundle.manifest
    assert {path.name for path in demo_bundle().iterdir()} == {*manifest.files, "g4.json"}
    assert {"model.pte", "weights.ptd", "tokenizer.json", "chat_template.jinja"} <= set(manifest.files)
    assert manifest.model["source"]["files"]["model.safetensors"]["sha256"]
    assert manifest.model["recipe"]["name"] == "default"
    assert manifest.contract.context_length == 1024
    assert manifest.contract.ring_slots == 64 + 256 - 1
    assert manifest.reencoded == {}
    assert str(Path.home()) not in (demo_bundle() / "g4.json").read_text()


def test_dry_run_tells_the_size_beforehand() -> None:
    plan = plan_export(ExportSpec(demo_checkpoint(), Path("unused"), context_length=1024))
    manifest = open_bundle(demo_bundle()).manifest
    for name in ("model.pte", "weights.ptd"):
        assert plan.files[name] == pytest.approx(manifest.files[name].bytes, rel=0.15), name
    assert set(plan.files) == {*manifest.files, "g4.json"}
    assert plan.memory.kv_bytes == manifest.memory.kv_bytes == sum(record.bytes for record in manifest.kv.values())
    # The same process quantized the model first, whose plan speaks for itself.
    quantization = plan_quantization(DEMO_MODEL, load_recipe("default"))
    peak = max(plan.peak_memory_bytes, quantization.peak_bytes)
    assert run_of(demo_bundle()).peak_bytes == pytest.approx(peak, rel=0.4)


def test_another_export_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    """Another process, another folder: every file is the same."""
    run = run_g4(*tiny_export("sensitive"), "--low-memory", home=tmp_path / "elsewhere")
    assert run.code == 0, run.stderr
    there = Path(json.loads(run.stdout)["bundle"])
    here = tiny_bundle("sensitive")
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in here.iterdir())
    for path in here.iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_killed_export_leaves_nothing_that_passes_for_a_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    partial = tmp_path / ".bundle.partial"
    command = [sys.executable, "-m", "gemma4cli", *map(str, tiny_export("none")), "--output", str(target)]
    environment = {**os.environ, "G4_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert partial.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    with pytest.raises(G4Error, match="is not a bundle"):
        open_bundle(partial)
    again = run_g4(*tiny_export("none"), "--output", target, home=tmp_path / "home")
    assert again.code == 0, again.stderr
    assert open_bundle(target, verify=True).contract.prefill_chunk == TINY_CHUNK
    assert open_bundle(target).contract.context_length == TINY_CONTEXT
    assert not partial.exists()
