"""What people really have, run and exported: ExecuTorch's quantized checkpoints and GGUF files, without a step between.

ExecuTorch's own code (examples/models/gemma4_31b) quantizes and saves here, and says what its weights mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.examples.models.gemma4_31b.model import _hf_to_model_key
from executorch.extension.llm.export.load import iter_checkpoint
from executorch.extension.llm.export.quant import QuantConfig, QuantRecipe, QuantRule, identity, quantize_stream
from executorch.extension.llm.export.quant.quantize import dequantize_weight
from gguf.constants import GGMLQuantizationType as GGML
from safetensors.torch import save_file

from gemma4cli.export.bundle import open_bundle
from gemma4cli.model.config import Gemma4Config
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.tensors import dequantize
from tests.conftest import Outcome
from tests.support.answering import greedy_answers
from tests.support.bundles import TINY_CHUNK, TINY_CONTEXT, tiny_bundle, tiny_checkpoint
from tests.support.chat_fixture import DEMO
from tests.support.gguf_writer import describe, write
from tests.support.torchao_saver import ASSETS, LENT, save

RunG4 = Callable[..., Outcome]
FRANCE = "What is the capital of France?"
SIZES = ("--ctx", str(TINY_CONTEXT), "--chunk", str(TINY_CHUNK), "--json")


@pytest.fixture(scope="module")
def by_executorch() -> dict[str, torch.Tensor]:
    """The demo model, quantized by ExecuTorch with its default recipe, by its names."""
    hidden_size = Gemma4Config.from_dir(DEMO).hidden_size
    recipe = QuantRecipe(
        rules=[
            QuantRule(r"embed_tokens\.weight", QuantConfig(8, hidden_size, True, "min_max")),
            QuantRule(r".*norm\.weight", None),
            QuantRule(r".*\.weight", QuantConfig(4, 32, False, "min_max")),
        ]
    )
    tied = {"embed_tokens.weight": ("lm_head.weight", True)}
    pairs = iter_checkpoint(str(DEMO), key_map=_hf_to_model_key, convert=identity, tie_map=tied)
    return dict(quantize_stream(pairs, recipe, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def prequantized(by_executorch: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("prequantized") / "demo", DEMO, by_executorch)


def test_weights_are_what_executorch_says(prequantized: Path, by_executorch: dict[str, torch.Tensor]) -> None:
    reader = open_checkpoint(prequantized)
    assert {name.removeprefix("model.") for name in reader.names()} == set(by_executorch)
    for name, tensor in reader.stream():
        theirs = by_executorch[name.removeprefix("model.")]
        values = theirs.float() if type(theirs) is torch.Tensor else dequantize_weight(theirs)
        assert torch.equal(dequantize(tensor), values), name


def test_it_answers_as_executorchs_values_do(
    g4: RunG4, prequantized: Path, by_executorch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    values = {
        name if name == "lm_head.weight" else f"model.{name}": (
            tensor.float() if type(tensor) is torch.Tensor else dequantize_weight(tensor)
        )
        for name, tensor in by_executorch.items()
    }
    save_file(values, plain / "model.safetensors")
    for name in (*ASSETS, *LENT):
        shutil.copyfile(DEMO / name, plain / name)
    assert greedy_answers(prequantized) == greedy_answers(plain)
    asked = g4("run", "--engine", "eager", "--model", prequantized, "--prompt", FRANCE, "--temperature", "0")
    assert asked.out == "Paris\n", asked.err


def test_the_same_weights_make_the_same_program(g4: RunG4, tmp_path: Path) -> None:
    """A checkpoint of ours as ExecuTorch would have saved it: the export does not differ in a byte."""
    ours = tiny_bundle("default")
    (checkpoint,) = (ours.parents[1] / "checkpoints").iterdir()
    theirs = save(tmp_path / "theirs", tiny_checkpoint(), dict(open_checkpoint(checkpoint).stream()))
    refused = g4("export", theirs, "--recipe", "default", *SIZES)
    assert (refused.code, "is quantized already" in refused.err) == (1, True)
    done = g4("export", theirs, *SIZES)
    assert done.code == 0, done.err
    bundle = Path(json.loads(done.out)["bundle"])
    same_program(bundle, ours)
    assert open_bundle(bundle).manifest.model["source"]["kind"] == "torchao"


def test_a_gguf_of_floats_is_quantized_on_the_way(g4: RunG4, tmp_path: Path) -> None:
    """The floats are the checkpoint's own, so the export is the checkpoint's, too."""
    file = write(tmp_path / "tiny.gguf", describe(tiny_checkpoint(), GGML.F32))
    planned = g4("export", file, "--dry-run", *SIZES)
    assert (planned.code, f"Convert it first: g4 convert-gguf {file}" in planned.err) == (1, True)
    done = g4("export", file, *SIZES)
    assert done.code == 0, done.err
    assert "Converting tiny.gguf to" in done.err
    bundle = Path(json.loads(done.out)["bundle"])
    assert bundle.name == f"tiny-default-cpu-{TINY_CONTEXT}"
    same_program(bundle, tiny_bundle("default"))


def test_a_quantized_gguf_is_exported_as_it_is(g4: RunG4, tmp_path: Path) -> None:
    model = describe(tiny_checkpoint(), GGML.Q4_0).set("general.file_type", 2)
    file = write(tmp_path / "tiny-Q4_0.gguf", model)
    refused = g4("export", file, "--recipe", "default", *SIZES)
    assert (refused.code, "is quantized already" in refused.err) == (1, True)
    planned = g4("export", file, "--dry-run", *SIZES)
    assert planned.code == 0, planned.err
    done = g4("export", file, *SIZES)
    assert done.code == 0, done.err
    bundle = open_bundle(Path(json.loads(done.out)["bundle"]))
    assert bundle.manifest.model["source"]["name"] == "tiny-Q4_0.gguf"
    assert bundle.manifest.model["recipe"]["types"]["Q4_0"] > 0
    seen = g4("inspect-pte", bundle.path, "--verify")
    assert "recipe        GGUF Q4_0: Q4_0 9" in seen.out
    plan = json.loads(planned.out)
    assert plan["checkpoint_first_bytes"] == 0
    assert not (tmp_path / "g4-home" / "checkpoints").exists()
    assert plan["run_memory_bytes"] == pytest.approx(bundle.manifest.memory.total_bytes, rel=0.1)
    for name, record in bundle.manifest.files.items():
        assert plan["files"][name] == pytest.approx(record.bytes, rel=0.5), name
    asked = ("--raw", "--prompt", "abc", "--temperature", "0", "--max-new-tokens", "4", "--quiet")
    assert g4("run", bundle.path, *asked).code == 0
    eager = g4("run", file, *(option for option in asked if option != "--quiet"))
    assert eager.code == 0
    assert "Converting tiny-Q4_0.gguf" in eager.err


def same_program(bundle: Path, other: Path) -> None:
    """Program and weights are equal byte for byte; only the manifests tell where each came from."""
    files = sorted(path.name for path in other.iterdir() if path.suffix in (".pte", ".ptd"))
    assert files
    for name in files:
        assert (bundle / name).read_bytes() == (other / name).read_bytes(), name
