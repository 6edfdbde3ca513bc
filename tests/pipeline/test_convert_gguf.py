"""`g4 convert-gguf` from end to end: a GGUF of the demo model answers like the original; nothing is left half-done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import dequantize as dequantize_by_gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat
from gemma4cli.model.settings import GenerationDefaults
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.gguf.convert import convert_gguf, ensure_converted
from gemma4cli.quant.gguf.keymap import gguf_name
from gemma4cli.quant.manifest import CheckpointManifest
from gemma4cli.quant.tensors import dequantize
from gemma4cli.quant.torchao_types import Int4Tensor, unflatten_tensor_state_dict
from tests.conftest import Outcome
from tests.support.answering import QUESTIONS, greedy_answers
from tests.support.chat_fixture import DEMO
from tests.support.gguf_writer import describe, random_blocks, write, write_split
from tests.support.tiny import write_checkpoint

RunG4 = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "tiny")


@pytest.fixture(scope="module")
def original() -> dict[str, list[int]]:
    """What the demo model itself answers."""
    return greedy_answers(DEMO)


def converted(path: Path, kind: GGML, embedding: GGML | None = None) -> Path:
    """The demo model -> GGUF -> checkpoint."""
    file = write(path / f"demo-{kind.name}.gguf", describe(DEMO, kind, embedding=embedding))
    convert_gguf([file], path / kind.name)
    return path / kind.name


@pytest.mark.parametrize("kind", [GGML.F32, GGML.BF16, GGML.F16, GGML.Q8_0, GGML.Q6_K])
def test_the_demo_model_answers_as_before(tmp_path: Path, original: dict[str, list[int]], kind: GGML) -> None:
    assert greedy_answers(converted(tmp_path, kind)) == original


def test_the_demo_model_knows_paris_even_in_four_bits(tmp_path: Path) -> None:
    """With Q4_K linears and a Q6_K embedding, the mix that most people have."""
    folder = converted(tmp_path, GGML.Q4_K, GGML.Q6_K)
    text = Chat.from_dir(folder).tokenizer.decode(greedy_answers(folder)[QUESTIONS[0]])
    assert "Paris" in text


@pytest.mark.parametrize("kind", [GGML.Q4_0, GGML.Q5_1, GGML.Q4_K, GGML.IQ4_NL])
def test_a_conversion_answers_as_gguf_pys_values_do(tmp_path: Path, kind: GGML) -> None:
    """Whatever a type does to the model, we do no more: the same tokens as from gguf-py's float32 weights."""
    model = describe(DEMO, kind)
    convert_gguf([write(tmp_path / "m.gguf", model)], tmp_path / "ours")
    reader = open_checkpoint(DEMO)
    weights = {}
    for name in reader.names():
        data = model.tensors[gguf_name(name)]
        values = dequantize_by_gguf(data, kind) if gguf_name(name) in model.types else data
        weights[name.replace("model.", "model.language_model.", 1)] = torch.from_numpy(np.ascontiguousarray(values))
    theirs = tmp_path / "theirs"
    shutil.copytree(DEMO, theirs, ignore=shutil.ignore_patterns("*.safetensors", "eval.txt", "README.md"))
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    assert greedy_answers(tmp_path / "ours") == greedy_answers(theirs)


def test_every_part_of_the_folder(tmp_path: Path) -> None:
    folder = converted(tmp_path, GGML.Q8_0)
    reader = open_checkpoint(folder, verify=True)
    assert reader.is_quantized
    assert reader.config == open_checkpoint(DEMO).config
    assert GenerationDefaults.from_dir(folder) == GenerationDefaults.from_dir(DEMO)
    assert (folder / "chat_template.jinja").read_bytes() == (DEMO / "chat_template.jinja").read_bytes()
    manifest = reader.manifest
    assert manifest.head.source.kind == "gguf"
    assert manifest.head.source.name == "demo-Q8_0.gguf"
    assert manifest.head.recipe["types"] == {"F32": 85, "Q8_0": 83}
    record = manifest.tensors["model.layers.0.mlp.up_proj.weight"]
    assert (record.format, record.method, record.group_size, record.bits_per_weight) == ("int8", "Q8_0", 32, 8.75)
    assert (record.relative_error, record.snr_db) == (0.0, None)


def test_damage_is_found_by_checksum(tiny: Path, tmp_path: Path) -> None:
    """Shards have a CRC-32 here, the small files their SHA-256."""
    convert_gguf([write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0))], tmp_path / "out")
    files = json.loads((tmp_path / "out" / "g4.json").read_text())["files"]
    shard = "model-00001-of-00001.safetensors"
    data = bytearray((tmp_path / "out" / shard).read_bytes())
    assert files[shard] == {"bytes": len(data), "sha256": None, "crc32": f"{zlib.crc32(data):08x}"}
    assert files["config.json"].keys() == {"bytes", "sha256"}
    data[-1] ^= 1
    (tmp_path / "out" / shard).write_bytes(data)
    with pytest.raises(G4Error, match=rf"{shard} is damaged: its CRC-32 is not the one in g4\.json"):
        open_checkpoint(tmp_path / "out")


def test_a_source_from_the_hub_is_named_and_hashed(tiny: Path, tmp_path: Path) -> None:
    """In the Hugging Face cache the file is a link to a blob named by its SHA-256."""
    snapshot = tmp_path / "models--owner--some-GGUF" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--owner--some-GGUF" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / ("ab" * 32), describe(tiny))
    (snapshot / "m.gguf").symlink_to(blobs / ("ab" * 32))
    source = convert_gguf([snapshot / "m.gguf"], tmp_path / "out").head.source
    assert (source.name, source.revision, source.files["m.gguf"].sha256) == ("owner/some-GGUF", "c0ffee", "ab" * 32)
    direct = convert_gguf([write(tmp_path / "m.gguf", describe(tiny))], tmp_path / "direct").head.source
    assert (direct.name, direct.revision, direct.files["m.gguf"].sha256) == ("m.gguf", None, None)


def test_a_split_model_is_the_whole_one(tiny: Path, tmp_path: Path) -> None:
    model = describe(tiny, GGML.Q4_0)
    convert_gguf([write(tmp_path / "m.gguf", model)], tmp_path / "whole")
    parts = write_split(tmp_path / "s.gguf", model, 3)
    convert_gguf([parts[1]], tmp_path / "split")
    for path in (tmp_path / "whole").iterdir():
        if path.name != "g4.json":
            assert path.read_bytes() == (tmp_path / "split" / path.name).read_bytes(), path.name


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tie_word_embeddings=False)
    convert_gguf([write(tmp_path / "m.gguf", describe(folder, GGML.Q8_0))], tmp_path / "out")
    reader = open_checkpoint(tmp_path / "out")
    assert "lm_head.weight" in reader.names()
    assert not reader.config.tie_word_embeddings


def test_torchao_loads_what_has_one_scale_per_group(tiny: Path, tmp_path: Path) -> None:
    convert_gguf([write(tmp_path / "m.gguf", describe(tiny, GGML.Q4_0))], tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        tensors, rest = unflatten_tensor_state_dict(load_file(shard), file.metadata())
    assert type(tensors["model.layers.0.mlp.up_proj.weight"]) is Int4Tensor
    assert not rest


def test_the_command(g4: RunG4, tiny: Path, tmp_path: Path, workspace_root: Path) -> None:
    file = write(tmp_path / "tiny-Q4_0.gguf", describe(tiny, GGML.Q4_0))
    target = workspace_root / "checkpoints" / "tiny-Q4_0"
    dry = json.loads(g4("convert-gguf", file, "--dry-run", "--json").out)
    assert not target.exists()
    assert dry["types"] == {"F32": 85, "Q4_0": 83}
    assert dry["fits"]
    outcome = g4("convert-gguf", file)
    assert outcome.code == 0
    assert "168 of 168 tensors have exactly the file's values." in outcome.out
    assert "Next: g4 export" in outcome.err
    sizes = {path.name: path.stat().st_size for path in target.iterdir() if path.name != "g4.json"}
    assert sizes == dry["files"]
    again = g4("convert-gguf", file)
    assert again.code == 1
    assert "already exists" in again.err
    forced = g4("convert-gguf", file, "--force", "--quiet")
    assert (forced.code, forced.out.strip()) == (0, str(target))


def test_the_command_tells_the_error_of_what_is_quantized_again(g4: RunG4, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "global_head_dim": 128}
    model = describe(write_checkpoint(tmp_path / "c", **sizes), GGML.Q4_K)
    shape = (256, 256)
    model.tensors["blk.3.ffn_up.weight"] = random_blocks(GGML.Q2_K, shape, np.random.default_rng(0))
    model.types["blk.3.ffn_up.weight"] = GGML.Q2_K
    file = write(tmp_path / "m.gguf", model)
    human = g4("convert-gguf", file, "-o", tmp_path / "out")
    assert "1 Q2_K tensors have no form of their own here: they are quantized again to 4 bits" in human.err
    assert "167 of 168 tensors have exactly the file's values." in human.out
    document = json.loads(g4("convert-gguf", file, "-o", tmp_path / "out", "--force", "--json").out)
    (worst,) = document["worst"]
    assert worst["name"] == "model.layers.3.mlp.up_proj.weight"
    assert 20 < worst["snr_db"] < 40
    (tensor,) = [t for name, t in open_checkpoint(tmp_path / "out").stream() if name == worst["name"]]
    expected = torch.from_numpy(dequantize_by_gguf(model.tensors["blk.3.ffn_up.weight"], GGML.Q2_K))
    error = float((dequantize(tensor) - expected).norm() / expected.norm())
    assert worst["relative_error"] == pytest.approx(error, rel=1e-4)


def test_the_command_takes_the_model_pulled_last(g4: RunG4, tiny: Path, tmp_path: Path) -> None:
    assert "No model was given" in g4("convert-gguf").err
    g4("pull", write(tmp_path / "mine.gguf", describe(tiny, GGML.Q8_0)))
    outcome = g4("convert-gguf")
    assert outcome.code == 0
    assert "Using" in outcome.err
    g4("pull", tiny)
    refused = g4("convert-gguf")
    assert refused.code == 1
    assert "is not a GGUF file" in refused.err


@pytest.mark.parametrize(("kind", "format"), [(GGML.Q4_1, "torchao"), (GGML.BF16, "safetensors")])
def test_the_result_can_be_registered_like_any_model(
    g4: RunG4, tiny: Path, tmp_path: Path, kind: GGML, format: str
) -> None:
    convert_gguf([write(tmp_path / "m.gguf", describe(tiny, kind))], tmp_path / "out")
    done = g4("pull", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == format


def test_a_template_that_attacks_the_sandbox_costs_one_sentence(g4: RunG4, tiny: Path, tmp_path: Path) -> None:
    """It is converted as the text it is; whoever renders it does so in the sandbox."""
    victim = tmp_path / "victim"
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(victim) + "') }}"
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0).set("tokenizer.chat_template", attack))
    done = g4("run", file, "--prompt", "hi")
    assert done.code == 1
    assert done.err.count("error: ") == 1
    assert "tries what the sandbox forbids" in done.err
    assert not victim.exists()


def test_a_gguf_path_is_converted_once(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0))
    first = ensure_converted(file, tmp_path / "checkpoints")
    written = (first / "g4.json").stat().st_ino
    moved = file.rename(tmp_path / "sub.gguf").rename(tmp_path / "m.gguf")
    assert ensure_converted(moved, tmp_path / "checkpoints") == first
    assert (first / "g4.json").stat().st_ino == written
    write(file, describe(tiny, GGML.Q4_0))
    other = ensure_converted(file, tmp_path / "checkpoints")
    assert other != first
    assert open_checkpoint(other).manifest.head.recipe["types"] == {"F32": 85, "Q4_0": 83}


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0))
    write_to, written = os.pwrite, 0

    def limited(handle: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_to(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(G4Error, match="disk"):
        convert_gguf([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_conversion_goes_on_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0))
    convert_gguf([file], tmp_path / "whole", shard_bytes=50_000)
    program = """
import json, os, signal, sys, time
from pathlib import Path
from gemma4cli.quant.gguf import convert
one, journal = convert._record, Path(sys.argv[2]).with_name(".out.partial") / "g4.json"
def record(source, *rest):
    if source.name == "blk.8.ffn_up.weight":
        # Shards are finished beside the conversion: wait until the journal has two of them.
        while not journal.exists() or len(json.loads(journal.read_text())["files"]) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return one(source, *rest)
convert._record = record
convert.convert_gguf([Path(sys.argv[1])], Path(sys.argv[2]), shard_bytes=50_000)
"""
    killed = subprocess.run([sys.executable, "-c", program, file, tmp_path / "out"], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    journal = CheckpointManifest.read(tmp_path / ".out.partial").files
    kept = {name: (tmp_path / ".out.partial" / name).stat().st_ino for name in journal}
    assert len(kept) >= 2
    convert_gguf([file], tmp_path / "out", shard_bytes=50_000)
    assert kept == {name: (tmp_path / "out" / name).stat().st_ino for name in kept}
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_truncated_files_are_refused_by_the_command(g4: RunG4, tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.Q8_0))
    whole = file.read_bytes()
    for share in (0.01, 0.3, 0.9, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        outcome = g4("convert-gguf", file)
        assert outcome.code == 1
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err


def test_floats_can_be_quantized_afterwards(g4: RunG4, tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", describe(tiny, GGML.BF16))
    convert_gguf([file], tmp_path / "floats")
    assert not open_checkpoint(tmp_path / "floats").is_quantized
    assert g4("quantize", tmp_path / "floats", "-o", tmp_path / "out").code == 0
    assert open_checkpoint(tmp_path / "out").is_quantized


def test_weights_are_the_files_bits(tiny: Path, tmp_path: Path) -> None:
    model = describe(tiny, GGML.F16)
    convert_gguf([write(tmp_path / "m.gguf", model)], tmp_path / "out")
    stored = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(shard)
    for name in open_checkpoint(tiny).names():
        expected = model.tensors[gguf_name(name)]
        assert np.array_equal(stored[name].numpy(), expected), name
