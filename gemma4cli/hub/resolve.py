"""What the word after `g4 pull` means.

demo                                    the model in the package
31b  31b-gguf  31b-gguf:Q6_K            a short name, with a quantization where the repository has many
owner/repo  owner/repo@REVISION         any repository of a hub
owner/repo:Q4_K_M  owner/repo:FILE@REV  one GGUF file of it, by quantization or by name
./folder  /path/to/model.gguf           something already on this machine
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.hub import catalog

_REVISION = re.compile(r"[\w][\w./-]*")
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class DemoModel:
    """The model in the package."""


@dataclass(frozen=True)
class LocalModel:
    """A folder or GGUF file on this machine."""

    path: Path


@dataclass(frozen=True)
class HubModel:
    """A repository of a hub. `selector` is a quantization or a file name, None to take what is obvious."""

    repo: str
    revision: str = DEFAULT_REVISION
    selector: str | None = None

    def __str__(self) -> str:
        selector = f":{self.selector}" if self.selector else ""
        return f"{self.repo}{selector}" + (f"@{self.revision}" if self.revision != DEFAULT_REVISION else "")


ModelName = DemoModel | LocalModel | HubModel


def resolve(text: str, revision: str | None = None) -> ModelName:
    """Read a model name.

    Args:    revision: what --revision says; must not contradict an @REVISION in `text`.
    Raises:  G4Error for a path that does not exist, an unknown short name (with the closest one), a malformed name.
    """
    path = Path(text).expanduser()
    if _looks_like_path(text) or (text and path.exists() and catalog.find(text) is None):
        return _local(text, path, revision)
    base, selector, inline_revision = _split(text)
    if revision is not None and inline_revision is not None and revision != inline_revision:
        raise G4Error(
            f"{text} asks for revision {inline_revision}, --revision for {revision}.", hint="Give one.", exit_code=2
        )
    wanted = _checked_revision(revision or inline_revision or DEFAULT_REVISION)
    if "/" in base:
        return HubModel(_checked_repo(base), wanted, selector)
    return _short_name(base, selector, wanted, versioned=(revision or inline_revision) is not None)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~"))


def _local(text: str, path: Path, revision: str | None) -> LocalModel:
    if not path.exists():
        raise G4Error(f"{text} does not exist.", hint="g4 pull --list shows the models that can be pulled.")
    if revision is not None:
        raise G4Error("--revision has no meaning for a path.", hint="Leave it out.", exit_code=2)
    return LocalModel(path.absolute())


def _split(text: str) -> tuple[str, str | None, str | None]:
    """Split `base[:selector][@revision]`; a part that is announced must not be empty."""
    name, at, revision = text.partition("@")
    base, colon, selector = name.partition(":")
    if not base or (at and not revision) or (colon and not selector):
        raise G4Error(
            f"{text!r} is not a model name.",
            hint="Write a short name, owner/repo, owner/repo:QUANT, owner/repo@REVISION, or a path.",
            exit_code=2,
        )
    return base, selector or None, revision or None


def _checked_repo(repo: str) -> str:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise G4Error(f"{repo!r} is not a repository name.", hint="Write owner/repo.", exit_code=2) from None
    return repo


def _checked_revision(revision: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise G4Error(
            f"{revision!r} is not a revision.", hint="Give a branch, a tag or a commit of the repository.", exit_code=2
        )
    return revision


def _short_name(name: str, selector: str | None, revision: str, *, versioned: bool) -> DemoModel | HubModel:
    entry = catalog.find(name)
    if entry is None:
        close = catalog.suggest(name)
        raise G4Error(
            f"There is no model called {name!r}" + (f"; did you mean {close}?" if close else "."),
            hint="g4 pull --list shows the short names; owner/repo takes any repository.",
        )
    if entry.repo is None:
        if selector or versioned:
            raise G4Error(f"{name} comes with g4: it has no revisions or quantizations.", exit_code=2)
        return DemoModel()
    if selector is None:
        selector = entry.variants[0].selector
    elif entry.format != "gguf":
        raise G4Error(
            f"{name} has no quantizations to choose from.", hint="31b-gguf has, e.g. 31b-gguf:Q6_K.", exit_code=2
        )
    return HubModel(entry.repo, revision, selector)
