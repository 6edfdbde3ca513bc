"""The runner with a program that lives on a device, as CUDA exports do, and a delegate that plays the device.

The program is assembled as `g4 export` does it, around libraries that are not there; `tests/support/host_delegate.cpp`
takes the place of `libexecutorch_backend_cuda.so`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4cli import native
from gemma4cli.export.contract import METHODS, Contract
from gemma4cli.export.cuda.compile import Library
from gemma4cli.export.cuda.lower import assemble
from gemma4cli.export.cuda.model import Signature
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support import tiny

CONTEXT, CHUNK, VOCAB, WINDOW = 96, 6, 40, 8
CONTRACT = Contract(CONTEXT, CHUNK, VOCAB, WINDOW, WINDOW + CHUNK - 1, eos_ids=(1,), bos_id=2)
PROMPT = (2, 5, 9, 30, 12, 8, 8, 21, 39, 3, 17, 4, 11)
DELEGATE = Path(__file__).parents[1] / "support" / "host_delegate.cpp"
# head_dim is a multiple of 16 for the kernels' layouts; nothing of this model is run.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "global_head_dim": 128, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


def expected(prompt: Sequence[int], count: int, sampling: int = 3 * 64) -> list[int]:
    """What the delegate's model says after `prompt`; `sampling` is what its sampling inputs add up to: top_p is 1."""
    known = list(prompt)
    for _ in range(count):
        known.append((sampling + sum((i + 1) * (token + 1) for i, token in enumerate(known))) % VOCAB)
    return known[len(prompt) :]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    quantize_checkpoint(tiny.write_checkpoint(folder / "plain", **WIDE), folder / "quantized", load_recipe("default"))
    spec = CacheSpec(CONTEXT, CHUNK, torch.bfloat16)
    signature = Signature.of(open_checkpoint(folder / "quantized"), spec, "bf16")
    (folder / "bundle").mkdir()
    libraries = {method: Library(method.encode(), (), {}) for method in METHODS}
    (folder / "bundle" / "model.pte").write_bytes(assemble(libraries, signature, CONTRACT))
    return folder / "bundle"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ExecuTorch's runtime and, beside it, the delegate: where the runner looks for one."""
    folder = tmp_path_factory.mktemp("libraries")
    spec = importlib.util.find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    executorch = Path(spec.submodule_search_locations[0])
    include = executorch / "include"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DC10_USING_CUSTOM_GENERATED_MACROS", f"-I{include}",
         f"-I{include}/executorch/runtime/core/portable_type/c10", str(DELEGATE), f"-L{executorch}/lib", "-lexecutorch",
         "-o", str(folder / "libexecutorch_backend_cuda.so")], check=True
    )  # fmt: skip
    (folder / "libexecutorch.so").symlink_to(executorch / "lib" / "libexecutorch.so")
    return folder


def run(
    bundle: Path, libraries: Path, *arguments: str, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = native.runner_environment() | variables
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(libraries), environment["LD_LIBRARY_PATH"]])
    command = [native.find_runner(), "--bundle", bundle, *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def ids(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT[:7]])
def test_inputs_and_outputs_travel_to_the_device_and_back(
    bundle: Path, libraries: Path, prompt: tuple[int, ...]
) -> None:
    """Prompts of several chunks, of one token, and with one token left over after a chunk."""
    finished = run(bundle, libraries, "--tokens", ids(prompt), "--max-new-tokens", "9", "--stop", "", "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["tokens"] == expected(prompt, 9)


def test_every_sampling_input_has_its_own_place(bundle: Path, libraries: Path) -> None:
    settings = ("--temperature", "0.5", "--top-k", "3", "--top-p", "0.75", "--min-p", "0.125", "--seed", "29")
    finished = run(
        bundle, libraries, "--tokens", ids(PROMPT), "--max-new-tokens", "5", "--stop", "", "--json", *settings
    )
    added = 32 + 7 * 3 + 3 * 48 + 5 * 8 + 11 * 29
    assert json.loads(finished.stdout)["tokens"] == expected(PROMPT, 5, added)


def test_logits_are_fetched(bundle: Path, libraries: Path, tmp_path: Path) -> None:
    line = f"generate id=1 tokens={ids(PROMPT)} max_new_tokens=2 stop= logits={tmp_path / 'logits'}\n"
    finished = run(bundle, libraries, stdin=line)
    assert finished.returncode == 0, finished.stderr
    rows = np.fromfile(tmp_path / "logits", dtype=np.float32).reshape(-1, VOCAB)
    assert len(rows) == 4  # three chunks and one token
    assert rows[2:].argmax(1).tolist() == expected(PROMPT, 2)


def test_a_session_starts_over_after_another_has_had_the_only_cache(bundle: Path, libraries: Path) -> None:
    other = PROMPT[::-1]
    lines = [(1, "a", PROMPT), (2, "a", (*PROMPT, 6, 7)), (3, "b", other), (4, "a", (*PROMPT, 6, 7, 8))]
    finished = run(bundle, libraries, stdin="".join(
        f"generate id={number} session={session} tokens={ids(tokens)} max_new_tokens=1 stop=\n"
        for number, session, tokens in lines
    ))  # fmt: skip
    replies = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [reply["token"] for reply in replies if reply["event"] == "token"] == [
        expected(tokens, 1)[0] for _, _, tokens in lines
    ]
    assert [reply["reused_tokens"] for reply in replies if reply["event"] == "done"] == [0, len(PROMPT), 0, 0]


def test_a_delegate_that_cannot_load_is_quoted_with_the_cause(bundle: Path, libraries: Path) -> None:
    finished = run(bundle, libraries, "--tokens", "5", HOST_DELEGATE_FULL="1")
    assert finished.returncode == 1
    assert finished.stderr.splitlines() == [
        "error: `prefill` of model.pte cannot be loaded (MemoryAllocationFailed: The device is full).",
        "hint: Free some memory, or export with a shorter context (--ctx).",
    ]
