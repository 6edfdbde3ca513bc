"""Differences of two artifacts: each kind is found, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.inspection import diff
from gemma4cli.inspection.artifact import Artifact, open_artifact
from gemma4cli.inspection.diff import compare
from tests.support import programs
from tests.support.gpu_library import FakeKernel, build_library, cubin

SCALE, GATHER = FakeKernel("scale", static_shared=2048), FakeKernel("gather", local=64)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    def library(*kernels: FakeKernel) -> bytes:
        images = {kernel.name: cubin(kernel, "sm_90a") for kernel in kernels}
        return build_library(tmp_path_factory.mktemp("library"), kernels, images)

    return {"one": library(SCALE), "two": library(SCALE, GATHER),
            "larger": library(FakeKernel("scale", static_shared=4096))}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, libraries: dict[str, bytes]) -> Callable[..., Artifact]:
    def make(name: str, library: str = "one", **arguments: Any) -> Artifact:
        return open_artifact([programs.write_cuda_bundle(tmp_path / name, libraries[library], **arguments)])

    return make


def what(document: dict[str, Any]) -> dict[str, Any]:
    """The parts of a comparison that are not empty."""
    parts: dict[str, Any] = {key: document[key] for key in ("config", "versions", "files", "methods") if document[key]}
    for key in ("kernels", "weights"):
        parts |= {
            f"{key} {kind}": document[key][kind] for kind in ("added", "removed", "changed") if document[key][kind]
        }
    return parts


def test_equal_bundles_are_the_same(bundle: Callable[..., Artifact]) -> None:
    document = compare(bundle("a"), bundle("b"))
    assert document["same"] is True
    assert what(document) == {}


def test_weights_with_other_values_are_named(bundle: Callable[..., Artifact]) -> None:
    found = what(compare(bundle("a"), bundle("b", fill=1)))
    assert [change["key"] for change in found.pop("files")] == ["weights.ptd"]
    changed = found.pop("weights changed")
    assert {change["weight"] for change in changed} == {n for n in programs.CUDA_WEIGHTS if "cache" not in n}
    assert changed[0]["a"] == "other values"
    assert found == {}


def test_large_weights_are_read_only_when_asked(
    bundle: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "READ_WITHOUT_ASKING_BYTES", 100)
    a, b = bundle("a"), bundle("b", fill=1)
    unread = compare(a, b)["weights"]
    assert unread["changed"] == [] and unread["unread_bytes"] == 10240 + 2 * 2048 + 128
    assert len(compare(a, b, contents=True)["weights"]["changed"]) == 4


def test_versions_and_config(bundle: Callable[..., Artifact]) -> None:
    found = what(compare(bundle("a"), bundle("b", created_with={"g4": "0", "torch": "2.14.0"}, workspace_bytes=5)))
    assert found == {"versions": [{"key": "torch", "a": "2.13.0", "b": "2.14.0"}]}


def test_constant_methods(bundle: Callable[..., Artifact]) -> None:
    found = what(compare(bundle("a"), bundle("b", get_bos_id=3)))
    assert found["methods"] == [{"key": "get_bos_id()", "a": 2, "b": 3}]
    problem = {"key": "contract.problems", "a": [], "b": ["get_bos_id answers 3, its manifest says 2"]}
    assert problem in found["config"]


def test_kernels(bundle: Callable[..., Artifact]) -> None:
    found = what(compare(bundle("a"), bundle("b", "two")))
    assert found["kernels added"] == ["prefill, decode gather sm_90a"]
    assert "kernels changed" not in found
    back = what(compare(bundle("c", "two"), bundle("d")))
    assert back["kernels removed"] == ["prefill, decode gather sm_90a"]
    (change,) = what(compare(bundle("e"), bundle("f", "larger")))["kernels changed"]
    assert change["kernel"] == "prefill, decode scale sm_90a"
    assert change["fields"]["static_shared_bytes"] == [2048, 4096]
    assert "sha256" in change["fields"]


def test_programs_that_are_not_bundles_are_compared_by_their_own_hashes(tmp_path: Path) -> None:
    plans = {
        name: programs.method("forward", [programs.tensor(programs.ScalarType.FLOAT, [size], constant=1)], [], [0],
                              instructions=[programs.schema.MoveCall(0, 0)])
        for name, size in (("a", 4), ("b", 2))
    }  # fmt: skip
    for name, plan in plans.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pte").write_bytes(programs.serialize([plan], constants=[bytes(16)]))
    found = what(compare(*(open_artifact([tmp_path / name / "model.pte"]) for name in ("a", "b"))))
    assert found["weights changed"] == [{"weight": "constant 1", "a": "float32 [4] 16 B", "b": "float32 [2] 8 B"}]
    assert [change["key"] for change in found["methods"]] == ["forward output 0"]
    assert [change["key"] for change in found["files"]] == ["model.pte"]
