"""How `g4 inspect-pte` draws its documents, within 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gemma4cli.console import Console
from gemma4cli.files import format_bytes
from gemma4cli.quant.manifest import describe_recipe

Document = dict[str, Any]

_WIDTH = 80
_LABEL = 14
_NAME = 34
_KERNEL = 26
_BUFFER = 30
_TENSOR = 36
_HASH = 12
_MOST_CHANGES = 30


def draw(console: Console, document: Document) -> None:
    """Draw the views that were asked for; the overview alone, or as their heading."""
    _overview(console, document["overview"])
    drawings = {
        "methods": _methods, "delegates": _delegates, "weights": _weights, "state": _state, "memory": _memory,
        "check": _check,
    }  # fmt: skip
    for name, drawing in drawings.items():
        if name in document:
            console.line()
            drawing(console, document[name])


def printable(text: object) -> str:
    """Make text from a file safe for a terminal: nothing that moves the cursor or rings a bell."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shorten(name: str, width: int = _NAME) -> str:
    """Cut the middle out of a long name; the end of a kernel's name tells it apart."""
    name = printable(name)
    if len(name) <= width:
        return name
    tail = width * 2 // 5
    return f"{name[: width - tail - 1]}…{name[-tail:]}"


def _fact(console: Console, label: str, value: str) -> None:
    lines = textwrap.wrap(printable(value), _WIDTH - _LABEL, break_on_hyphens=False) or [""]
    console.line(f"{label:{_LABEL}}{lines[0]}")
    for line in lines[1:]:
        console.line(" " * _LABEL + line)


def _overview(console: Console, o: Document) -> None:
    console.line(printable(f"{o['path']}: {o['kind']}, {format_bytes(o['bytes'])}"))
    if "model" in o:
        _provenance(console, o)
    if o["methods"]:
        _fact(console, "methods", ", ".join(o["methods"]))
    if o["backends"]:
        _fact(console, "delegates", ", ".join(f"{count} to {name}" for name, count in o["backends"].items()))
    if o["architectures"]:
        _fact(console, "GPU code", ", ".join(o["architectures"]))
    parts = o["sizes"]
    _fact(console, "sizes", ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size))
    if o["contract"]:
        problems = o["contract"]["problems"]
        _fact(console, "contract", "this g4 can run it" if not problems else "cannot run: " + "; ".join(problems))
    elif o["methods"]:
        _fact(console, "contract", "none: this is not a program for g4 run")
    if "files" in o:
        _fact(console, "checked", _checked(o))
        _fact(console, "quality", _quality(o["receipt"]))


def _provenance(console: Console, o: Document) -> None:
    source, recipe, totals = o["model"]["source"], o["model"]["recipe"], o["model"]["totals"]
    revision = f" at {source['revision'][:_HASH]}" if source["revision"] else ""
    _fact(console, "model", f"{source['name']}{revision}, {source['kind']}")
    largest = max(source["files"].items(), key=lambda item: item[1]["bytes"], default=None)
    if largest:
        sha256 = largest[1]["sha256"]
        _fact(console, "made from", f"{largest[0]}, {'sha256 ' + sha256[:_HASH] if sha256 else 'not hashed'}")
    bits = f"; {totals['bits_per_weight']:.2f} bits per weight" if totals else ""
    _fact(console, "recipe", f"{describe_recipe(recipe)}{bits}" if recipe else _without_recipe(source))
    if o["reencoded"]:
        worst = max(record["relative_error"] for record in o["reencoded"].values())
        _fact(console, "re-encoded", f"{len(o['reencoded'])} matrices, relative error up to {worst:.4f}")
    _fact(console, "context", f"{o['context_length']:,} tokens, read in chunks of up to {o['prefill_chunk']:,}")
    for kind, kv in o["kv"].items():
        layers = f"{_many(kv['layers'], 'layer')} of {kv['slots']:,} slots"
        _fact(console, f"{kind} cache", f"{format_bytes(kv['bytes'])} {kv['format']}, {layers}")
    targets = [target for target in o["targets"] if target != o["backend"]]
    shown = f"; below: {o['target']} (--target)" if len(targets) > 1 else ""
    _fact(console, "backend", ", ".join((o["backend"], *targets)) + shown)
    _fact(console, "built with", ", ".join(f"{name} {version}" for name, version in o["created_with"].items()))


def _without_recipe(source: Document) -> str:
    """Earlier versions kept none of a GGUF file whose weights were packed without a checkpoint in between."""
    return "not recorded: packed from a GGUF file" if source["kind"] == "gguf" else "none: not quantized"


def _checked(o: Document) -> str:
    rest = [name for name in o["files"] if name not in o["hashed"]]
    if not rest:
        return f"sizes and SHA-256 of all {len(o['files'])} files"
    return f"sizes of all {len(o['files'])} files, SHA-256 of {len(o['hashed'])}; not of {', '.join(rest)} (--verify)"


def _quality(receipt: Document | None) -> str:
    if receipt is None:
        return "not measured (g4 bench --quality --save-receipt)"
    if not receipt["is_current"]:
        return "measured on another export of this folder; measure again: g4 bench --quality --save-receipt"
    return (
        f"perplexity {receipt['perplexity']:.4g}, unquantized {receipt['reference_perplexity']:.4g}; "
        f"KL {receipt['kl_mean']:.4g} nats; top-1 agreement {receipt['top1_agreement']:.1%}; on {receipt['text']}"
    )


def _methods(console: Console, document: Document) -> None:
    for method in document["methods"]:
        console.line(f"{printable(method['name'])} ({_many(method['instructions'], 'instruction')})")
        rows = [
            (direction, shorten(value["name"]), value["dtype"], _shape(value), value["device"] or "")
            for direction, values in (("in", method["inputs"]), ("out", method["outputs"]))
            for value in values
        ]
        console.table(("", "name", "type", "shape", "device"), rows)
        planned = ", ".join(f"{format_bytes(b['nbytes'])} on {b['device']}" for b in method["memory"])
        if planned:
            console.line(f"planned memory: {planned}")
        console.line()
    if document["constant_methods"]:
        rows = [(shorten(name), _constant(value)) for name, value in document["constant_methods"].items()]
        console.table(("constant method", "value"), rows)


def _constant(value: object) -> str:
    return "(not read)" if value is None else shorten(str(value), _WIDTH - _NAME - 2)


def _shape(value: Document) -> str:
    if value["shape"] is None:
        return ""
    bound = "≤ " if value["is_dynamic"] else ""
    return f"{bound}{value['shape']}" + (f"  {value['range']}" if value["range"] else "")


def _delegates(console: Console, document: Document) -> None:
    groups = Counter((d["method"], d["backend"]) for d in document["delegates"])
    for (method, backend), count in groups.items():
        parts = [d for d in document["delegates"] if (d["method"], d["backend"]) == (method, backend)]
        size = sum(part["blob_bytes"] for part in parts)
        calls = sum(part["calls"] for part in parts)
        console.line(
            printable(
                f"{method}: {_many(count, 'delegate')} to {backend}, {_many(calls, 'call')}, {format_bytes(size)}"
            )
        )
        _fact(console, "  specs", _pairs(parts[0]["compile_specs"]) or "none")
        inside: Counter[str] = Counter()
        for part in parts:
            inside.update(part["operators"])
        if inside:
            _fact(console, "  operators", _counts(inside))
    for method, operators in document["outside"].items():
        _fact(console, f"{shorten(method, 12)}:", f"outside delegates: {_counts(operators) or 'nothing'}")
    for library in document["libraries"]:
        console.line()
        _library(console, library, document["limits"])


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _pairs(items: Document) -> str:
    return ", ".join(f"{key} = {value}" for key, value in items.items())


def _counts(counts: Document) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in ordered)


def _library(console: Console, library: Document, limits: Document) -> None:
    launches = "" if library["launches"] is None else f", {library['launches']:,} launches per call"
    console.line(
        f"library of {printable(', '.join(library['methods']))}: {format_bytes(library['bytes'])}, "
        f"{_many(len(library['kernels']), 'kernel')}{launches}"
    )
    ptx = [f"{version} (PTX)" for version in library["ptx"]]
    _fact(console, "compiled for", ", ".join((*library["architectures"], *ptx)) or "no GPU")
    if library["compressed_images"]:
        console.line(f"{_many(library['compressed_images'], 'kernel')} with compressed code, which is not read")
    rows = [
        (shorten(k["name"], _KERNEL), k["architecture"], _known(k["launches"]), k["registers"], k["local_bytes"],
         k["static_shared_bytes"], _known(k["dynamic_shared_bytes"]))
        for k in library["kernels"]
    ]  # fmt: skip
    if rows:
        console.table(("kernel", "for", "calls", "regs", "local", "static", "dynamic"), rows, align="llrrrrr")
    spilling = [kernel for kernel in library["kernels"] if kernel["local_bytes"]]
    worst = library["most_shared_memory"]
    if spilling:
        most = max(spilling, key=lambda kernel: kernel["local_bytes"])
        bound = f"up to {most['local_bytes']} bytes per thread ({shorten(most['name'])})"
        _fact(console, "local memory", f"{_many(len(spilling), 'kernel')}, {bound}")
    if worst:
        used = worst["static_shared_bytes"] + (worst["dynamic_shared_bytes"] or 0)
        bounds = ", ".join(f"{gpu} {used / limit:.0%}" for gpu, limit in limits.items())
        _fact(console, "most shared", f"{used:,} bytes per block ({shorten(worst['name'])}); of the limit: {bounds}")


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


def _weights(console: Console, document: Document) -> None:
    weights = document["weights"]
    roles: Counter[str] = Counter()
    for weight in weights:
        roles[weight["role"]] += weight["bytes"]
    console.line(f"{len(weights):,} tensors, {format_bytes(document['total_bytes'])}")
    rows = [(role, format_bytes(size), f"{size / max(1, document['total_bytes']):.1%}") for role, size in
            roles.most_common()]  # fmt: skip
    console.table(("role", "size", "share"), rows, align="lrr")
    for title, members in _by_layer(weights):
        console.line()
        console.line(f"{title}: {format_bytes(sum(weight['bytes'] for weight in members))}")
        _tensor_table(console, members)


def _by_layer(weights: list[Document]) -> Iterable[tuple[str, list[Document]]]:
    """Layers with the same tensors together, once; then everything that belongs to no layer."""
    layers: dict[int, list[Document]] = {}
    for weight in weights:
        if weight["layer"] is not None:
            layers.setdefault(weight["layer"], []).append(weight)
    groups: dict[Any, list[int]] = {}
    for layer in sorted(layers):
        signature = tuple(
            sorted((w["short_name"], str(w["format"]), str(w["shape"]), w["bytes"]) for w in layers[layer])
        )
        groups.setdefault(signature, []).append(layer)
    for numbers in groups.values():
        title = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {_ranges(numbers)}, each"
        yield title, layers[numbers[0]]
    rest = [weight for weight in weights if weight["layer"] is None]
    if rest:
        yield "outside the layers", rest


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 4 as 0-2, 4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _tensor_table(console: Console, weights: list[Document]) -> None:
    rows = [
        (shorten(w["short_name"], _TENSOR), w["format"] or "", "" if w["shape"] is None else str(w["shape"]),
         format_bytes(w["bytes"]))
        for w in weights
    ]  # fmt: skip
    console.table(("tensor", "format", "shape", "size"), rows, align="lllr")


def _state(console: Console, document: Document) -> None:
    buffers = document["buffers"]
    if not buffers:
        console.line("No buffers that live between calls are named in this program.")
        return
    groups: dict[Any, list[Document]] = {}
    for buffer in buffers:
        key = (buffer["dtype"], tuple(buffer["shape"]), buffer["device"], tuple(buffer["methods"]))
        groups.setdefault(key, []).append(buffer)
    rows = [
        (len(members), shorten(members[0]["name"], _BUFFER), members[0]["dtype"], str(members[0]["shape"]),
         format_bytes(sum(member["bytes"] for member in members)))
        for members in groups.values()
    ]  # fmt: skip
    console.table(("count", "first", "type", "shape", "in all"), rows, align="rlllr")
    console.line(f"in all: {format_bytes(document['total_bytes'])}")
    if document["bytes_per_token"] is not None:
        console.line(
            f"{document['bytes_per_token']:,} bytes per token for {document['context_length']:,} tokens, "
            f"and {format_bytes(document['fixed_bytes'])} fixed"
        )


def _memory(console: Console, document: Document) -> None:
    rows = document["by_context"] or [document["now"]]
    has_context = any(row["device_context"] for row in rows)
    columns = ["context", "weights", "caches", "workspace", *(["CUDA context"] if has_context else []), "in all"]
    keys = ["weights", "state", "workspace", *(["device_context"] if has_context else []), "total"]
    now = document["now"]["tokens"]
    lines = [
        (
            f"{_tokens(row['tokens'])}{'  ' if row['tokens'] != now else ' *' if now else ''}",
            *(format_bytes(row[key]) for key in keys),
        )
        for row in rows
    ]
    console.table(columns, lines, align="r" * len(columns))
    if document["by_context"]:
        console.line("* as exported; the others are for exports with that context")
    if document["context_of"]:
        console.line(f"The CUDA context is that of {document['context_of']}.")
    if not document["workspace_is_known"]:
        console.line("The workspace is a lower bound: what kernels allocate is not recorded.")


def _tokens(count: int | None) -> str:
    return "as is" if count is None else f"{count:,}"


def verdict(check: Document) -> str:
    """One word for --quiet."""
    return "fits" if check["fits"] else "does not fit"


def _check(console: Console, check: Document) -> None:
    gpu, use = check["gpu"], check["memory"]
    console.line(f"{printable(gpu['name'])}: {verdict(check)}")
    for problem in check["problems"]:
        _fact(console, "  problem", problem)
    if check["fits"]:
        _fact(console, "  memory", f"{format_bytes(use['total'])} of {format_bytes(gpu['memory_bytes'])}")
    worst = check["most_shared_memory"]
    if worst:
        used = worst["static_shared_bytes"] + (worst["dynamic_shared_bytes"] or 0)
        _fact(console, "  shared", f"up to {used:,} of {gpu['shared_bytes_per_block']:,} bytes per block")
    if check["longest_context"] is not None:
        _fact(console, "  context", f"its memory is enough for up to {check['longest_context']:,} tokens")
    for remark in check["remarks"]:
        _fact(console, "  unchecked", remark)


def draw_diff(console: Console, document: Document) -> None:
    """Draw the result of a comparison; long lists end with a count."""
    if document["same"]:
        console.line(
            "No differences." if not document["weights"]["unread_bytes"] else "No differences in what was read."
        )
    for name in ("config", "versions", "files", "methods"):
        changes = document[name]
        if changes:
            console.line(f"{name}: {_many(len(changes), 'difference')}")
            for change in changes[:_MOST_CHANGES]:
                _change(console, change["key"], change["a"], change["b"], name == "files")
            _more(console, changes)
    for name in ("kernels", "weights"):
        _sets(console, name, document[name])
    if document["weights"]["unread_bytes"]:
        console.line(
            f"{format_bytes(document['weights']['unread_bytes'])} of weights in files that differ were not read; "
            "--verify compares them."
        )


def _sets(console: Console, name: str, found: Document) -> None:
    for kind, sign in (("removed", "-"), ("added", "+")):
        for item in found[kind][:_MOST_CHANGES]:
            console.line(f"{sign} {name.removesuffix('s')} {shorten(item, _WIDTH - 12)}")
        _more(console, found[kind])
    if found["changed"]:
        console.line(f"{name}: {len(found['changed'])} differ")
    for change in found["changed"][:_MOST_CHANGES]:
        if "fields" in change:
            fields = {key: values for key, values in change["fields"].items() if key != "sha256"}
            text = "; ".join(f"{key} {a} → {b}" for key, (a, b) in fields.items()) or "other code"
            console.line(f"  {shorten(change['kernel'], _WIDTH - 4)}")
            console.line(f"    {printable(text)}")
        elif change["a"] == change["b"]:
            console.line(f"  {shorten(change['weight'], _WIDTH - 18)}: {change['a']}")
        else:
            _change(console, change["weight"], change["a"], change["b"], False)
    _more(console, found["changed"])


def _change(console: Console, key: str, a: object, b: object, is_hash: bool) -> None:
    left, right = (("none" if v is None else str(v)[:_HASH] if is_hash else str(v)) for v in (a, b))
    line = f"  {printable(key)}: {printable(left)} → {printable(right)}"
    if len(line) <= _WIDTH:
        console.line(line)
        return
    console.line(f"  {shorten(key, _WIDTH - 3)}:")
    console.line(f"    {shorten(left, _WIDTH - 6)}")
    console.line(f"  → {shorten(right, _WIDTH - 6)}")


def _more(console: Console, items: list[Any]) -> None:
    if len(items) > _MOST_CHANGES:
        console.line(f"  … and {len(items) - _MOST_CHANGES} more (--json lists all)")
