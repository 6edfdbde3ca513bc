"""The workspace: where it is, what it remembers, and what it says when memory and disk disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


@pytest.fixture
def said() -> list[str]:
    return []


def make(workspace: Workspace, kind: str, name: str) -> Path:
    path = workspace.new_path(kind, name)  # type: ignore[arg-type]
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"G4_HOME": "/a/b"}, Path("/a/b")),
        ({"G4_HOME": "", "XDG_DATA_HOME": "/data"}, Path("/data/g4")),
        ({"XDG_DATA_HOME": ""}, Path("~/.local/share/g4").expanduser()),
        ({"G4_HOME": "~/x", "XDG_DATA_HOME": "/data"}, Path("~/x").expanduser()),
    ],
)
def test_where_it_is(environ: dict[str, str], expected: Path) -> None:
    assert Workspace.from_environment(environ).root == expected


def test_a_relative_home_is_made_absolute() -> None:
    assert Workspace.from_environment({"G4_HOME": "x"}).root == Path.cwd() / "x"


def test_looking_creates_nothing(workspace: Workspace) -> None:
    assert workspace.last("model") is None
    assert not workspace.root.exists()


def test_it_remembers_the_last_and_says_so(workspace: Workspace, said: list[str]) -> None:
    make(workspace, "bundle", "one")
    second = make(workspace, "bundle", "two")
    workspace.remember("bundle", second)
    assert Workspace(workspace.root).resolve("bundle", None, said.append) == second
    assert said == [f"Using {second} (the last bundle exported)."]


def test_a_source_is_the_later_of_model_and_checkpoint(workspace: Workspace, said: list[str]) -> None:
    model, checkpoint = make(workspace, "model", "m"), make(workspace, "checkpoint", "c")
    workspace.remember("model", model)
    workspace.remember("checkpoint", checkpoint)
    assert workspace.resolve_source(None, said.append) == checkpoint
    workspace.remember("model", model)
    assert workspace.resolve_source(None, said.append) == model


def test_a_name_means_the_thing_in_the_workspace(workspace: Workspace, said: list[str]) -> None:
    checkpoint = make(workspace, "checkpoint", "demo-default")
    assert workspace.resolve_source("demo-default", said.append) == checkpoint
    assert said == [], "what the user named need not be said"


def test_a_path_wins_over_a_name(
    workspace: Workspace, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(workspace, "model", "demo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert workspace.resolve("model", "demo", said.append) == Path("demo")


def test_nothing_remembered(workspace: Workspace, said: list[str]) -> None:
    with pytest.raises(G4Error, match="No bundle was given and none has been exported yet") as caught:
        workspace.resolve("bundle", None, said.append)
    assert "g4 export" in str(caught.value.hint)
    with pytest.raises(G4Error, match="none has been pulled or quantized yet"):
        workspace.resolve_source(None, said.append)


def test_a_remembered_path_that_vanished_is_named(workspace: Workspace, said: list[str]) -> None:
    path = make(workspace, "model", "m")
    workspace.remember("model", path)
    path.rmdir()
    with pytest.raises(G4Error, match=f"The last model, {path}, is gone") as caught:
        workspace.resolve("model", None, said.append)
    assert "g4 pull" in str(caught.value.hint)


def test_a_wrong_name_lists_what_is_there(workspace: Workspace, said: list[str]) -> None:
    make(workspace, "model", "demo")
    with pytest.raises(G4Error, match="nope does not exist") as caught:
        workspace.resolve("model", "nope", said.append)
    assert caught.value.hint == "In the workspace: demo."


def test_a_name_cannot_leave_the_workspace(workspace: Workspace, said: list[str]) -> None:
    make(workspace, "model", "demo")
    with pytest.raises(G4Error, match="does not exist"):
        workspace.resolve("bundle", "../models/demo", said.append)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[]",
        b'{"version": 1, "model": "x"}',
        b'{"version": 1, "model": {"path": 3, "at": 1.0}}',
        b'{"version": 1, "weights": {"path": "x", "at": 1.0}}',
    ],
)
def test_a_damaged_state_file_is_said(workspace: Workspace, content: bytes) -> None:
    workspace.root.mkdir()
    workspace.state_file.write_bytes(content)
    with pytest.raises(G4Error, match=r"state\.json is damaged") as caught:
        workspace.last("model")
    assert "Delete it" in str(caught.value.hint)


def test_a_state_file_of_a_later_version_is_not_guessed_at(workspace: Workspace) -> None:
    workspace.root.mkdir()
    workspace.state_file.write_text(json.dumps({"version": 2}))
    with pytest.raises(G4Error, match="has version 2; this g4 reads version 1"):
        workspace.last("model")


def test_a_file_in_the_way(workspace: Workspace) -> None:
    workspace.root.write_text("")
    with pytest.raises(G4Error, match="a file is in the way"):
        workspace.new_path("model", "demo")


def test_a_place_where_no_folder_can_be_made() -> None:
    with pytest.raises(G4Error, match="no folders can be made there"):
        Workspace(Path("/proc/g4-home")).new_path("model", "demo")


def test_what_can_be_run_is_found_under_any_kind_bundles_first(workspace: Workspace, said: list[str]) -> None:
    model, checkpoint = make(workspace, "model", "demo"), make(workspace, "checkpoint", "demo-int4")
    assert workspace.resolve_runnable("demo", said.append) == model
    assert workspace.resolve_runnable("demo-int4", said.append) == checkpoint
    bundle = make(workspace, "bundle", "demo")
    assert workspace.resolve_runnable("demo", said.append) == bundle
    assert workspace.resolve_runnable(model, said.append) == model
    workspace.remember("bundle", bundle)
    assert workspace.resolve_runnable(None, said.append) == bundle
    assert len(said) == 1
    with pytest.raises(G4Error, match="has no bundle of that name") as caught:
        workspace.resolve_runnable("none", said.append)
    assert caught.value.hint == "In the workspace: demo, demo-int4, demo."
