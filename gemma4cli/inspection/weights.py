"""Every weight and every mutable buffer of an artifact, from names and layouts alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gemma4cli.inspection.artifact import Artifact, DelegatePart
from gemma4cli.inspection.files import Span
from gemma4cli.inspection.tensors import Tensor

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h|blk)\.(\d+)\.")
_STATE = re.compile(r"(?:^|[._])(?:[kv]_)?(?:kv_)?cache(?:[._]|$)")
# Role of a tensor: the first pattern that is found in its name.
_ROLES = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("constants", r"^g4\.|(?:^|\.)constants\."),
        ("embedding", r"embed_tokens|embedding|tok_embeddings"),
        ("positions", r"rotary|inv_freq|freqs"),
        ("norm", r"norm|layer_scalar"),
        ("attention", r"attn|attention|[qkvo]_proj|qkv|turboquant"),
        ("mlp", r"mlp|feed_forward|gate|up_proj|down_proj"),
        ("head", r"lm_head|(?:^|\.)(?:head|output)\."),
    )
)
_PACKED_PARTS = ("codes", "high", "sub", "step")
ROLES = ("embedding", "attention", "mlp", "norm", "head", "positions", "constants", "other")


@dataclass(frozen=True, slots=True)
class Weight:
    """One stored tensor. `format` is a data type or a quantized format, None where only the backend knows."""

    name: str
    format: str | None
    shape: tuple[int, ...] | None
    nbytes: int
    device: str
    file: str
    place: Span | None

    @property
    def layer(self) -> int | None:
        match = _LAYER.search(self.name)
        return int(match[1]) if match else None

    @property
    def role(self) -> str:
        return next((role for role, pattern in _ROLES if pattern.search(self.name)), "other")

    @property
    def short_name(self) -> str:
        """The name inside its layer."""
        return _LAYER.sub(".", self.name).removeprefix("model").removeprefix(".")


@dataclass(frozen=True, slots=True)
class StateBuffer:
    """A buffer that a program writes and keeps between calls; `methods` are those that use it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    device: str
    methods: tuple[str, ...]

    def bytes_per_token(self, context_length: int | None) -> int | None:
        """Bytes that grow with each token of context; 0 for a ring of fixed size, None when that is not known."""
        if context_length is None:
            return None
        return self.nbytes // context_length if context_length in self.shape else 0


def is_state(name: str) -> bool:
    """Whether a name is that of a cache: CUDA programs keep theirs among the weights."""
    return bool(_STATE.search(name))


def list_weights(artifact: Artifact) -> list[Weight]:
    """List every constant once, in the order of the files; caches are left out."""
    found: dict[str, Weight] = {}
    for part in {id(part.blob): part for part in artifact.delegates}.values():
        for weight in part.blob.weights:
            place = artifact.find(weight.key) if weight.key else None
            file, span = (place[0].path.name, place[1]) if place else (_program_name(artifact), None)
            if weight.key and place is None:
                file = "(not given)"
            label = weight.key or f"{part.method} {part.number} {weight.name}"
            found.setdefault(
                label, Weight(weight.name, weight.format, weight.shape, weight.nbytes, weight.device, file, span)
            )
    if artifact.program:
        for method in artifact.program.methods:
            if not method.is_constant:
                for tensor in method.tensors:
                    if tensor.is_constant:
                        _add_constant(artifact, tensor, found)
    libraries = {part.blob.library for part in artifact.delegates}
    for key, weight in _named(artifact):
        if key not in libraries:
            found.setdefault(key, weight)
    weights = [weight for weight in found.values() if not is_state(weight.name)]
    return sorted(weights, key=lambda w: (w.file, w.place.offset if w.place else -1))


def join_packed(weights: Iterable[Weight]) -> list[Weight]:
    """Show each packed matrix (`codes`, `high`, `sub`, `step`) as one tensor, where its codes were."""
    groups: dict[str, dict[str, Weight]] = {}
    for weight in weights:
        prefix, _, part = weight.name.rpartition(".")
        groups.setdefault(prefix, {})[part] = weight
    joined = []
    for prefix, group in groups.items():
        matrix = _packed_matrix(prefix, group)
        if matrix:
            joined.append(matrix)
        joined.extend(weight for part, weight in group.items() if not (matrix and part in _PACKED_PARTS))
    return joined


def _packed_matrix(name: str, group: Mapping[str, Weight]) -> Weight | None:
    """Put parts together if they are a matrix as in `kernels/quantized_matmul/format.py`; shapes tell the format."""
    parts = [group[part] for part in _PACKED_PARTS if part in group]
    codes, sub = group.get("codes"), group.get("sub")
    if not (codes and codes.shape and sub and sub.shape and "step" in group) or len(codes.shape) != 2:
        return None
    rows, words = codes.shape
    # A word has four codes of 8 bits, which are in groups of 32 always, or eight of 4, with 2 more bits beside or not.
    bits = 6 if "high" in group else 8 if 4 * words == 32 * sub.shape[1] else 4
    columns = words * (4 if bits == 8 else 8)
    minimum = " min" if len(sub.shape) == 3 else ""
    kind = f"int{bits} g{columns // max(1, sub.shape[1])}{minimum}"
    return replace(codes, name=name, format=kind, shape=(rows, columns), nbytes=sum(part.nbytes for part in parts))


def _add_constant(artifact: Artifact, tensor: Tensor, found: dict[str, Weight]) -> None:
    if tensor.is_external:
        place = artifact.find(tensor.name or "")
        file, span = (place[0].path.name, place[1]) if place else ("(not given)", None)
    else:
        file, start = _program_name(artifact), artifact.program.constants[tensor.data_index].offset
        span = Span(start, tensor.nbytes)
    label = tensor.name or f"constant {tensor.data_index}"
    found.setdefault(label, Weight(label, tensor.dtype, tensor.shape, tensor.nbytes, tensor.device, file, span))


def _named(artifact: Artifact) -> Iterable[tuple[str, Weight]]:
    if artifact.program:
        for key, span in artifact.program.named_data.items():
            yield key, Weight(key, None, None, span.size, "cpu", artifact.program.path.name, span)
    for file in artifact.data_files:
        for key, entry in file.entries.items():
            yield key, Weight(key, entry.dtype, entry.shape, entry.span.size, "cpu", file.path.name, entry.span)


def _program_name(artifact: Artifact) -> str:
    return artifact.program.path.name if artifact.program else artifact.path.name


def list_state(artifact: Artifact) -> list[StateBuffer]:
    """List mutable buffers: those a program plans for by name, and the caches of CUDA delegates."""
    found: dict[str, StateBuffer] = {}

    def add(methods: Iterable[str], name: str, kind: str, shape: tuple[int, ...], nbytes: int, device: str) -> None:
        known = found.get(name)
        together = tuple(dict.fromkeys((*(known.methods if known else ()), *methods)))
        found[name] = StateBuffer(name, kind, shape, nbytes, device, together)

    for method in artifact.program.methods if artifact.program else ():
        for tensor in method.tensors:
            if tensor.is_state:
                name = tensor.name or f"buffer at {tensor.memory[0]}:{tensor.memory[1]}"
                add([method.name], name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.device)
    users: dict[int, list[DelegatePart]] = {}
    for part in artifact.delegates:
        users.setdefault(id(part.blob), []).append(part)
    for parts in users.values():
        methods = list(dict.fromkeys(part.method for part in parts))
        for weight in parts[0].blob.weights:
            if is_state(weight.name):
                add(methods, weight.name, weight.format, weight.shape or (), weight.nbytes, weight.device)
    return list(found.values())
