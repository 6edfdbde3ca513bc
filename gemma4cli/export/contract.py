"""The agreement between an exported program and whoever runs it: methods, tensors, constant methods.

This module is the one source. ``export`` builds programs from it, ``runner/contract.h`` repeats it in C++ (a test
compares the two), and the manifest of a bundle carries the values so that a mismatch is found before a program is
loaded. Imports no torch: commands read manifests with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma4cli.errors import G4Error

CONTRACT_VERSION = 1

PREFILL = "prefill"
DECODE = "decode"
METHODS = (PREFILL, DECODE)

MIN_PREFILL_TOKENS = 2
"""`prefill` takes 2 … prefill_chunk tokens, `decode` exactly 1: tracing fixes a dimension that may be 1."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: dtype "i64" or "f32"; a dimension is a number, "T" (tokens of a call) or "V" (vocabulary)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


INPUTS = (
    TensorSpec("tokens", "i64", (1, "T")),
    TensorSpec("input_pos", "i64", ("T",)),
    TensorSpec("temperature", "f32", (1,)),
    TensorSpec("top_k", "i64", (1,)),
    TensorSpec("top_p", "f32", (1,)),
    TensorSpec("min_p", "f32", (1,)),
    TensorSpec("seed", "i64", (1,)),
)

OUTPUTS = (
    TensorSpec("token", "i64", (1,)),
    TensorSpec("logits", "f32", (1, "V")),
)


@dataclass(frozen=True)
class Contract:
    """The values one program promises; each becomes a constant method of the `.pte`."""

    context_length: int
    prefill_chunk: int
    vocab_size: int
    window: int
    ring_slots: int
    eos_ids: tuple[int, ...]
    bos_id: int

    def constant_methods(self) -> dict[str, int | list[int]]:
        """Name and value of every constant method; a list stands for an i64 tensor of one dimension."""
        return {
            "g4_contract_version": CONTRACT_VERSION,
            "get_max_context_len": self.context_length,
            "get_max_prefill_chunk": self.prefill_chunk,
            "get_vocab_size": self.vocab_size,
            "get_window": self.window,
            "get_ring_slots": self.ring_slots,
            "get_eos_ids": list(self.eos_ids),
            "get_bos_id": self.bos_id,
        }

    def to_json(self) -> dict[str, Any]:
        return {"version": CONTRACT_VERSION, **asdict(self), "eos_ids": list(self.eos_ids)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Contract:
        """Read a manifest's ``contract``; raises ``G4Error`` naming what is missing, unknown or of another version."""
        values = dict(document)
        version = values.pop("version", None)
        if version != CONTRACT_VERSION:
            raise G4Error(
                f"The bundle follows method contract {version}; this g4 follows {CONTRACT_VERSION}.",
                hint="Export the model again with this version: g4 export",
            )
        names = set(cls.__dataclass_fields__)
        for problem, keys in (("lacks", names - set(values)), ("has the unknown key", set(values) - names)):
            if keys:
                raise G4Error(
                    f"The bundle's contract {problem} {', '.join(sorted(keys))}.",
                    hint="The manifest is damaged; export the model again: g4 export",
                )
        for name, value in values.items():
            numbers = value if name == "eos_ids" and isinstance(value, list) else [value]
            if not all(type(number) is int for number in numbers):
                raise G4Error(
                    f"The bundle's contract has {name} = {value!r} where whole numbers belong.",
                    hint="The manifest is damaged; export the model again: g4 export",
                )
        return cls(**{**values, "eos_ids": tuple(values["eos_ids"])})
