"""Pull a model from a hub: plan it, check it, fetch it. The command line only renders what this returns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.files import atomic_directory, format_bytes
from gemma4cli.hub.cache import RepoCache
from gemma4cli.hub.catalog import lender_of
from gemma4cli.hub.client import Hub, RemoteFile, Repository
from gemma4cli.hub.download import fetch
from gemma4cli.hub.headers import Contents, inspect, peek
from gemma4cli.hub.machine import free_bytes
from gemma4cli.hub.resolve import HubModel
from gemma4cli.hub.selection import INDEX, LENDABLE, Selection, select
from gemma4cli.progress import Progress

# What the default recipe makes of 16-bit weights: 5.37 bits per weight of the 31B (docs/quantization.md).
_QUANTIZED_SHARE = 5.37 / 16


@dataclass(frozen=True)
class Portion:
    """Files of one repository. `missing` has the bytes still to fetch of each, 0 for what the cache holds."""

    source: Repository
    cache: RepoCache
    files: tuple[RemoteFile, ...]
    missing: dict[str, int]

    @property
    def snapshot(self) -> Path:
        return self.cache.snapshot(self.source.commit)


@dataclass(frozen=True)
class Plan:
    """A pull before it happens. `lent` are small files that the model's repository lacks and another one has."""

    model: HubModel
    selection: Selection
    contents: Contents
    main: Portion
    lent: Portion | None

    @property
    def portions(self) -> tuple[Portion, ...]:
        return (self.main,) if self.lent is None else (self.main, self.lent)

    @property
    def total_bytes(self) -> int:
        return sum(file.size for portion in self.portions for file in portion.files)

    @property
    def download_bytes(self) -> int:
        return sum(sum(portion.missing.values()) for portion in self.portions)

    @property
    def run_bytes(self) -> int:
        """About how much memory the weights take when run."""
        weights = sum(file.size for file in self.main.files if file.name in self.selection.weights)
        return int(weights * _QUANTIZED_SHARE) if self.contents.format == "safetensors" else weights

    @property
    def absent(self) -> tuple[str, ...]:
        """What a chat needs and neither repository has."""
        if self.selection.format == "gguf":
            return ()
        there = {file.name for portion in self.portions for file in portion.files}
        return tuple(name for name in LENDABLE[:2] if name not in there)

    @property
    def origin(self) -> dict[str, str]:
        """Where the model comes from, for the workspace and for manifests made from it."""
        source = self.main.source
        return {"repo": source.repo, "revision": source.revision, "commit": source.commit}

    def path(self, models: Path) -> Path:
        """Return what the other commands work on: the snapshot, the GGUF file in it, or a folder of links in `models`
        when the files come from two repositories."""
        if self.lent is not None:
            return models / self.model.repo.replace("/", "--")
        return self.main.snapshot / self.selection.main if self.selection.main else self.main.snapshot


def plan(hub: Hub, model: HubModel, *, cache_dir: Path | None = None, force: bool = False) -> Plan:
    """Ask the hub what a pull would fetch, and whether g4 can use it. Writes nothing into the cache.

    Args:    force: plan to fetch again what the cache already holds.
    Raises:  G4Error from the hub, the choice of files, or the check of their headers.
    """
    source = hub.repository(model.repo, model.revision)

    def read_index() -> object:
        return _parse_index(hub.read(source, source.files[INDEX], 0, source.files[INDEX].size), model.repo)

    selection = select(model.repo, source.files, model.selector, read_index)
    main = _portion(source, selection.names, cache_dir, force)
    lent = _lent(selection, main, lambda repo: hub.repository(repo, "main"), cache_dir, force)
    return Plan(model, selection, _check(hub, main, selection), main, lent)


def plan_offline(model: HubModel, *, cache_dir: Path | None = None) -> Plan:
    """Find a model in the cache without asking anyone.

    Raises: G4Error when it is not there in full.
    """
    source = _cached_repository(model.repo, model.revision, model, cache_dir)
    snapshot = RepoCache(model.repo, cache_dir).snapshot(source.commit)
    try:
        selection = select(
            model.repo,
            source.files,
            model.selector,
            lambda: _parse_index((snapshot / INDEX).read_bytes(), model.repo),
        )
    except G4Error as error:
        raise G4Error(f"The cache does not hold all of {model}: {error.message}", hint=_pull_online(model)) from None
    main = _portion(source, selection.names, cache_dir, force=False)
    lent = _lent(selection, main, lambda repo: _cached_repository(repo, "main", model, cache_dir), cache_dir, False)
    return Plan(model, selection, inspect(_opened(main, selection)), main, lent)


def execute(hub: Hub, plan: Plan, models: Path, progress: Progress, *, force: bool = False) -> Path:
    """Fetch what a plan misses and return the model's path.

    Raises: G4Error; what has arrived by then is kept for the next run.
    """
    _require_space(plan)
    if plan.selection.skipped:
        progress.note(f"Not fetched, they hold no text tensors: {', '.join(plan.selection.skipped)}.")
    for portion in plan.portions:
        if force:
            for file in portion.files:
                portion.cache.forget(file, portion.source.commit)
        fetch(hub, portion.source, portion.files, portion.cache, progress)
    path = plan.path(models)
    if plan.lent is not None:
        with atomic_directory(path, force=True) as folder:
            for portion in plan.portions:
                for file in portion.files:
                    (folder / file.name).symlink_to(portion.snapshot / file.name)
    return path


def _require_space(plan: Plan) -> None:
    cache = plan.main.cache.root
    free = free_bytes(cache)
    if plan.download_bytes > free:
        raise G4Error(
            f"{plan.model} needs {format_bytes(plan.download_bytes)} on the disk of {cache}, which has "
            f"{format_bytes(free)} free.",
            hint="Free some space (hf cache ls, hf cache rm), or set HF_HOME to a folder on another disk.",
        )


def _parse_index(data: bytes, repo: str) -> object:
    try:
        return json.loads(data)
    except ValueError:
        raise G4Error(f"{INDEX} of {repo} is not valid JSON.", hint="The repository is damaged.") from None


def _portion(source: Repository, names: tuple[str, ...], cache_dir: Path | None, force: bool) -> Portion:
    cache = RepoCache(source.repo, cache_dir)
    # Small files first: a folder that has its weights then has everything.
    files = tuple(sorted((source.files[name] for name in names), key=lambda file: file.size))
    missing = {file.name: file.size if force else cache.missing_bytes(file, source.commit) for file in files}
    return Portion(source, cache, files, missing)


def _lent(
    selection: Selection,
    main: Portion,
    open_repository: Callable[[str], Repository],
    cache_dir: Path | None,
    force: bool,
) -> Portion | None:
    """Plan what another repository of the same model lends, for the models we know one of."""
    lender = lender_of(main.source.repo)
    wanted = [name for name in LENDABLE if name not in main.source.files]
    if lender is None or not wanted or selection.format == "gguf":
        return None
    source = open_repository(lender)
    return _portion(source, tuple(name for name in wanted if name in source.files), cache_dir, force)


def _check(hub: Hub, main: Portion, selection: Selection) -> Contents:
    """Look into the files: those in the cache when they are all there, else a skeleton of the ones on the hub."""
    if all((main.snapshot / file.name).is_file() for file in main.files) and not any(main.missing.values()):
        return inspect(_opened(main, selection))
    try:
        with tempfile.TemporaryDirectory(prefix="g4-pull-") as folder:
            return peek(hub, main.source, selection, Path(folder))
    except OSError as error:
        raise G4Error(
            f"The temporary folder {tempfile.gettempdir()} cannot be written: {error.strerror or error}.",
            hint="Choose another one with TMPDIR; it needs little space, but must take large files with holes.",
        ) from error


def _opened(main: Portion, selection: Selection) -> Path:
    return main.snapshot / selection.main if selection.main else main.snapshot


def _cached_repository(repo: str, revision: str, model: HubModel, cache_dir: Path | None) -> Repository:
    cache = RepoCache(repo, cache_dir)
    commit = cache.commit_of(revision)
    here = cache.files_of(commit) if commit else {}
    if commit is None or not here:
        raise G4Error(f"{repo} at {revision} is not in the cache {cache.root}.", hint=_pull_online(model))
    files = {name: RemoteFile(name, path.stat().st_size, path.resolve().name) for name, path in here.items()}
    return Repository(repo, revision, commit, files)


def _pull_online(model: HubModel) -> str:
    return f"Pull it once without --offline: g4 pull {model}"
