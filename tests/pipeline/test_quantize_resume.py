"""A run that is killed, starved of disk, or started twice never leaves half a checkpoint that looks whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from gemma4cli.errors import G4Error
from gemma4cli.files import atomic_directory
from gemma4cli.progress import SILENT, Task
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import QuantSpec, Recipe, Rule, load_recipe
from tests.support.tiny import write_checkpoint

SHARD_BYTES = 10_000
RECIPE = load_recipe("default")
RUN = """
import sys
from pathlib import Path
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
source, target, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
quantize_checkpoint(source, target, load_recipe("default"), shard_bytes=shard_bytes)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    target = source.parent / "whole"
    quantize_checkpoint(source, target, RECIPE, shard_bytes=SHARD_BYTES)
    return contents(target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """A shard that is written again is another inode with another time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards(folder)}


class Said(list):
    """A progress that keeps notes."""

    def phase(self, label: str, total: int | None, unit: str = "B") -> AbstractContextManager[Task]:
        return SILENT.phase(label, total, unit)

    def note(self, message: str) -> None:
        self.append(message)


def kill_after(source: Path, target: Path, finished_shards: int) -> None:
    """Kill -9 a run as soon as it has listed this many shards."""
    command = [sys.executable, "-c", RUN, str(source), str(target), str(SHARD_BYTES)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    manifest = target.with_name(f".{target.name}.partial") / "g4.json"
    deadline = time.monotonic() + 120
    while not manifest.exists() or len(json.loads(manifest.read_text())["files"]) < finished_shards:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("finished_shards", [1, 4, 15])
def test_a_killed_run_is_continued_to_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, finished_shards: int
) -> None:
    target, partial = tmp_path / "out", tmp_path / ".out.partial"
    kill_after(source, target, finished_shards)
    assert not target.exists()
    listed = json.loads((partial / "g4.json").read_text())["files"]
    before = {name: identity for name, identity in identities(partial).items() if name in listed}
    assert len(before) >= finished_shards
    (partial / "model-99999-of-99999.safetensors.partial").write_bytes(b"a torn write")
    said = Said()
    quantize_checkpoint(source, target, RECIPE, shard_bytes=SHARD_BYTES, progress=said)
    assert f"Continuing: {len(before)} of {len(shards(target))} shards are finished." in said
    assert before.items() <= identities(target).items()
    assert contents(target) == whole
    assert not partial.exists()


def test_a_kill_before_the_first_shard_starts_over(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00030.safetensors.partial").write_bytes(b"torn")
    quantize_checkpoint(source, tmp_path / "out", RECIPE, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == whole


def interrupted(source: Path, folder: Path) -> Path:
    """Leave a partial folder with every shard but the last two, as a kill there would."""
    partial = folder / ".out.partial"
    quantize_checkpoint(source, folder / "out", RECIPE, shard_bytes=SHARD_BYTES)
    (folder / "out").rename(partial)
    document = json.loads((partial / "g4.json").read_text())
    last = [path.name for path in shards(partial)][-2:]
    document["files"] = {name: record for name, record in document["files"].items() if name not in last}
    (partial / "g4.json").write_text(json.dumps(document))
    return partial


def test_a_damaged_finished_shard_is_made_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path)
    flipped, cut = shards(partial)[2:4]
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x55")
    cut.write_bytes(cut.read_bytes()[:-1])
    before, said = identities(partial), Said()
    quantize_checkpoint(source, tmp_path / "out", RECIPE, shard_bytes=SHARD_BYTES, progress=said)
    assert any(note.startswith(f"Continuing: {len(before) - 4} of {len(before)} shards") for note in said)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("change", ["recipe", "source", "manifest"])
def test_a_partial_folder_of_something_else_is_not_continued(source: Path, tmp_path: Path, change: str) -> None:
    partial = interrupted(source, tmp_path)
    recipe, said = RECIPE, Said()
    if change == "recipe":
        recipe = Recipe(
            "other", "x", False, (Rule(".*norm.*|.*scalar"), Rule(".*", spec=QuantSpec(8, 0, True, "min-max")))
        )
    elif change == "source":
        source = write_checkpoint(tmp_path / "tiny", seed=7, dtype=torch.bfloat16)
    else:
        (partial / "g4.json").write_text("{ torn")
    old = set(identities(partial).values())
    quantize_checkpoint(source, tmp_path / "out", recipe, shard_bytes=SHARD_BYTES, progress=said)
    assert not old & set(identities(tmp_path / "out").values())
    assert not [note for note in said if note.startswith("Continuing")]
    assert ("starting over" in " ".join(said)) == (change != "manifest")
    open_checkpoint(tmp_path / "out", verify=True)


def test_another_shard_size_is_not_mistaken_for_the_same(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path)
    quantize_checkpoint(source, tmp_path / "out", RECIPE, shard_bytes=3 * SHARD_BYTES)
    quantize_checkpoint(source, tmp_path / "fresh", RECIPE, shard_bytes=3 * SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_disk_that_fills_up_costs_one_sentence_and_nothing_else(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The kernel refuses to let a file grow past RLIMIT_FSIZE, in the middle of a shard, as a full disk would."""
    largest = max(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    limit = largest - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(G4Error, match=r"^Writing model-\d+-of-\d+\.safetensors to .* failed: .*\.$") as caught:
            quantize_checkpoint(source, tmp_path / "out", RECIPE, shard_bytes=SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "run the same command again" in caught.value.hint
    assert not (tmp_path / "out").exists()
    said = Said()
    quantize_checkpoint(source, tmp_path / "out", RECIPE, shard_bytes=SHARD_BYTES, progress=said)
    assert any(note.startswith("Continuing") for note in said)
    assert contents(tmp_path / "out") == whole


def test_a_second_run_at_the_same_time_is_refused(source: Path, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", resume=True) as partial:
        (partial / "first.txt").write_text("the first run's work")
        with pytest.raises(G4Error, match=r"Another g4 is writing .*out right now\."):
            quantize_checkpoint(source, tmp_path / "out", RECIPE)
        assert (partial / "first.txt").exists()
    assert (tmp_path / "out" / "first.txt").exists()


def test_force_replaces_only_when_the_new_one_is_whole(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(G4Error, match="Recipe none has no rule for"):
        quantize_checkpoint(source, target, Recipe("none", "x", False, (Rule("nothing"),)), force=True)
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    quantize_checkpoint(source, target, RECIPE, force=True)
    assert not (target / "old.txt").exists()
    assert os.listdir(tmp_path) == ["out"]
