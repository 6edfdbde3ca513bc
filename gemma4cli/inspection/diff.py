"""How two artifacts differ: configuration, versions, files, methods, kernels, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma4cli.inspection import documents
from gemma4cli.inspection.artifact import Artifact, file_hashes
from gemma4cli.inspection.weights import Weight, list_weights
from gemma4cli.progress import SILENT, Progress

Document = dict[str, Any]

READ_WITHOUT_ASKING_BYTES = 1 << 30
"""Up to so many bytes of weights are compared byte by byte; more only when asked for."""

_CHUNK_BYTES = 8 << 20
_CONFIG = ("model", "backend", "targets", "architectures", "context_length", "prefill_chunk", "kv", "contract")


def compare(a: Artifact, b: Artifact, *, contents: bool = False, progress: Progress = SILENT) -> Document:
    """Compare two artifacts; `contents` reads weights however large they are.

    The manifest's hashes are trusted: files with the same hash are not read.
    """
    left, right = documents.overview(a), documents.overview(b)
    hashes = file_hashes(a, progress), file_hashes(b, progress)
    found: Document = {
        "a": str(a.path),
        "b": str(b.path),
        "config": changes(_config(left), _config(right)),
        "versions": changes(left.get("created_with", {}), right.get("created_with", {})),
        "files": changes(*hashes),
        "methods": changes(_methods(a), _methods(b)),
        "kernels": _compare_kernels(a, b),
        "weights": _compare_weights(a, b, hashes, contents, progress),
    }
    lists = [found[key] for key in ("config", "versions", "files", "methods")]
    lists += [found[key][kind] for key in ("kernels", "weights") for kind in ("added", "removed", "changed")]
    return {**found, "same": not any(lists)}


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Document]:
    """List keys whose values differ; an absent one counts as None."""
    keys = list(dict.fromkeys((*a, *b)))
    return [{"key": key, "a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key)]


def _config(overview: Document) -> Document:
    flat = _flatten({key: overview[key] for key in _CONFIG if key in overview})
    return {key: value for key, value in flat.items() if not key.startswith("model.source.files.")}


def _flatten(value: Any, prefix: str = "") -> Document:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: Document = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _methods(artifact: Artifact) -> Document:
    """Method -> its inputs, outputs and operators; constant methods with their values."""
    listed = documents.methods(artifact)
    operators = documents.delegates(artifact)["outside"]
    flat = {f"{name}()": value for name, value in listed["constant_methods"].items()}
    for method in listed["methods"]:
        for value in (*method["inputs"], *method["outputs"]):
            flat[f"{method['name']} {value['name']}"] = f"{value['dtype']} {value['shape']} {value['device']}"
        for name, count in operators[method["name"]].items():
            flat[f"{method['name']} calls {name}"] = count
    return flat


def _compare_kernels(a: Artifact, b: Artifact) -> Document:
    left, right = _kernels(a), _kernels(b)
    changed = []
    for key in left.keys() & right.keys():
        fields = {f: [left[key][f], right[key][f]] for f in left[key] if left[key][f] != right[key][f]}
        if fields:
            changed.append({"kernel": key, "fields": fields})
    return {
        "added": sorted(right.keys() - left.keys()),
        "removed": sorted(left.keys() - right.keys()),
        "changed": sorted(changed, key=lambda change: change["kernel"]),
    }


def _kernels(artifact: Artifact) -> dict[str, Document]:
    return {
        f"{', '.join(library['methods'])} {kernel['name']} {kernel['architecture']}": kernel
        for library in documents.delegates(artifact)["libraries"]
        for kernel in library["kernels"]
    }


def _compare_weights(
    a: Artifact, b: Artifact, hashes: tuple[dict[str, str], dict[str, str]], contents: bool, progress: Progress
) -> Document:
    left, right = ({weight.name: weight for weight in list_weights(artifact)} for artifact in (a, b))
    both = [name for name in left if name in right]
    changed, doubtful = [], []
    for name in both:
        x, y = left[name], right[name]
        if (x.format, x.shape, x.nbytes) != (y.format, y.shape, y.nbytes):
            changed.append({"weight": name, "a": _describe(x), "b": _describe(y)})
        elif x.place and y.place and not (hashes[0].get(x.file) == hashes[1].get(y.file) and x.place == y.place):
            doubtful.append(name)
    doubtful_bytes = sum(left[name].nbytes for name in doubtful)
    read = contents or doubtful_bytes <= READ_WITHOUT_ASKING_BYTES
    if read:
        with progress.phase("compare weights", doubtful_bytes) as task:
            for name in doubtful:
                if not _equal(_bytes(a, left[name]), _bytes(b, right[name])):
                    changed.append({"weight": name, "a": "other values", "b": "other values"})
                task.advance(left[name].nbytes)
    return {
        "added": [name for name in right if name not in left],
        "removed": [name for name in left if name not in right],
        "changed": changed,
        "unread_bytes": 0 if read else doubtful_bytes,
    }


def _describe(weight: Weight) -> str:
    return f"{weight.format or 'bytes'} {list(weight.shape) if weight.shape is not None else ''} {weight.nbytes:,} B"


def _bytes(artifact: Artifact, weight: Weight) -> memoryview:
    files = [file for file in (artifact.program, *artifact.data_files) if file]
    file = next(file for file in files if file.path.name == weight.file)
    assert weight.place is not None
    return file.read(weight.place)


def _equal(a: memoryview, b: memoryview) -> bool:
    """Compare through copies of pieces, which is memcmp; memoryviews compare item by item."""
    return len(a) == len(b) and all(
        bytes(a[start : start + _CHUNK_BYTES]) == bytes(b[start : start + _CHUNK_BYTES])
        for start in range(0, len(a), _CHUNK_BYTES)
    )
