"""What can be written after `g4 pull`, the table of short names, and models that are already on this machine."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.hub.catalog import CATALOG, DEFAULT_NAME, find, lender_of, suggest
from gemma4cli.hub.machine import Machine
from gemma4cli.hub.resolve import DemoModel, HubModel, LocalModel, resolve
from tests.support.pulling import small_gguf
from tests.support.tiny import write_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "gemma4cli" / "data" / "demo"


class TestResolve:
    @pytest.mark.parametrize(
        ("text", "model"),
        [
            ("demo", DemoModel()),
            ("31b", HubModel("google/gemma-4-31B-it")),
            ("31B", HubModel("google/gemma-4-31B-it")),
            ("31b@v2", HubModel("google/gemma-4-31B-it", "v2")),
            ("31b-gguf", HubModel("unsloth/gemma-4-31B-it-GGUF", "main", "Q4_K_M")),
            ("31b-gguf:Q8_0@v2", HubModel("unsloth/gemma-4-31B-it-GGUF", "v2", "Q8_0")),
            ("31b-qat", HubModel("google/gemma-4-31B-it-qat-q4_0-gguf")),
            ("31b-int4", HubModel("SocialLocalMobile/gemma-4-31B-it-HQQ-INT4")),
            ("owner/repo", HubModel("owner/repo")),
            ("owner/repo@refs/pr/1", HubModel("owner/repo", "refs/pr/1")),
            ("owner/repo:BF16/m-00001-of-00002.gguf", HubModel("owner/repo", "main", "BF16/m-00001-of-00002.gguf")),
        ],
    )
    def test_names(self, text: str, model: object) -> None:
        assert resolve(text) == model

    def test_the_default_is_the_31b(self) -> None:
        assert resolve(DEFAULT_NAME) == HubModel("google/gemma-4-31B-it")

    def test_a_path_is_taken_as_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models" / "mine").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        for text in ("./models/mine", "models/mine", str(tmp_path / "models" / "mine")):
            assert resolve(text) == LocalModel(tmp_path / "models" / "mine")

    def test_a_short_name_wins_over_a_folder_of_that_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "demo").mkdir()
        monkeypatch.chdir(tmp_path)
        assert resolve("demo") == DemoModel()
        assert resolve("./demo") == LocalModel(tmp_path / "demo")

    @pytest.mark.parametrize(
        ("text", "revision", "sentence"),
        [
            ("31c", None, "There is no model called '31c'; did you mean 31b?"),
            ("qqqqqq", None, "There is no model called 'qqqqqq'."),
            ("./nothing", None, "./nothing does not exist."),
            ("owner/repo@", None, "'owner/repo@' is not a model name."),
            ("owner/repo:", None, "'owner/repo:' is not a model name."),
            ("", None, "'' is not a model name."),
            ("owner/repo/more", None, "'owner/repo/more' is not a repository name."),
            ("owner/..", None, "'owner/..' is not a repository name."),
            ("owner/repo@../x", None, "'../x' is not a revision."),
            ("owner/repo@v1", "v2", "owner/repo@v1 asks for revision v1, --revision for v2."),
            ("31b:Q4_0", None, "31b has no quantizations to choose from."),
            ("demo:Q4_0", None, "demo comes with g4: it has no revisions or quantizations."),
            ("demo", "v1", "demo comes with g4: it has no revisions or quantizations."),
            (".", "v1", "--revision has no meaning for a path."),
        ],
    )
    def test_what_is_no_name(self, text: str, revision: str | None, sentence: str) -> None:
        with pytest.raises(G4Error) as caught:
            resolve(text, revision)
        assert caught.value.message == sentence

    def test_the_name_of_a_model_resolves_to_it_again(self) -> None:
        for model in (
            HubModel("o/r"),
            HubModel("o/r", "v1"),
            HubModel("o/r", "v1", "Q4_0"),
            HubModel("o/r", "main", "x"),
        ):
            assert resolve(str(model)) == model


class TestCatalog:
    def test_every_name_is_found_and_distinct(self) -> None:
        names = [entry.name for entry in CATALOG]
        assert len(set(names)) == len(names)
        assert all(find(name.upper()) is entry for name, entry in zip(names, CATALOG, strict=True))
        assert find(DEFAULT_NAME) is not None

    def test_sizes_are_plausible(self) -> None:
        """30.7e9 parameters at 2 to 16 bits each, and run in no more than they were fetched in."""
        for entry in CATALOG:
            for variant in entry.variants:
                if entry.repo is not None:
                    assert variant.download_bytes is not None
                    assert 2 <= variant.download_bytes * 8 / 30.7e9 <= 16.5
                    assert variant.run_bytes <= variant.download_bytes

    def test_only_a_near_miss_is_suggested(self) -> None:
        assert suggest("31b-ggfu") == "31b-gguf"
        assert suggest("dmeo") == "demo"
        assert suggest("mistral") is None

    def test_a_lender_is_known_by_repository(self) -> None:
        assert lender_of("SocialLocalMobile/gemma-4-31B-it-HQQ-INT4") == "google/gemma-4-31B-it"
        assert lender_of("google/gemma-4-31B-it") is None


class TestFit:
    machine = Machine(disk_free_bytes=100 << 30, memory_bytes=32 << 30, gpu_name="GPU", gpu_bytes=24 << 30)

    def test_disk(self) -> None:
        assert self.machine.disk_verdict(100 << 30) == "fits"
        assert self.machine.disk_verdict(101 << 30) == "1.00 GiB too small"

    @pytest.mark.parametrize(
        ("gib", "where"), [(10, "GPU and CPU"), (22, "GPU and CPU"), (23, "CPU"), (30, "CPU"), (31, "needs 33.0 GiB")]
    )
    def test_memory_leaves_room_for_more_than_the_weights(self, gib: int, where: str) -> None:
        assert self.machine.runs(gib << 30) == where

    def test_this_machine(self, tmp_path: Path) -> None:
        here = Machine.probe(tmp_path / "not" / "there" / "yet")
        assert here.disk_free_bytes > 0
        assert here.memory_bytes > 1 << 28

    def test_the_largest_gpu_is_the_one_that_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'Small, the one, 8192'\necho 'Large, the other, 24576'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert Machine.probe(tmp_path).gpu_bytes == 24 << 30
        assert Machine.probe(tmp_path).gpu_name == "Large, the other"

    @pytest.mark.parametrize("answer", ["exit 9", "echo 'No devices were found'", "echo 'GPU, [N/A]'"])
    def test_a_gpu_that_says_nothing_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
    ) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert Machine.probe(tmp_path).gpu_bytes is None


class TestCommand:
    def test_list_has_every_name_with_size_and_verdict(self, g4: Callable[..., object]) -> None:
        document = json.loads(g4("pull", "--list", "--json").out)
        assert document["default"] == "31b"
        names = [model["name"] for model in document["models"]]
        assert {"demo", "31b", "31b-gguf:Q4_K_M", "31b-qat", "31b-int4"} <= set(names)
        for model in document["models"]:
            assert model["download_bytes"] > 0
            assert model["disk"] == "fits" or model["disk"].endswith("too small")
            assert model["runs"].split()[0] in ("CPU", "GPU", "needs")
        table = g4("pull", "--list").out
        assert all(name in table for name in names)
        assert g4("pull", "--list", "--quiet").out.split() == names

    def test_the_demo_is_copied_once(self, g4: Callable[..., object], workspace_root: Path) -> None:
        first = g4("pull", "demo", "--quiet")
        assert first.code == 0, first.err
        target = workspace_root / "models" / "demo"
        assert first.out.strip() == str(target)
        assert filecmp.cmpfiles(DEMO, target, [path.name for path in DEMO.iterdir()], shallow=False)[1:] == ([], [])
        born = target.stat().st_ino
        assert g4("pull", "demo").code == 0
        assert target.stat().st_ino == born
        (target / "config.json").write_text("{}")
        assert g4("pull", "demo").code == 0
        assert filecmp.cmp(DEMO / "config.json", target / "config.json", shallow=False)

    def test_a_dry_run_of_the_demo_copies_nothing(self, g4: Callable[..., object], workspace_root: Path) -> None:
        outcome = g4("pull", "demo", "--dry-run", "--json")
        assert json.loads(outcome.out)["format"] == "safetensors"
        assert not workspace_root.exists()

    def test_a_checkpoint_here_is_registered_and_not_copied(
        self, g4: Callable[..., object], workspace_root: Path, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "mine", shards=2)
        outcome = g4("pull", folder, "--json")
        assert json.loads(outcome.out)["path"] == str(folder)
        assert json.loads((workspace_root / "state.json").read_text())["model"]["path"] == str(folder)
        assert not (workspace_root / "models").exists()
        assert "Next: g4 quantize" in g4("pull", folder).err

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("model.safetensors", "is one file of a checkpoint."),
            ("notes.txt", "is not a GGUF file."),
            ("m.gguf", "is a model of architecture 'llama'; g4 runs gemma4."),
            ("empty", "config.json does not exist."),
            ("half", "model.safetensors does not exist."),
        ],
    )
    def test_what_is_no_model_is_not_registered(
        self, g4: Callable[..., object], workspace_root: Path, tmp_path: Path, name: str, sentence: str
    ) -> None:
        (tmp_path / "model.safetensors").write_bytes(bytes(100))
        (tmp_path / "notes.txt").write_text("notes " * 20)
        small_gguf(tmp_path / "m.gguf", architecture="llama")
        (tmp_path / "empty").mkdir()
        (write_checkpoint(tmp_path / "half") / "model.safetensors").unlink()
        outcome = g4("pull", tmp_path / name)
        assert outcome.code == 1
        assert sentence in outcome.err
        assert not workspace_root.exists()

    def test_a_wrong_name_asks_no_hub(self, g4: Callable[..., object]) -> None:
        outcome = g4("pull", "31bb")
        assert outcome.code == 1
        assert "did you mean 31b?" in outcome.err
        assert "g4 pull --list" in outcome.err

    def test_pulling_needs_no_torch(self) -> None:
        modules = ["gemma4cli.commands.pull", "gemma4cli.hub.pull", "gemma4cli.quant.gguf.metadata"]
        code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
