"""Quantizing a checkpoint: exact plans, honest reports, reproducible bytes, and refusals before any work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma4cli.cli import main
from gemma4cli.errors import G4Error
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model
from gemma4cli.progress import Task
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.manifest import CheckpointManifest
from gemma4cli.quant.quantize import (
    Fit,
    available_memory,
    find_device,
    plan_quantization,
    quantize_checkpoint,
    quantize_tensor,
    stored_layout,
)
from gemma4cli.quant.recipe import BUILT_IN, QuantSpec, Recipe, Rule, load_recipe
from gemma4cli.quant.shards import stored_bytes
from gemma4cli.quant.tensors import dequantize
from tests.support.tiny import random_weights, tiny_config, write_checkpoint, write_shards

SHARD_BYTES = 100_000
KEEP_ALL = Recipe("keep", "everything as it is", False, (Rule(".*"),))
MIXED = Recipe(
    "mixed",
    "every kind of tensor; HQQ, the slow one, in two layers only",
    False,
    (
        Rule(r".*\.(q|k)_proj\.weight", ("4-5",), spec=QuantSpec(4, 32, False, "hqq")),
        Rule(r".*\.o_proj\.weight", ("4-5",), spec=QuantSpec(8, 16, False, "hqq")),
        *load_recipe("default").rules,
    ),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2, dtype=torch.bfloat16)


class Notes:
    """Collects what a run says and how much work it reports."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    def phase(self, label: str, total: int | None, unit: str = "B") -> _Phase:
        self.totals[label] = total
        self.done[label] = 0
        return _Phase(self, label)

    def note(self, message: str) -> None:
        self.said.append(message)


class _Phase:
    def __init__(self, notes: Notes, label: str) -> None:
        self.notes, self.label = notes, label

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, amount: int, label: str | None = None) -> None:
        self.notes.done[self.label] += amount


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("recipe", [MIXED, KEEP_ALL], ids=lambda r: r.name)
def test_the_plan_is_what_is_then_written(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    plan = plan_quantization(source, recipe, shard_bytes=SHARD_BYTES)
    notes = Notes()
    manifest = quantize_checkpoint(source, tmp_path / "out", recipe, shard_bytes=SHARD_BYTES, progress=notes)
    written = sizes(tmp_path / "out")
    del written["g4.json"]
    assert plan.checkpoint.files == written
    assert manifest.head.totals == plan.totals
    assert notes.done["quantize"] == notes.totals["quantize"] == plan.totals.weight_bytes
    assert not list(tmp_path.glob(".*"))


def test_bits_per_weight_by_hand(source: Path) -> None:
    """int4 g32: 4 + 2 * 16 / 32 bits. int8 per row of K: 8 + (16 + 8) / K. Divided by the model's parameter count."""
    plan = plan_quantization(source, load_recipe("default"))
    config = tiny_config()
    shapes = config.parameter_shapes()
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight")}
    embedding = math.prod(shapes["model.embed_tokens.weight"])
    kept = sum(map(math.prod, shapes.values())) - sum(matrices.values()) - embedding
    bits = 5 * (sum(matrices.values()) + embedding) + (8 + 24 / 64) * embedding + 16 * kept
    assert plan.totals.weight_bytes * 8 == bits
    assert plan.totals.bits_per_weight == round(bits / sum(map(math.prod, shapes.values())), 4)
    assert plan.bits_of_rule(1) == (1, 8.375)
    assert plan.bits_of_rule(2) == (len(matrices) + 1, 5.0)


def test_the_documented_sizes_of_the_31b() -> None:
    config = tiny_config(
        vocab_size=262144, hidden_size=5376, intermediate_size=21504, num_hidden_layers=60, num_attention_heads=32,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 10, num_key_value_heads=16, head_dim=256,
        num_global_key_value_heads=4, global_head_dim=512,
    )  # fmt: skip
    parameters = sum(map(math.prod, config.parameter_shapes().values()))
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    assert f"{parameters:,}".replace(",", " ") in page
    for name in BUILT_IN:
        assignments = load_recipe(name).assign(config, separate_head=False)
        layout = ((a.name, stored_layout(a, torch.bfloat16)) for a in assignments)
        size = sum(stored_bytes(tensor_name, tensor) for tensor_name, tensor in layout)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{size / 1e9:.1f} GB, {size * 8 / parameters:.2f}" in row


def test_two_runs_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name, MIXED, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_assets_are_copied_and_the_manifest_tells_the_origin(source: Path, tmp_path: Path) -> None:
    manifest = quantize_checkpoint(source, tmp_path / "out", load_recipe("default"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja"):  # fmt: skip
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = (tmp_path / "out" / "g4.json").read_text()
    assert str(tmp_path) not in text
    assert str(source.parent) not in text
    assert CheckpointManifest.read(tmp_path / "out") == manifest
    head = manifest.head
    assert (head.source.kind, head.source.name, head.source.revision) == ("safetensors", "tiny", None)
    assert {name for name in head.source.files if "model" in name} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert head.recipe == load_recipe("default").to_json()
    assert head.created_with["device"] == "cpu"
    record = manifest.tensors["model.layers.0.mlp.up_proj.weight"]
    assert (record.format, record.group_size, record.method) == ("int4", 32, "min-max")
    assert record.snr_db == pytest.approx(-20 * math.log10(record.relative_error), abs=1e-3)
    kept = manifest.tensors["model.norm.weight"]
    assert (kept.format, kept.method, kept.relative_error, kept.snr_db) == ("bfloat16", "keep", 0.0, None)


def test_a_hub_cache_names_its_repository_and_hashes(source: Path, tmp_path: Path) -> None:
    """Large files there are links to blobs named by their SHA-256, which is taken at its word."""
    commit, blob = "c" * 40, "ab" * 32
    repository = tmp_path / "models--google--gemma-4-tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    shard = "model-00001-of-00002.safetensors"
    (repository / "blobs" / blob).write_bytes((source / shard).read_bytes())
    (snapshot / shard).unlink()
    (snapshot / shard).symlink_to(f"../../blobs/{blob}")
    head = quantize_checkpoint(snapshot, tmp_path / "out", KEEP_ALL).head
    assert (head.source.name, head.source.revision) == ("google/gemma-4-tiny", commit)
    assert head.source.files[shard].sha256 == blob
    assert len(head.source.files["config.json"].sha256) == 64


def test_the_quantized_model_computes_nearly_the_same(source: Path, tmp_path: Path) -> None:
    """At 8 bits: a random model's sharp attention turns the errors of 4 bits into another answer."""
    rules = (Rule(".*(embed|_proj).*", spec=QuantSpec(8, 0, True, "min-max")), Rule(".*"))
    quantize_checkpoint(source, tmp_path / "out", Recipe("int8", "x", True, rules))
    tokens, positions = torch.arange(5, 21)[None], torch.arange(16)
    logits = []
    for folder in (source, tmp_path / "out"):
        reader, cache = open_checkpoint(folder), CacheSpec(64, 16, torch.float32)
        model = build_model(reader, cache, torch.float32, "cpu", prepare=lambda name, tensor: dequantize(tensor))
        logits.append(model(tokens, positions, last_only=False).flatten())
    assert 0.98 < torch.nn.functional.cosine_similarity(*logits, dim=0) < 0.99999


def test_separate_heads_stay_separate(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    manifest = quantize_checkpoint(source, tmp_path / "out", load_recipe("default"))
    weights = random_weights(tiny_config(tie_word_embeddings=False))
    head = dequantize(open_checkpoint(tmp_path / "out").tensor("lm_head.weight"))
    error = (head - weights["lm_head.weight"]).norm() / weights["lm_head.weight"].norm()
    assert error.item() == pytest.approx(manifest.tensors["lm_head.weight"].relative_error, rel=1e-4)


def test_a_rule_that_matches_nothing_is_said(source: Path, tmp_path: Path) -> None:
    recipe = Recipe("mine", "x", False, (Rule("model.layer.0.*"), Rule(".*")))
    notes = Notes()
    quantize_checkpoint(source, tmp_path / "out", recipe, progress=notes)
    assert "Rule 1 of recipe mine matches no tensor of this model." in notes.said


def test_a_matrix_of_zeros_has_no_error() -> None:
    tensor, error = quantize_tensor(torch.zeros(4, 64), QuantSpec(4, 32, False, "hqq"), torch.device("cpu"))
    assert error == 0.0
    assert torch.equal(dequantize(tensor), torch.zeros(4, 64))


def test_a_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once", load_recipe("default"))
    with pytest.raises(G4Error, match=r"once is quantized already\.") as caught:
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", load_recipe("default"))
    assert "original" in caught.value.hint


def test_an_existing_target_needs_force(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(G4Error, match="out already exists"):
        quantize_checkpoint(source, tmp_path / "out", KEEP_ALL)
    assert (tmp_path / "out" / "mine.txt").exists()
    quantize_checkpoint(source, tmp_path / "out", KEEP_ALL, force=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert (tmp_path / "out" / "g4.json").exists()


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "models" / "tiny")
    before = contents(source)
    for target in (source, source.parent):
        with pytest.raises(G4Error, match="would replace the model that is being quantized"):
            quantize_checkpoint(source, target, KEEP_ALL, force=True)
    assert contents(source) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_model_without_its_files_is_refused(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "tiny")
    (source / name).unlink()
    with pytest.raises(G4Error, match=f"tiny has no {name}"):
        quantize_checkpoint(source, tmp_path / "out", KEEP_ALL)
    (source / name).write_text("{")
    with pytest.raises(G4Error, match=f"{name} is not valid JSON"):
        quantize_checkpoint(source, tmp_path / "out", KEEP_ALL)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_refused_and_nothing_is_taken_for_whole(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny")
    weights = random_weights(tiny_config())
    weights["model.layers.7.mlp.up_proj.weight"][3, 5] = torch.nan
    (source / "model.safetensors").unlink()
    write_shards(source, weights)
    with pytest.raises(G4Error, match=r"model\.layers\.7\.mlp\.up_proj\.weight holds a value that is not a finite"):
        quantize_checkpoint(source, tmp_path / "out", load_recipe("default"))
    assert not (tmp_path / "out").exists()


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(G4Error, match=r"This machine has no device cuda:99 that PyTorch can use\."):
        find_device("cuda:99")
    for wrong in ("gpu", "cpu:1", "cuda:x", ""):
        with pytest.raises(G4Error, match="is not a device; use cpu, cuda or cuda:1") as caught:
            find_device(wrong)
        assert caught.value.exit_code == 2


def test_fit_compares_with_this_machine(source: Path, tmp_path: Path) -> None:
    fit = Fit.of(plan_quantization(source, load_recipe("default")), tmp_path / "not" / "yet" / "out")
    assert fit.fits
    assert fit.total_bytes == sum(fit.files.values())
    assert 0 < fit.available_memory_bytes == pytest.approx(available_memory(), rel=0.5)
    assert not Fit(fit.files, fit.total_bytes, fit.total_bytes - 1, 1, 1).fits
    assert not Fit(fit.files, fit.total_bytes, fit.total_bytes, 2, 1).fits


def test_a_disk_that_is_too_small_is_refused_before_hashing(tmp_path: Path) -> None:
    """A sparse file claims a vocabulary of 2^36: 8 TiB to read, more than any memory to map, and 6 TiB to write."""
    vocabulary = 1 << 36
    source = write_checkpoint(tmp_path / "huge")
    document = json.loads((source / "config.json").read_text())
    document["text_config"]["vocab_size"] = vocabulary
    (source / "config.json").write_text(json.dumps(document))
    grow_embedding(source / "model.safetensors", vocabulary)
    notes = Notes()
    with pytest.raises(G4Error, match=r"The checkpoint out needs .* TiB on the disk of .*, which has .* free\."):
        quantize_checkpoint(source, tmp_path / "out", load_recipe("default"), progress=notes)
    assert not notes.totals
    assert not list(tmp_path.glob("*out*"))


def grow_embedding(path: Path, vocabulary: int) -> None:
    """Give the embedding more rows: a header that says so and a file with a hole."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.language_model.embed_tokens.weight"
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    # The old rows become a vision tensor, which is skipped.
    header["model.vision_tower.padding"] = header.pop(name)
    header[name] = {"dtype": "BF16", "shape": [vocabulary, 64], "data_offsets": [end, end + vocabulary * 64 * 2]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    os.truncate(path, 8 + len(text) + end + vocabulary * 64 * 2)


def test_peak_memory_stays_below_the_plan_s_estimate(tmp_path: Path) -> None:
    """An embedding of 32768 x 1024 in bfloat16; docs/quantization.md has the measurement at the 31B's size."""
    source = write_checkpoint(
        tmp_path / "wide", vocab_size=32768, hidden_size=1024, num_hidden_layers=1, layer_types=["full_attention"],
        dtype=torch.bfloat16, vision=False,
    )  # fmt: skip
    plan = plan_quantization(source, load_recipe("default"))
    code = (
        "import sys; from pathlib import Path; from gemma4cli.quant.quantize import quantize_checkpoint as q;"
        "from gemma4cli.quant.recipe import load_recipe as l; q(Path(sys.argv[1]), Path(sys.argv[2]), l('default'));"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], check=True, capture_output=True)
    peak = int(run.stdout) << 10
    assert 200 << 20 < peak < plan.peak_bytes


def g4(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("G4_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_command_quantizes_the_last_model_and_reports(
    source: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert g4("pull", source) == 0
    capsys.readouterr()
    assert g4("quantize", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] is True
    assert planned["exists"] is False
    assert not (home / "checkpoints").exists()
    assert g4("quantize", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    folder = home / "checkpoints" / "tiny-default"
    assert report["checkpoint"] == planned["output"] == str(folder)
    assert planned["files"].items() <= sizes(folder).items()
    assert report["bits_per_weight"] == planned["bits_per_weight"]
    errors = [tensor["relative_error"] for tensor in report["worst"]]
    recorded = [t.relative_error for t in CheckpointManifest.read(folder).tensors.values()]
    assert errors == sorted(recorded, reverse=True)[:5]
    assert "the last model pulled" in captured.err
    assert g4("quantize") == 1
    assert "already exists" in capsys.readouterr().err
    assert g4("quantize", "--dry-run", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == "fits\n"
    assert "already exists; writing it will need --force" in captured.err
    assert g4("quantize", "--force", "--quiet") == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_the_human_report(source: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert g4("quantize", source, "-o", tmp_path / "mine") == 0
    captured = capsys.readouterr()
    assert "bits per weight" in captured.out
    assert captured.out.count("int4") == 5
    assert "Next: g4 export" in captured.err
    assert g4("quantize", source, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model-00001-of-00001.safetensors" in out
    assert out.endswith("fits\n")


def test_showing_recipes(source: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert g4("quantize", "--recipe", "show") == 0
    captured = capsys.readouterr()
    assert "default" in captured.out
    assert "sensitive" in captured.out
    assert "bits per weight are not known" in captured.err
    assert g4("quantize", source, "--recipe", "show", "--json") == 0
    shown = {document["name"]: document["bits_per_weight"] for document in json.loads(capsys.readouterr().out)}
    assert shown["default"] == plan_quantization(source, load_recipe("default")).totals.bits_per_weight
    assert g4("quantize", source, "--recipe", "show:sensitive") == 0
    text = capsys.readouterr().out
    assert text.startswith("# 5.69 bits per weight for tiny\n")
    (tmp_path / "mine.toml").write_text(text)
    assert load_recipe(str(tmp_path / "mine.toml")) == load_recipe("sensitive")
    assert g4("quantize", "--recipe", "show:sensitive") == 0
    assert "# " not in capsys.readouterr().out.replace("# Layers", "")
    assert g4("quantize", source, "--recipe", f"show:{tmp_path / 'mine.toml'}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["tensors"] == 1
    assert g4("quantize", source, "--recipe", "show:nothing") == 1
    assert "'nothing' is not a built-in recipe" in capsys.readouterr().err


def test_a_rule_without_tensors_is_marked(
    source: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(Recipe("r", "x", False, (Rule("nothing"), Rule(".*"))).to_toml([None, None]))
    assert g4("quantize", source, "--recipe", f"show:{tmp_path / 'r.toml'}") == 0
    assert "# matches nothing in this model" in capsys.readouterr().out
