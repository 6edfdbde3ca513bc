"""Which files of a repository a text model needs: weights of the text part, configuration, tokenizer; nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from gemma4cli.errors import G4Error
from gemma4cli.model.names import is_text

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REQUIRED = (CONFIG, "tokenizer.json")
# What a chat needs beside the weights; a repository of the same model can lend them.
LENDABLE = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")
_WELCOME = (*LENDABLE, "g4.json")
_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d_(?:[01]|K(?:_[A-Z]+)?|[A-Z]+)|BF16|F16|F32))(?!_?[A-Za-z0-9])", re.IGNORECASE
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """What to fetch. `main` is the GGUF file to open (its first part), None for a folder of safetensors."""

    format: Literal["safetensors", "gguf"]
    weights: tuple[str, ...]
    companions: tuple[str, ...]
    skipped: tuple[str, ...]
    main: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.companions + self.weights


def select(repo: str, names: Iterable[str], selector: str | None, read_index: Callable[[], object]) -> Selection:
    """Choose the files of a repository.

    Args:
        names: every file it has.
        selector: a quantization or a file name, None for the only reasonable choice.
        read_index: fetches and parses `model.safetensors.index.json`; called only when it is there and needed.
    Raises:  G4Error when nothing fits, or several things do (listing them).
    """
    names = sorted(names)
    if selector is None and (SINGLE in names or INDEX in names):
        return _safetensors(repo, names, read_index)
    models = _gguf_models(names)
    if selector is not None:
        return _chosen_gguf(repo, models, selector)
    if len(models) == 1:
        return _gguf(repo, next(iter(models.values())))
    if models:
        raise G4Error(
            f"{repo} has {len(models)} GGUF models: {', '.join(_labels(models))}.",
            hint=f"Name one, e.g. {repo}:{_labels(models)[0]}.",
        )
    raise G4Error(
        f"{repo} has no safetensors and no GGUF weights.",
        hint="g4 reads model.safetensors, sharded safetensors with their index, and *.gguf.",
    )


def _safetensors(repo: str, names: list[str], read_index: Callable[[], object]) -> Selection:
    for name in _REQUIRED:
        if name not in names:
            raise G4Error(f"{repo} has no {name}; the model cannot be used without it.", hint="Use another repository.")
    companions = tuple(name for name in (*_REQUIRED, *_WELCOME) if name in names)
    if INDEX not in names:
        return Selection("safetensors", (SINGLE,), companions, ())
    weights, skipped = text_shards(repo, read_index())
    for shard in weights:
        if shard not in names:
            raise G4Error(f"{repo} lacks {shard}, which its index names.", hint="The repository is incomplete.")
    return Selection("safetensors", weights, (*companions, INDEX), skipped)


def text_shards(repo: str, index: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the shards of an index into those with text tensors and the others."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(map(_is_plain_name, weight_map.values())):
        raise G4Error(f"{INDEX} of {repo} has no weight_map from tensors to files.", hint="The repository is damaged.")
    text = {shard for tensor, shard in weight_map.items() if is_text(tensor)}
    if not text:
        raise G4Error(f"{INDEX} of {repo} lists no text tensor.", hint="Only Gemma 4 text models are supported.")
    return tuple(sorted(text)), tuple(sorted(set(weight_map.values()) - text))


def _is_plain_name(shard: object) -> bool:
    return isinstance(shard, str) and PurePosixPath(shard).name == shard


def _gguf_models(names: list[str]) -> dict[str, list[str]]:
    """Group GGUF files into models, the parts of a split one under their stem; vision projectors are left out."""
    models: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and "mmproj" not in PurePosixPath(name).name.lower():
            stem = _PART.sub("", name) if _PART.search(name) else name[: -len(".gguf")]
            models.setdefault(stem, []).append(name)
    return models


def quantization_of(name: str) -> str | None:
    """Return the quantization a GGUF file's name states, e.g. Q4_K_M, UD-Q4_K_XL."""
    found = _QUANTIZATION.findall(PurePosixPath(name).name)
    return found[-1].upper() if found else None


def _labels(models: dict[str, list[str]]) -> list[str]:
    """Name each model as a selector would: by quantization where that is enough, else by file."""
    quantizations = [quantization_of(parts[0]) for parts in models.values()]
    return [
        quantization if quantization and quantizations.count(quantization) == 1 else parts[0]
        for quantization, parts in zip(quantizations, models.values(), strict=True)
    ]


def _chosen_gguf(repo: str, models: dict[str, list[str]], selector: str) -> Selection:
    """Find a model by file name, by exact quantization, else by the end of one (Q4_K_XL finds UD-Q4_K_XL)."""
    wanted = selector.lower()
    tests: tuple[Callable[[list[str]], bool], ...] = (
        lambda parts: any(wanted in (part.lower(), PurePosixPath(part).name.lower()) for part in parts),
        lambda parts: (quantization_of(parts[0]) or "").lower() == wanted,
        lambda parts: (quantization_of(parts[0]) or "").lower().endswith(f"-{wanted}"),
    )
    for test in tests:
        matches = [parts for parts in models.values() if test(parts)]
        if len(matches) == 1:
            return _gguf(repo, matches[0])
        if matches:
            files = ", ".join(parts[0] for parts in matches)
            raise G4Error(f"{selector} fits {len(matches)} files of {repo}: {files}.", hint="Give the file's name.")
    if not models:
        raise G4Error(f"{repo} has no GGUF files.", hint=f"g4 pull {repo} takes its safetensors, if it has any.")
    raise G4Error(f"{repo} has no GGUF model {selector}.", hint=f"It has {', '.join(_labels(models))}.")


def _gguf(repo: str, parts: list[str]) -> Selection:
    part = _PART.search(parts[0])
    if part is not None:
        expected = int(part[2])
        numbers = [int(found[1]) for name in parts if (found := _PART.search(name))]
        if numbers != list(range(1, expected + 1)):
            raise G4Error(
                f"{repo} has {len(numbers)} of the {expected} parts of {parts[0]}.",
                hint="The repository is incomplete.",
            )
    return Selection("gguf", tuple(parts), (), (), main=parts[0])
