"""Whether a program follows g4's method contract, so that this g4 can run it."""

from __future__ import annotations

from gemma4cli.export.contract import CONTRACT_VERSION, DECODE, INPUTS, METHODS, OUTPUTS, TensorSpec
from gemma4cli.inspection.artifact import Artifact
from gemma4cli.inspection.program import Method

_VERSION_METHOD = "g4_contract_version"
_DTYPES = {"i64": "int64", "f32": "float32"}


def contract_problems(artifact: Artifact) -> list[str] | None:
    """Say why this g4 cannot run a program; empty when it can, None when the program is not g4's at all."""
    constants, program = artifact.constants, artifact.program
    if program is None or _VERSION_METHOD not in constants:
        return None
    version = constants[_VERSION_METHOD]
    if version != CONTRACT_VERSION:
        return [f"it follows method contract {version}, this g4 follows {CONTRACT_VERSION}"]
    problems = []
    sizes = {"T": constants.get("get_max_prefill_chunk"), "V": constants.get("get_vocab_size")}
    methods = {method.name: method for method in program.methods}
    for name in METHODS:
        if name not in methods:
            problems.append(f"it has no method {name}")
        else:
            problems += _signature_problems(methods[name], {**sizes, "T": 1} if name == DECODE else sizes)
    if artifact.manifest:
        for name, value in artifact.manifest.contract.constant_methods().items():
            if constants.get(name) != value:
                problems.append(f"{name} answers {constants.get(name)}, its manifest says {value}")
    return problems


def _signature_problems(method: Method, sizes: dict[str, int | None]) -> list[str]:
    problems = []
    for what, indices, specs in (("inputs", method.inputs, INPUTS), ("outputs", method.outputs, OUTPUTS)):
        if len(indices) != len(specs):
            problems.append(f"{method.name} has {len(indices)} {what} instead of {len(specs)}")
            continue
        for index, spec in zip(indices, specs, strict=True):
            value = method.values[index]
            expected = f"{_DTYPES[spec.dtype]} {list(_shape(spec, sizes))}"
            found = f"{value.value.dtype} {list(value.value.shape)}" if value.kind == "tensor" else value.kind
            if found != expected:
                problems.append(f"{method.name}'s {spec.name} is {found} instead of {expected}")
    return problems


def _shape(spec: TensorSpec, sizes: dict[str, int | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
