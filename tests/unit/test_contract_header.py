"""runner/contract.h repeats export/contract.py in C++: they must say the same."""

from __future__ import annotations

import re
from pathlib import Path

from gemma4cli.export import contract

HEADER = (Path(__file__).parents[2] / "runner" / "contract.h").read_text()
SOURCE = (Path(__file__).parents[2] / "runner" / "contract.cpp").read_text()
DIMENSIONS = {"kTokensOfCall": "T", "kVocabulary": "V"}
DTYPES = {"Long": "i64", "Float": "f32"}


def constant(name: str) -> str:
    match = re.search(rf"constexpr .*\b{name} = ([^;]+);", HEADER)
    assert match is not None, name
    return match.group(1).strip('"')


def tensors(table: str) -> tuple[contract.TensorSpec, ...]:
    body = HEADER.split(f"{table}{{{{")[1].split("}};")[0]
    specs = []
    for name, dtype, dims, shape in re.findall(r'\{"(\w+)", ScalarType::(\w+), (\d), \{([^}]+)\}\}', body):
        sizes = [DIMENSIONS.get(size, size) for size in shape.split(", ")][: int(dims)]
        specs.append(contract.TensorSpec(name, DTYPES[dtype], tuple(s if s in "TV" else int(s) for s in sizes)))
    return tuple(specs)


def test_version_methods_and_tensors_are_the_same() -> None:
    assert int(constant("kContractVersion")) == contract.CONTRACT_VERSION
    assert int(constant("kMinPrefillTokens")) == contract.MIN_PREFILL_TOKENS
    assert (constant("kPrefill"), constant("kDecode")) == contract.METHODS
    assert tensors("kInputs") == contract.INPUTS
    assert tensors("kOutputs") == contract.OUTPUTS


def test_every_constant_method_is_read_and_no_other() -> None:
    values = contract.Contract(1, 2, 3, 0, 0, (1,), 0).constant_methods()
    read = set(re.findall(r'(?:read|read_number|require_method)\((?:program, )?(?:read, )?"(\w+)"', SOURCE))
    assert read == set(values)
