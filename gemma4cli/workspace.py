"""Where g4 keeps what it makes, and what "the last one" means.

`G4_HOME` (default `$XDG_DATA_HOME/g4`, else `~/.local/share/g4`) holds `models/` (pulled), `checkpoints/` (quantized),
`bundles/` (exported) and `state.json`, which remembers the last of each so that no command needs a path.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json, write_json

Kind = Literal["model", "checkpoint", "bundle"]
Say = Callable[[str], None]

_STATE_VERSION = 1
_FOLDERS: Mapping[Kind, str] = {"model": "models", "checkpoint": "checkpoints", "bundle": "bundles"}
_MADE_BY: Mapping[Kind, str] = {"model": "g4 pull", "checkpoint": "g4 quantize", "bundle": "g4 export"}
_VERB: Mapping[Kind, str] = {"model": "pulled", "checkpoint": "quantized", "bundle": "exported"}


@dataclass(frozen=True)
class Remembered:
    """The last thing of a kind: its absolute path, when it was made (seconds since the epoch), and where it came from
    (`repo`, `revision`, `commit` of a pulled model; empty for what was made here)."""

    path: Path
    at: float
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workspace:
    """A folder of models, checkpoints and bundles; nothing is created before it is needed."""

    root: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Workspace:
        """Find the workspace; empty variables count as unset, as the XDG specification says."""
        if home := environ.get("G4_HOME"):
            return cls(Path(home).expanduser().absolute())
        if data := environ.get("XDG_DATA_HOME"):
            return cls(Path(data).absolute() / "g4")
        return cls(Path("~/.local/share/g4").expanduser())

    @property
    def state_file(self) -> Path:
        return self.root / "state.json"

    def folder(self, kind: Kind) -> Path:
        """Return the folder that holds things of a kind; it may not exist yet."""
        return self.root / _FOLDERS[kind]

    def new_path(self, kind: Kind, name: str) -> Path:
        """Return where a writer puts a thing of this name when --output is not given; creates the parent folder."""
        folder = self.folder(kind)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise G4Error(
                f"The workspace {folder} cannot be made: a file is in the way.", hint="Set G4_HOME to another folder."
            ) from None
        except FileNotFoundError:  # parents are made, too, but not in a file system like /proc
            raise G4Error(
                f"The workspace {folder} cannot be made: no folders can be made there.",
                hint="Set G4_HOME to another folder.",
            ) from None
        return folder / name

    def remember(self, kind: Kind, path: Path, origin: Mapping[str, str] | None = None) -> None:
        """Make `path` the last thing of its kind."""
        state = self._read()
        state[kind] = {"path": str(path.absolute()), "at": time.time(), "origin": dict(origin or {})}
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.state_file, {"version": _STATE_VERSION, **state})

    def last(self, kind: Kind) -> Remembered | None:
        """Return the last thing of a kind, whether it still exists or not."""
        entry = self._read().get(kind)
        return None if entry is None else Remembered(Path(entry["path"]), entry["at"], entry.get("origin", {}))

    def resolve(self, kind: Kind, given: str | Path | None, say: Say) -> Path:
        """Find what a command works on: a path or a name in the workspace, else the last one (said through `say`)."""
        if given is not None:
            return self._given(given, (kind,))
        last = self.last(kind)
        if last is None:
            raise G4Error(
                f"No {kind} was given and none has been {_VERB[kind]} yet.",
                hint=f"Name one, or make one with {_MADE_BY[kind]}.",
            )
        return self._still_there(kind, last, say)

    def resolve_source(self, given: str | Path | None, say: Say) -> Path:
        """Find what export and the eager engine read: a model or a quantized checkpoint, the later of the two."""
        if given is not None:
            return self._given(given, ("checkpoint", "model"))
        found: list[tuple[Kind, Remembered]] = [
            (kind, last) for kind in ("checkpoint", "model") if (last := self.last(kind)) is not None
        ]
        if not found:
            raise G4Error(
                "No checkpoint was given, and none has been pulled or quantized yet.",
                hint="Name one, or get one with g4 pull.",
            )
        kind, last = max(found, key=lambda item: item[1].at)
        return self._still_there(kind, last, say)

    def resolve_runnable(self, given: str | Path | None, say: Say) -> Path:
        """Find what can be run and measured: a bundle, checkpoint or model by path or name, else the last bundle."""
        return self.resolve("bundle", None, say) if given is None else self._given(given, tuple(_FOLDERS)[::-1])

    def _given(self, given: str | Path, kinds: tuple[Kind, ...]) -> Path:
        path = Path(given).expanduser()
        if path.exists():
            return path
        if str(given) and len(path.parts) == 1:
            for kind in kinds:
                if (candidate := self.folder(kind) / path).exists():
                    return candidate
        known = [entry.name for kind in kinds for entry in self._entries(kind)]
        hint = f"In the workspace: {', '.join(known)}." if known else f"Make one with {_MADE_BY[kinds[0]]}."
        raise G4Error(
            f"{given} does not exist, and the workspace {self.root} has no {kinds[0]} of that name.", hint=hint
        )

    def _entries(self, kind: Kind) -> list[Path]:
        folder = self.folder(kind)
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []

    def _still_there(self, kind: Kind, last: Remembered, say: Say) -> Path:
        if not last.path.exists():
            raise G4Error(
                f"The last {kind}, {last.path}, is gone.",
                hint=f"Name another one, or make it again with {_MADE_BY[kind]}.",
            )
        say(f"Using {last.path} (the last {kind} {_VERB[kind]}).")
        return last.path

    def _read(self) -> dict[str, Any]:
        if not self.state_file.exists():
            return {}
        damaged = G4Error(
            f"{self.state_file} is damaged.",
            hint="Delete it; g4 then only forgets which model and bundle were the last.",
        )
        try:
            state = read_json(self.state_file)
        except G4Error:
            raise damaged from None
        if not isinstance(state, dict):
            raise damaged
        version = state.pop("version", None)
        if version != _STATE_VERSION:
            raise G4Error(
                f"{self.state_file} has version {version!r}; this g4 reads version {_STATE_VERSION}.",
                hint="Use the g4 that wrote it, or delete the file.",
            )
        for kind, entry in state.items():
            whole = (
                isinstance(entry, dict)
                and isinstance(entry.get("path"), str)
                and isinstance(entry.get("at"), float)
                and isinstance(entry.get("origin", {}), dict)
            )
            if kind not in _FOLDERS or not whole:
                raise damaged
        return state


def name_of(path: Path) -> str:
    """Return a model's name for people; a Hub snapshot's is that of its repository, not of its commit."""
    if path.is_file():
        return path.stem
    if path.parent.name == "snapshots":
        return path.parent.parent.name.split("--")[-1]
    return path.resolve().name
