"""The method contract has one source, and its C++ copy says the same."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.export import contract as contract_module
from gemma4cli.export.contract import CONTRACT_VERSION, INPUTS, METHODS, MIN_PREFILL_TOKENS, OUTPUTS, Contract

RUNNER = Path(contract_module.__file__).parents[2] / "runner"
CONTRACT = Contract(4096, 256, 262144, 1024, 1279, eos_ids=(1, 106), bos_id=2)
CPP_DTYPES = {"i64": "Long", "f32": "Float"}
CPP_DIMENSIONS = {"T": "kTokensOfCall", "V": "kVocabulary"}


def cpp_tensors(name: str) -> list[tuple[str, str, list[str]]]:
    """Read (name, dtype, shape) of each TensorSpec in a table of contract.h."""
    header = (RUNNER / "contract.h").read_text()
    table = re.search(rf"{name}\{{\{{(.*?)\}}\}};", header, re.DOTALL)
    assert table is not None
    rows = re.findall(r'\{"(\w+)", ScalarType::(\w+), (\d), \{([^}]*)\}\}', table[1])
    return [(row, dtype, [d.strip() for d in shape.split(",")][: int(dims)]) for row, dtype, dims, shape in rows]


@pytest.mark.parametrize(("table", "specs"), [("kInputs", INPUTS), ("kOutputs", OUTPUTS)])
def test_header_lists_the_same_tensors(table: str, specs: tuple[contract_module.TensorSpec, ...]) -> None:
    ours = [
        (spec.name, CPP_DTYPES[spec.dtype], [CPP_DIMENSIONS.get(str(size), str(size)) for size in spec.shape])
        for spec in specs
    ]
    assert cpp_tensors(table) == ours


def test_header_has_the_same_numbers_and_methods() -> None:
    header = (RUNNER / "contract.h").read_text()
    constants = dict(re.findall(r"constexpr [\w* ]+? (k\w+) = (\S+?);", header))
    assert int(constants["kContractVersion"]) == CONTRACT_VERSION
    assert int(constants["kMinPrefillTokens"]) == MIN_PREFILL_TOKENS
    assert [constants["kPrefill"].strip('"'), constants["kDecode"].strip('"')] == list(METHODS)


def test_runner_reads_every_constant_method_and_no_other() -> None:
    source = (RUNNER / "contract.cpp").read_text()
    assert set(re.findall(r'"((?:get|g4)_\w+)"', source)) == set(CONTRACT.constant_methods())


def test_json_round_trip() -> None:
    assert Contract.from_json(CONTRACT.to_json()) == CONTRACT


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "follows method contract 2; this g4 follows 1"),
        ({"window": None}, "lacks window"),
        ({"heads": 4}, "has the unknown key heads"),
        ({"window": "1024"}, "has window = '1024' where whole numbers belong"),
        ({"bos_id": True}, "has bos_id = True where"),
        ({"eos_ids": [1, "x"]}, "has eos_ids"),
    ],
)
def test_damaged_contracts_are_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    document = {key: value for key, value in {**CONTRACT.to_json(), **change}.items() if value is not None}
    with pytest.raises(G4Error, match=re.escape(sentence)):
        Contract.from_json(document)


def test_constant_methods_carry_the_values() -> None:
    other = replace(CONTRACT, context_length=8, eos_ids=(7,))
    assert other.constant_methods()["get_max_context_len"] == 8
    assert other.constant_methods()["get_eos_ids"] == [7]
