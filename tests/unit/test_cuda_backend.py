"""Which KV format `g4 export --target` chooses by itself: of the 31B, by the GPU's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.export import cuda_backend
from gemma4cli.export.cuda.model import Signature
from gemma4cli.model.config import Gemma4Config
from tests.support.gemma4_31b import config_dict
from tools.prebuild_programs import formats_of

CONTEXT, CHUNK = 131072, 512


def chosen(monkeypatch: pytest.MonkeyPatch, gib: float, kv: str = "auto") -> str:
    config = Gemma4Config.from_json(config_dict())
    formats = formats_of(config, "q4_k_m")
    monkeypatch.setattr(Signature, "of", lambda reader, spec, name: Signature(config, formats, spec, name))
    request: Any = SimpleNamespace(
        reader=None, kv=kv, vram=int(gib * 2**30), targets=("sm_86",),
        contract=SimpleNamespace(context_length=CONTEXT, prefill_chunk=CHUNK),
    )  # fmt: skip
    return cuda_backend.signature_of(request).kv_format


@pytest.mark.parametrize(("gib", "expected"), [(32, "folded"), (24, "folded-q8"), (22, "folded-tq4")])
def test_the_most_exact_that_fits(gib: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, gib) == expected


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(G4Error, match="131,072 tokens of context") as refusal:
        chosen(monkeypatch, 20)
    assert "shorter --ctx" in refusal.value.hint


def test_what_was_asked_for_is_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 32, "tq4") == "tq4"
    with pytest.raises(G4Error, match="the folded cache") as refusal:
        chosen(monkeypatch, 24, "folded")
    assert "--kv folded-tq4" in refusal.value.hint
