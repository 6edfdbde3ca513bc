"""Every way in which a hub, a network or a disk fails `g4 pull`: its sentence, its hint, and what is left behind."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from gemma4cli.errors import G4Error
from gemma4cli.hub.cache import RepoCache
from gemma4cli.hub.client import Hub
from gemma4cli.hub.download import fetch
from gemma4cli.progress import SILENT
from tests.support.gguf_writer import describe, write
from tests.support.hub_server import Fault, HubServer, etag_of
from tests.support.pulling import REPO, Machine, Outcome, folder_files, small_gguf
from tests.support.tiny import tiny_config_dict, write_checkpoint

BIG = "model.safetensors"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    with HubServer() as hub:
        yield Machine(hub, tmp_path, monkeypatch, capfd)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return folder_files(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def refused(done: Outcome, sentence: str, hint: str = "") -> None:
    """The command failed with this sentence and hint, and nothing else than they were said about it."""
    assert done.returncode == 1, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def untouched(machine: Machine) -> None:
    """Nothing was written into the cache or remembered."""
    assert not machine.repo_cache.exists()
    assert machine.state() == {}


class TestTheHubSaysNo:
    def test_no_such_repository(self, machine: Machine) -> None:
        for token in ("", "hf_mine"):  # the hub answers 401 without a token, 404 with one
            done = machine.pull("owner/nothing", HF_TOKEN=token)
            refused(done, f"There is no repository owner/nothing on {machine.hub.endpoint}", "Check the spelling")
        untouched(machine)

    def test_a_private_repository_looks_like_none(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint).token = "hf_theirs"
        refused(machine.pull(REPO, HF_TOKEN="hf_mine"), "There is no repository", "set HF_TOKEN or run hf auth login")

    @pytest.mark.parametrize(
        ("status", "sentence", "hint"),
        [
            (401, "owner/model is gated, and no token was sent.", "Accept its terms at http"),
            (403, "owner/model is gated, and your account has no access yet.", "Ask for it at http"),
        ],
    )
    def test_gated(self, machine: Machine, checkpoint: dict[str, bytes], status: int, sentence: str, hint: str) -> None:
        """A gated repository can be listed by anyone; its files cannot be read."""
        repo = machine.hub.add(REPO, checkpoint)
        repo.status, repo.error_code = status, "GatedRepo"
        refused(machine.pull(REPO), sentence, hint)
        untouched(machine)

    @pytest.mark.parametrize(
        ("status", "headers", "sentence"),
        [
            (401, {}, "refused the token."),
            (403, {}, "Your token may not read owner/model."),
            (403, {"X-Error-Message": "Access to this resource is disabled."}, "owner/model was disabled by its hub."),
            (418, {}, "answered HTTP 418 for owner/model."),
            (404, {}, "There is no repository owner/model"),
        ],
    )
    def test_other_refusals(
        self, machine: Machine, checkpoint: dict[str, bytes], status: int, headers: dict[str, str], sentence: str
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("/api/models", Fault(status=status, headers=headers))
        refused(machine.pull(REPO), sentence)

    def test_no_such_revision(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        refused(machine.pull(f"{REPO}@v9"), "owner/model has no revision v9.", "/tree/main for what it has")

    def test_a_listed_file_is_gone(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("config.json", Fault(status=404, headers={"X-Error-Code": "EntryNotFound"}))
        refused(machine.pull(REPO), "config.json of owner/model does not exist at revision main.")

    def test_a_page_that_is_no_hub(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("/api/models", Fault(times=1))
        refused(machine.pull(REPO), "does not answer like a hub", "whether the network wants you to log in first")

    @pytest.mark.parametrize(
        "listed",
        [{"size": -1}, {"size": None}, {"sha256": "../../etc/passwd"}, {"sha256": ""}],
    )
    def test_a_list_that_cannot_be_trusted(
        self, machine: Machine, checkpoint: dict[str, bytes], listed: dict[str, object]
    ) -> None:
        machine.hub.add(REPO, checkpoint).listed["config.json"] = listed
        refused(machine.pull(REPO), f"{machine.hub.endpoint} lists 'config.json' of owner/model wrongly.")
        untouched(machine)

    @pytest.mark.parametrize("name", ["../config.json", "/config.json", "a//b.json", "a\\..\\b.json"])
    def test_a_file_name_that_leaves_the_cache(self, machine: Machine, checkpoint: dict[str, bytes], name: str) -> None:
        machine.hub.add(REPO, {**checkpoint, name: b"{}"})
        refused(machine.pull(REPO), f"lists {name!r} of owner/model wrongly.")
        untouched(machine)


class TestTheHubIsBusy:
    def test_errors_that_pass_are_waited_for(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("/api/models", Fault(status=502, times=2))
        machine.hub.fail(BIG, Fault(times=1))
        machine.hub.fail(BIG, Fault(status=503, times=3))
        done = machine.pull(REPO)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("HTTP 502 for owner/model; trying again in") == 2
        assert done.stderr.count("HTTP 503 for model.safetensors of owner/model; trying again in") == 3

    def test_errors_that_stay(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(status=500))
        refused(machine.pull(REPO), "keeps failing for model.safetensors of owner/model (HTTP 500).", "goes on where")
        assert machine.hub.count("/cdn/") == 6

    def test_retry_after_is_honoured(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("/api/models", Fault(status=429, headers={"Retry-After": "1"}, times=1))
        started = time.monotonic()
        done = machine.pull(REPO)
        assert done.returncode == 0
        assert "HTTP 429 for owner/model; trying again in 1.0 s." in done.stderr
        assert time.monotonic() - started >= 1.0

    @pytest.mark.parametrize(
        "headers", [{"Retry-After": "7200"}, {"RateLimit": '"api";r=0;t=7200'}], ids=["retry-after", "ratelimit"]
    )
    def test_a_limit_too_long_to_wait_for(
        self, machine: Machine, checkpoint: dict[str, bytes], headers: dict[str, str]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(status=429, headers=headers))
        refused(machine.pull(REPO), "limits the rate of requests and refused model.safetensors", "again in 7200 s;")
        assert machine.hub.count("/cdn/") == 1


class TestTheNetwork:
    def test_nobody_answers(self, machine: Machine) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}"
            done = machine.pull(REPO, endpoint=address)
        refused(done, f"{address} cannot be reached:", "--offline")
        assert done.stderr.count("trying again") == 1

    def test_an_address_that_is_none(self, machine: Machine) -> None:
        refused(machine.pull(REPO, endpoint="hub.example.com"), "is not an address of a hub", "Check HF_ENDPOINT.")

    def test_the_connection_breaks_every_time(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(cut_after=0))
        refused(
            machine.pull(REPO),
            f"The connection to {machine.hub.endpoint} was lost while fetching model.safetensors of owner/model",
            "goes on where it stopped",
        )

    def test_a_server_that_stalls_is_asked_again(
        self, machine: Machine, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(times=1))
        machine.hub.fail(BIG, Fault(times=1, seconds_per_piece=1.0))
        done = machine.pull(REPO)
        assert done.returncode == 0, done.stderr
        assert "Lost the connection for model.safetensors of owner/model; trying again in" in done.stderr

    def test_redirects_in_a_circle(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(
            "config.json", Fault(status=307, headers={"Location": "/owner/model/resolve/main/config.json"})
        )
        refused(machine.pull(REPO), "redirects in a circle for config.json of owner/model.")

    def test_the_proxy_refuses(self, machine: Machine) -> None:
        """An https hub is asked for through CONNECT, which our server does not know."""
        done = machine.pull(
            REPO, endpoint="https://hub.invalid", HTTPS_PROXY=machine.hub.endpoint, NO_PROXY="", no_proxy=""
        )
        refused(done, "The proxy refused the connection to https://hub.invalid", "Check HTTPS_PROXY.")


class TestTheBytesAreWrong:
    def test_a_wrong_hash_is_thrown_away_and_the_next_try_is_clean(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail(BIG, Fault(corrupt=True))
        sha = etag_of(BIG, checkpoint[BIG])
        refused(machine.pull(REPO), f"{BIG} of owner/model arrived damaged", f"the repository says {sha[:12]}…")
        assert not list((machine.repo_cache / "blobs").glob(f"{sha}*"))
        assert machine.state() == {}
        machine.hub.heal()
        done = machine.pull(REPO, "--quiet")
        assert done.returncode == 0
        assert (Path(done.stdout.strip()) / BIG).read_bytes() == checkpoint[BIG]

    def test_a_small_file_is_checked_by_its_git_hash(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        machine.hub.fail("generation_config.json", Fault(corrupt=True))
        refused(machine.pull(REPO), "generation_config.json of owner/model arrived damaged")

    def test_a_file_shorter_than_listed(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint).listed["chat_template.jinja"] = {"size": 10_000}
        refused(machine.pull(REPO), "was lost while fetching chat_template.jinja", "the server sent")

    def test_a_file_longer_than_listed(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint).listed["chat_template.jinja"] = {"size": 100}
        refused(machine.pull(REPO), "chat_template.jinja of owner/model arrived damaged")

    @pytest.mark.parametrize("name", ["chat_template.jinja", BIG])
    def test_a_file_that_changes_between_two_requests(
        self, machine: Machine, checkpoint: dict[str, bytes], name: str
    ) -> None:
        machine.hub.add(REPO, checkpoint).listed[name] = {"etag": "f" * (64 if name == BIG else 40)}
        refused(machine.pull(REPO), f"{name} of owner/model changed while it was being fetched.", "the new version")
        assert machine.state() == {}

    def test_a_blob_that_lost_bytes_is_fetched_again(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        assert machine.pull(REPO).returncode == 0
        blob = machine.repo_cache / "blobs" / etag_of(BIG, checkpoint[BIG])
        blob.write_bytes(checkpoint[BIG][:-1])
        assert machine.pull(REPO).returncode == 0
        assert blob.read_bytes() == checkpoint[BIG]

    def test_force_fetches_what_looks_right(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        assert machine.pull(REPO).returncode == 0
        blob = machine.repo_cache / "blobs" / etag_of(BIG, checkpoint[BIG])
        blob.write_bytes(bytes(len(checkpoint[BIG])))
        assert machine.pull(REPO, "--force").returncode == 0
        assert blob.read_bytes() == checkpoint[BIG]


class TestTheDisk:
    def test_too_small_is_said_before_anything_is_fetched(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint).listed["chat_template.jinja"] = {"size": 10**15}
        done = machine.pull(REPO)
        refused(done, f"owner/model needs 909 TiB on the disk of {machine.cache}, which has", "set HF_HOME to a folder")
        untouched(machine)
        planned = machine.pull(REPO, "--dry-run", "--json")
        assert json.loads(planned.stdout)["fits_disk"] is False

    def test_a_cache_that_cannot_be_written(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        (machine.home / "file").write_text("in the way")
        done = machine.pull(REPO, HF_HUB_CACHE=str(machine.home / "file" / "hub"))
        refused(done, f"The cache {machine.home}/file/hub cannot be written: Not a directory.", "with HF_HOME")
        assert machine.state() == {}

    def test_a_write_the_kernel_refuses_halfway_keeps_what_came_before(self, tmp_path: Path) -> None:
        data = bytes(range(256)) * 400
        with HubServer() as server:
            server.add(REPO, {"m.gguf": data})
            cache = RepoCache(REPO, tmp_path)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            try:
                with pytest.raises(G4Error, match=f"The cache {tmp_path} cannot be written: File too large."):
                    self.fetch_all(server, cache)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            server.served.clear()
            assert (self.fetch_all(server, cache) / "m.gguf").read_bytes() == data
            # All of the last piece that arrived is fetched again, or the part of it that the kernel refused.
            assert len(data) - 50_000 <= server.served["m.gguf"] < len(data)

    def fetch_all(self, server: HubServer, cache: RepoCache) -> Path:
        hub = Hub(server.endpoint)
        source = hub.repository(REPO, "main")
        return fetch(hub, source, list(source.files.values()), cache, SILENT)

    def test_a_temporary_folder_that_cannot_hold_large_files(
        self, machine: Machine, checkpoint: dict[str, bytes]
    ) -> None:
        machine.hub.add(REPO, checkpoint)
        done = machine.run(REPO, limit_bytes=600_000, TMPDIR=str(machine.home))
        refused(done, f"The temporary folder {machine.home} cannot be written: File too large.", "with TMPDIR")
        untouched(machine)


class TestOffline:
    def test_what_is_in_the_cache_needs_no_hub(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        machine.hub.add(REPO, checkpoint)
        online = machine.pull(REPO, "--quiet")
        before = len(machine.hub.requests)
        offline = machine.pull(REPO, "--offline", "--quiet")
        assert offline.stdout == online.stdout
        assert len(machine.hub.requests) == before
        by_environment = machine.run(REPO, "--quiet", HF_HUB_OFFLINE="1")
        assert by_environment.stdout == online.stdout, by_environment.stderr

    def test_what_is_not_there(self, machine: Machine) -> None:
        done = machine.pull(f"{REPO}@v1", "--offline")
        refused(done, f"{REPO} at v1 is not in the cache {machine.cache}.", f"without --offline: g4 pull {REPO}@v1")
        assert not machine.hub.requests

    def test_what_is_there_in_part(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        commit = machine.hub.add(REPO, checkpoint).commit
        assert machine.pull(REPO).returncode == 0
        (machine.repo_cache / "snapshots" / commit / "tokenizer.json").unlink()
        refused(machine.pull(REPO, "--offline"), f"The cache does not hold all of {REPO}: {REPO} has no tokenizer.json")


class TestTheModelIsNotForUs:
    """Refused from headers: the weights stay on the hub."""

    def serve(self, machine: Machine, files: dict[str, bytes], **changes: bytes) -> None:
        machine.hub.add(REPO, {**files, **{name.replace("__", "."): data for name, data in changes.items()}})

    def test_another_architecture(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        config = {**tiny_config_dict(), "model_type": "llama"}
        self.serve(machine, checkpoint, config__json=json.dumps(config).encode())
        refused(machine.pull(REPO), f"{REPO}/config.json: model_type is 'llama'")
        untouched(machine)

    def test_another_tools_quantization(self, machine: Machine, checkpoint: dict[str, bytes]) -> None:
        config = {**tiny_config_dict(), "quantization_config": {"quant_method": "gptq"}}
        self.serve(machine, checkpoint, config__json=json.dumps(config).encode())
        refused(machine.pull(REPO), f"{REPO}/config.json: quantization_config")

    def test_a_type_that_cannot_be_quantized(
        self, machine: Machine, checkpoint: dict[str, bytes], tmp_path: Path
    ) -> None:
        save_file({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)}, tmp_path / BIG)
        self.serve(machine, checkpoint, model__safetensors=(tmp_path / BIG).read_bytes())
        refused(machine.pull(REPO), f"{REPO} holds tensors of type F8_E4M3, which g4 cannot quantize.", "g4 pull 31b")
        untouched(machine)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            (
                {"intermediate_size": 64},
                "weight has shape [64, 128], but config.json makes it [64, 64].",
            ),
            ({"num_hidden_layers": 6}, "(and 82 more) does not belong to the model"),
            ({"num_hidden_layers": 18}, "model.layers.12.input_layernorm.weight (and 82 more) is missing"),
        ],
    )
    def test_weights_that_are_not_the_configs(
        self, machine: Machine, checkpoint: dict[str, bytes], changes: dict[str, int], sentence: str
    ) -> None:
        if layers := changes.get("num_hidden_layers"):
            changes["layer_types"] = (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6)
        self.serve(machine, checkpoint, config__json=json.dumps(tiny_config_dict(**changes)).encode())
        refused(machine.pull(REPO), sentence, "belong to different models")
        untouched(machine)

    def test_only_vision(self, machine: Machine, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
        save_file({"model.vision_tower.weight": torch.zeros(64)}, tmp_path / BIG)
        self.serve(machine, checkpoint, model__safetensors=(tmp_path / BIG).read_bytes())
        refused(machine.pull(REPO), f"{REPO} holds no text tensors")

    @pytest.mark.parametrize(
        "data",
        [b"", b"short", b"\xff" * 64, b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02\0\0\0\0\0\0\0{}", b"\x01\0\0\0\0\0\0\0{"],
    )
    def test_a_damaged_safetensors_header(self, machine: Machine, checkpoint: dict[str, bytes], data: bytes) -> None:
        self.serve(machine, checkpoint, model__safetensors=data)
        refused(machine.pull(REPO), f"{REPO}/model.safetensors is not a safetensors file.")

    def test_damaged_torchao_metadata(self, machine: Machine, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
        save_file({"x": torch.zeros(4)}, tmp_path / BIG, {"tensor_names": '["model.norm.weight"]'})
        self.serve(machine, checkpoint, model__safetensors=(tmp_path / BIG).read_bytes())
        refused(machine.pull(REPO), f"{REPO}/model.safetensors has damaged torchao metadata.")

    @pytest.mark.parametrize(
        "index", [b"not json", b"[]", b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../b"}}']
    )
    def test_a_damaged_index(self, machine: Machine, checkpoint: dict[str, bytes], index: bytes) -> None:
        machine.hub.add(REPO, {**checkpoint, "model.safetensors.index.json": index})
        refused(machine.pull(REPO), "model.safetensors.index.json of owner/model", "The repository is damaged.")

    def test_a_gguf_of_another_architecture(self, machine: Machine, tmp_path: Path) -> None:
        machine.hub.add(REPO, {"m.gguf": small_gguf(tmp_path / "m.gguf", architecture="llama")})
        refused(machine.pull(REPO), f"{REPO}/m.gguf is a model of architecture 'llama'; g4 runs gemma4.")
        untouched(machine)

    def test_a_gguf_type_that_cannot_be_converted(self, machine: Machine, tmp_path: Path) -> None:
        machine.hub.add(REPO, {"m.gguf": small_gguf(tmp_path / "m.gguf", (GGMLQuantizationType.NVFP4,))})
        refused(machine.pull(REPO), f"{REPO}/m.gguf holds tensors of type NVFP4", "another quantization, e.g. Q4_K_M")
        untouched(machine)

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("rope_freqs.weight", "is not Gemma 4's"),
            ("blk.0.ffn_gate_exps.weight", "which no dense Gemma 4 text model has"),
        ],
    )
    def test_a_gguf_of_another_gemma_4(self, machine: Machine, tmp_path: Path, name: str, sentence: str) -> None:
        model = describe(write_checkpoint(tmp_path / "checkpoint"))
        model.tensors[name] = np.full(16, 2.0, np.float32)
        machine.hub.add(REPO, {"m.gguf": write(tmp_path / "m.gguf", model).read_bytes()})
        done = machine.pull(REPO)
        refused(done, sentence)
        assert f"{REPO}/m.gguf" in done.stderr
        untouched(machine)

    def test_a_gguf_that_is_none(self, machine: Machine) -> None:
        machine.hub.add(REPO, {"m.gguf": b"GGML" + bytes(100)})
        refused(machine.pull(REPO), f"{REPO}/m.gguf is not a GGUF file.")

    def test_a_gguf_cut_short(self, machine: Machine, tmp_path: Path) -> None:
        machine.hub.add(REPO, {"m.gguf": small_gguf(tmp_path / "m.gguf")[:-10]})
        refused(machine.pull(REPO), "ends beyond the end of the file")
