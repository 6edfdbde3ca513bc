"""`g4 pull` against a hub over real sockets: what is fetched, where it lies, and what an interruption costs."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from gemma4cli.errors import G4Error
from gemma4cli.hub.cache import RepoCache
from gemma4cli.hub.client import Hub, RetryPolicy
from gemma4cli.hub.download import fetch
from gemma4cli.progress import SILENT, Progress, Task
from gemma4cli.quant.checkpoint import open_checkpoint
from tests.support.gguf_writer import describe, write, write_split
from tests.support.hub_server import Fault, HubServer, etag_of
from tests.support.pulling import REPO, Machine, folder_files, small_gguf
from tests.support.tiny import write_checkpoint
from tests.support.torchao_saver import quantized_tensors, save

NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}
BIG = "model.safetensors"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    with HubServer() as hub:
        yield Machine(hub, tmp_path, monkeypatch, capfd)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model of 1.9 MB, with the files a repository has besides."""
    files = folder_files(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    return {**files, "README.md": b"# Model", "pytorch_model.bin": b"pickle", ".gitattributes": b"* text"}


class Recorder:
    """A Progress that remembers every phase's total and what it counted to."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B") -> Iterator[Task]:
        recorder = self

        class Count:
            def advance(self, amount: int, label_now: str | None = None) -> None:
                recorder.done[label] += amount

        self.totals[label], self.done[label] = total, 0
        yield Count()

    def note(self, message: str) -> None:
        pass


def fetched(machine: Machine) -> set[str]:
    """The files in the cache's one snapshot."""
    (snapshot,) = (machine.repo_cache / "snapshots").iterdir()
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def wait_until_served(machine: Machine, name: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while machine.hub.served.get(name, 0) < count:
        assert time.monotonic() < deadline, "the download did not start"
        time.sleep(0.01)


class TestWhatIsFetched:
    def test_only_what_a_text_model_needs_and_the_workspace_remembers_it(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        repo = machine.hub.add(REPO, checkpoint)
        done = machine.run(REPO, "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert fetched(machine) == NEEDED
        for name in NEEDED:
            assert (Path(document["path"]) / name).read_bytes() == checkpoint[name]
        model = machine.state()["model"]
        assert model["path"] == document["path"]
        assert model["origin"] == {"repo": REPO, "revision": "main", "commit": repo.commit}
        assert document["precision"] == "float32"

    def test_huggingface_hub_finds_it_where_it_would_have_put_it(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        from huggingface_hub import hf_hub_download, scan_cache_dir

        repo = machine.hub.add(REPO, checkpoint)
        assert machine.pull(REPO).returncode == 0
        path = hf_hub_download(REPO, BIG, cache_dir=machine.cache, local_files_only=True)
        assert Path(path).parent.name == repo.commit
        assert Path(path).is_symlink()
        assert Path(path).resolve().name == etag_of(BIG, checkpoint[BIG])
        report = scan_cache_dir(machine.cache)
        assert not report.warnings
        assert report.size_on_disk == sum(len(checkpoint[name]) for name in NEEDED)

    def test_a_second_pull_fetches_nothing(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        assert machine.pull(REPO).returncode == 0
        machine.hub.served.clear()
        done = machine.pull(REPO, "--json")
        assert json.loads(done.stdout)["download_bytes"] == 0
        assert set(machine.hub.served) == {"api"}

    def test_a_new_commit_fetches_only_the_files_that_changed(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        assert machine.pull(REPO).returncode == 0
        machine.hub.served.clear()
        changed = {**checkpoint, "chat_template.jinja": checkpoint["chat_template.jinja"] + b"\n"}
        commit = machine.hub.add(REPO, changed).commit
        done = machine.pull(REPO, "--json")
        assert json.loads(done.stdout)["commit"] == commit
        assert json.loads(done.stdout)["download_bytes"] == len(changed["chat_template.jinja"])
        assert machine.hub.served["chat_template.jinja"] == len(changed["chat_template.jinja"])

    def test_a_shard_without_text_tensors_is_left_out(self, machine: Machine, tmp_path: Path) -> None:
        files = folder_files(write_checkpoint(tmp_path / "checkpoint", shards=2, vision=False))
        index = json.loads(files["model.safetensors.index.json"])
        index["weight_map"]["model.vision_tower.patch.weight"] = "model-vision.safetensors"
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        machine.hub.add(REPO, {**files, "model-vision.safetensors": bytes(1000)})
        done = machine.pull(REPO, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["skipped"] == ["model-vision.safetensors"]
        assert "model-vision.safetensors" not in fetched(machine)
        assert machine.hub.count("model-vision") == 0
        assert "Not fetched, they hold no text tensors: model-vision.safetensors." in done.stderr

    def test_dry_run_writes_nothing_and_says_what_it_would_cost(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        done = machine.pull(REPO, "--dry-run", "--json")
        document = json.loads(done.stdout)
        assert document["download_bytes"] == document["total_bytes"] == sum(len(checkpoint[n]) for n in NEEDED)
        assert document["fits_disk"] is True
        assert {file["name"] for file in document["files"]} == NEEDED
        assert not machine.repo_cache.exists()
        assert machine.state() == {}
        people = machine.pull(REPO, "--dry-run")
        assert "disk: fits" in people.stdout
        assert "runs on: CPU" in people.stdout

    def test_a_revision_is_resolved_and_recorded(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        repo = machine.hub.add(REPO, checkpoint, refs=("main", "v1.0"))
        for arguments in ((f"{REPO}@v1.0",), (REPO, "--revision", "v1.0")):
            done = machine.pull(*arguments, "--json")
            assert json.loads(done.stdout)["commit"] == repo.commit
            assert json.loads(done.stdout)["revision"] == "v1.0"
        assert (machine.repo_cache / "refs" / "v1.0").read_text() == repo.commit
        assert machine.pull(REPO, "--revision", repo.commit, "--quiet").returncode == 0

    def test_without_symbolic_links_the_snapshot_holds_the_files(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        assert machine.run(REPO, HF_HUB_DISABLE_SYMLINKS="1").returncode == 0
        assert fetched(machine) == NEEDED
        assert not any(path.is_symlink() for path in machine.repo_cache.rglob("*"))
        machine.hub.served.clear()
        assert machine.run(REPO, HF_HUB_DISABLE_SYMLINKS="1").returncode == 0
        assert set(machine.hub.served) == {"api"}

    def test_the_token_goes_to_the_hub_and_never_to_the_cdn(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint).token = "hf_secret"
        done = machine.pull(REPO, HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        seen = {(request.host.split(":")[0], request.authorized) for request in machine.hub.requests}
        assert {(host, auth) for host, auth in seen if host == "localhost"} == {("localhost", False)}
        assert ("127.0.0.1", True) in seen

    def test_a_proxy_is_used(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        done = machine.run(
            REPO, "--dry-run", HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=machine.hub.endpoint, NO_PROXY="localhost"
        )
        assert done.returncode == 0, done.stderr
        assert any(request.host == "hub.invalid" for request in machine.hub.requests)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint = write_checkpoint(folder / "checkpoint")
    kinds = {"m-Q4_0": GGMLQuantizationType.Q4_0, "m-Q8_0": GGMLQuantizationType.Q8_0}
    files = {f"{name}.gguf": write(folder / name, describe(checkpoint, kind)) for name, kind in kinds.items()}
    files["m-UD-Q4_K_XL.gguf"] = files["m-Q8_0.gguf"]
    projector = small_gguf(folder / "mmproj", architecture="clip")
    return {
        **{name: path.read_bytes() for name, path in files.items()},
        "mmproj-BF16.gguf": projector,
        "README.md": b"# Model",
    }


class TestGGUF:
    @pytest.mark.parametrize(
        ("selector", "name"),
        [("Q8_0", "m-Q8_0.gguf"), ("q4_k_xl", "m-UD-Q4_K_XL.gguf"), ("m-Q4_0.gguf", "m-Q4_0.gguf")],
    )
    def test_one_file_is_chosen(self, machine: Machine, repository: dict[str, bytes], selector: str, name: str) -> None:
        machine.hub.add(REPO, repository)
        done = machine.pull(f"{REPO}:{selector}", "--quiet")
        assert done.returncode == 0, done.stderr
        assert fetched(machine) == {name}
        assert Path(done.stdout.strip()).read_bytes() == repository[name]
        assert machine.state()["model"]["path"] == done.stdout.strip()

    def test_the_short_name_takes_its_default_quantization(
        self, machine: Machine, repository: dict[str, bytes]
    ) -> None:
        files = {"gemma-4-31B-it-Q4_K_M.gguf": repository["m-Q8_0.gguf"], "gemma-4-31B-it-Q6_K.gguf": b"other"}
        machine.hub.add("unsloth/gemma-4-31B-it-GGUF", files)
        done = machine.pull("31b-gguf", "--quiet")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/gemma-4-31B-it-Q4_K_M.gguf")

    def test_all_parts_of_a_split_file_come_along(self, machine: Machine, tmp_path: Path) -> None:
        model = describe(write_checkpoint(tmp_path / "checkpoint"))
        parts = {f"BF16/{path.name}": path.read_bytes() for path in write_split(tmp_path / "s.gguf", model, 3)}
        machine.hub.add(REPO, parts)
        done = machine.pull(REPO, "--quiet")
        assert done.returncode == 0, done.stderr
        assert fetched(machine) == set(parts)
        assert done.stdout.strip().endswith("BF16/s-00001-of-00003.gguf")

    def test_a_header_longer_than_the_first_look_is_read_on(self, machine: Machine, tmp_path: Path) -> None:
        model = describe(write_checkpoint(tmp_path / "checkpoint"))
        model.metadata["general.description"] = ("long " * 300_000, GGUFValueType.STRING, None)
        machine.hub.add(REPO, {"m.gguf": write(tmp_path / "m.gguf", model).read_bytes()})
        done = machine.pull(REPO, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tensors"] == 169

    def test_the_types_are_known_without_the_download(self, machine: Machine, repository: dict[str, bytes]) -> None:
        machine.hub.add(REPO, repository)
        document = json.loads(machine.pull(f"{REPO}:Q4_0", "--dry-run", "--json").stdout)
        assert document["format"] == "gguf"
        assert document["precision"] == "Q4_0 (83), F32 (86)"


@pytest.fixture(scope="module")
def prequantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What ExecuTorch's example publishes: no chat template, no generation settings."""
    source = write_checkpoint(tmp_path_factory.mktemp("source"))
    folder = save(tmp_path_factory.mktemp("prequantized"), source, quantized_tensors(source), lent=False)
    return folder_files(folder)


class TestQuantized:
    def test_torchao_tensors_are_recognized(self, machine: Machine, prequantized: dict[str, bytes]) -> None:
        machine.hub.add(REPO, prequantized)
        planned = machine.pull(REPO, "--dry-run", "--json")
        assert json.loads(planned.stdout)["format"] == "torchao", planned.stderr
        assert not machine.repo_cache.exists()
        done = machine.pull(REPO, "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["format"], document["tensors"]) == ("torchao", 169)
        assert document["precision"] == "int4 (83), int8 (1)"
        assert "has no generation_config.json and no chat_template.jinja" in done.stderr
        assert open_checkpoint(Path(document["path"])).is_quantized

    def test_what_31b_int4_lacks_is_lent_by_the_original(
        self, machine: Machine, prequantized: dict[str, bytes], checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add("SocialLocalMobile/gemma-4-31B-it-HQQ-INT4", prequantized)
        machine.hub.add("google/gemma-4-31B-it", checkpoint)
        assert "Next: g4 export" in machine.pull("31b-int4").stderr
        done = machine.pull("31b-int4", "--quiet")
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        assert folder.parent == machine.home / "g4" / "models"
        assert {path.name for path in folder.iterdir()} == NEEDED
        assert (folder / "chat_template.jinja").read_bytes() == checkpoint["chat_template.jinja"]
        assert machine.hub.count("google/gemma-4-31B-it/resolve") == 2
        assert open_checkpoint(folder).manifest.head.source.files[BIG].sha256 == etag_of(BIG, prequantized[BIG])
        offline = machine.pull("31b-int4", "--offline", "--quiet", endpoint="http://127.0.0.1:9")
        assert offline.stdout == done.stdout, offline.stderr

    def test_a_torchao_class_g4_does_not_know_is_refused_before_the_download(
        self, machine: Machine, prequantized: dict[str, bytes]
    ) -> None:
        data = prequantized[BIG].replace(b'\\"_type\\": \\"Int4Tensor\\"', b'\\"_type\\": \\"NVFP4Tenso\\"', 1)
        machine.hub.add(REPO, {**prequantized, BIG: data})
        done = machine.pull(REPO)
        assert done.returncode == 1
        assert f"{REPO}/model.safetensors holds torchao tensors of type NVFP4Tenso" in done.stderr
        assert not machine.repo_cache.exists()


class TestInterruption:
    def test_after_kill_9_only_the_rest_is_fetched(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        peeked = 256 << 10
        machine.hub.fail(BIG, Fault(times=1))  # the look at the header
        machine.hub.fail(BIG, Fault(times=1, seconds_per_piece=0.005))
        with machine.start(REPO) as process:
            wait_until_served(machine, BIG, peeked + 200_000)
            process.kill()
        before = machine.hub.served[BIG] - peeked
        assert before < len(checkpoint[BIG]), "killed too late to prove anything"
        assert machine.state() == {}
        machine.hub.heal()
        machine.hub.served.clear()
        done = machine.pull(REPO)
        assert done.returncode == 0, done.stderr
        assert "Going on with model.safetensors:" in done.stderr
        again = machine.hub.served[BIG] - peeked
        # What was in the sockets when it died is lost; the file is not.
        assert before + again < len(checkpoint[BIG]) + 200_000
        assert fetched(machine) == NEEDED
        assert next((machine.repo_cache / "snapshots").iterdir()).joinpath(BIG).read_bytes() == checkpoint[BIG]

    def test_ctrl_c_says_how_to_go_on_and_registers_nothing(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(times=1))
        machine.hub.fail(BIG, Fault(seconds_per_piece=0.01))
        with machine.start(REPO, "--json") as process:
            wait_until_served(machine, BIG, (256 << 10) + 100_000)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert f"hint: g4 pull {REPO} goes on where this stopped." in err
        assert "Traceback" not in err
        assert json.loads(out)["error"]["exit_code"] == 130
        assert machine.state() == {}
        assert not (machine.repo_cache / "refs").exists()
        machine.hub.heal()
        done = machine.pull(REPO)
        assert done.returncode == 0
        assert "Going on with" in done.stderr

    def test_two_at_once_fetch_it_once(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(times=1))  # the look at the header
        machine.hub.fail(BIG, Fault(times=1, seconds_per_piece=0.01))
        with machine.start(REPO) as first:
            wait_until_served(machine, BIG, (256 << 10) + 8192)
            second = machine.run(REPO)
            _, err = first.communicate(timeout=60)
        assert first.returncode == second.returncode == 0, err + second.stderr
        assert "Another process is fetching model.safetensors; waiting for it." in second.stderr
        assert machine.hub.served[BIG] == len(checkpoint[BIG]) + 2 * (256 << 10)


class TestParts:
    """The download itself, with parts small enough that a test has many."""

    def download(
        self, hub: HubServer, data: bytes, cache: RepoCache, part_bytes: int = 10_000, progress: Progress = SILENT
    ) -> bytes:
        hub.add(REPO, {"m.gguf": data})
        client = Hub(hub.endpoint, policy=RetryPolicy(attempts=4, first_wait_s=0.005))
        source = client.repository(REPO, "main")
        snapshot = fetch(
            client, source, list(source.files.values()), cache, progress, connections=4, part_bytes=part_bytes
        )
        return (snapshot / "m.gguf").read_bytes()

    def test_connections_cut_anywhere_cost_nothing_but_time(self, tmp_path: Path) -> None:
        rng = random.Random(7)
        data = rng.randbytes(200_001)
        with HubServer() as hub:
            for _ in range(40):
                hub.fail("m.gguf", Fault(times=1, cut_after=rng.randrange(1, 9_000)))
            assert self.download(hub, data, RepoCache(REPO, tmp_path)) == data
            # A reset may drop what the client had not read yet; most must have been used.
            assert hub.served["m.gguf"] < 2 * len(data)

    def test_a_file_whose_size_is_no_multiple_and_one_that_is_empty(self, tmp_path: Path) -> None:
        for size in (0, 1, 9_999, 10_000, 10_001):
            with HubServer() as hub:
                data = random.Random(size).randbytes(size)
                assert self.download(hub, data, RepoCache(REPO, tmp_path / str(size))) == data

    def test_a_server_without_range_requests_still_serves(self, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(50_000)
        with HubServer() as hub:
            hub.fail("m.gguf", Fault(whole=True))
            assert self.download(hub, data, RepoCache(REPO, tmp_path)) == data

    def test_a_damaged_ledger_starts_the_file_over(self, tmp_path: Path) -> None:
        data = random.Random(2).randbytes(50_000)
        cache = RepoCache(REPO, tmp_path)
        blobs = tmp_path / "models--owner--model" / "blobs"
        blobs.mkdir(parents=True)
        for ledger in (b"", b"short", struct.pack("<6Q", 10_000, 10_001, 0, 0, 0, 0), struct.pack("<2Q", 10_000, 5)):
            (blobs / f"{etag_of('m.gguf', data)}.g4-partial").write_bytes(bytes(50_000))
            (blobs / f"{etag_of('m.gguf', data)}.g4-ledger").write_bytes(ledger)
            with HubServer() as hub:
                assert self.download(hub, data, cache) == data
            (blobs / etag_of("m.gguf", data)).unlink()

    def test_parts_that_are_here_are_not_fetched_again(self, tmp_path: Path) -> None:
        data = random.Random(3).randbytes(50_000)
        blobs = tmp_path / "models--owner--model" / "blobs"
        blobs.mkdir(parents=True)
        # Parts 0 and 3 complete, 1 half.
        (blobs / f"{etag_of('m.gguf', data)}.g4-partial").write_bytes(data)
        (blobs / f"{etag_of('m.gguf', data)}.g4-ledger").write_bytes(
            struct.pack("<6Q", 10_000, 10_000, 5_000, 0, 10_000, 0)
        )
        with HubServer() as hub:
            assert self.download(hub, data, RepoCache(REPO, tmp_path)) == data
            assert hub.served["m.gguf"] == 25_000
            starts = {request.start for request in hub.requests if request.path.startswith("/cdn")}
            assert starts == {15_000, 20_000, 40_000}

    def test_progress_counts_each_byte_once_in_the_file_and_in_the_whole(self, tmp_path: Path) -> None:
        data = random.Random(4).randbytes(50_000)
        with HubServer() as hub:
            hub.fail("m.gguf", Fault(times=6, cut_after=3_000))
            hub.fail("m.gguf", Fault(times=40, status=404))
            recorder = Recorder()
            with pytest.raises(G4Error, match="HTTP 404"):
                self.download(hub, data, RepoCache(REPO, tmp_path), progress=recorder)
            first = recorder.done[f"pull {REPO}"]
            assert first == recorder.done["m.gguf"]
            assert recorder.totals == {f"pull {REPO}": 50_000, "m.gguf": 50_000}
            hub.heal()
            again = Recorder()
            assert self.download(hub, data, RepoCache(REPO, tmp_path), progress=again) == data
            assert again.totals == again.done == {f"pull {REPO}": 50_000 - first, "m.gguf": 50_000 - first}
            assert 0 < first < 50_000
