"""What `g4 export --verify` takes for wrong; the comparison itself needs a GPU (docs/cuda-export.md has its results)."""

from __future__ import annotations

import pytest
import torch

from gemma4cli.commands.export import require_own_target
from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.verify import _compare, _judge

THEIRS = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))


def noise(scale: float) -> torch.Tensor:
    return scale * torch.randn(THEIRS.shape, generator=torch.Generator().manual_seed(1))


def test_rounding_passes_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    steps = list(zip(THEIRS + noise(0.01), THEIRS, strict=True))
    for ours, theirs in steps:
        _compare(ours, theirs, 1)
    report = _judge(steps, 0, 900)
    assert (report.decoded_tokens, report.prefilled_tokens) == (64, 900)
    assert report.equal_tokens > 58
    assert 0.999 < report.worst_cosine < 1
    assert report.worst_error == pytest.approx(noise(0.01).abs().max().item(), rel=1e-3)


@pytest.mark.parametrize("wrong", [THEIRS[0].roll(1), -THEIRS[0], THEIRS[0] * torch.nan, THEIRS[0] + noise(0.2)[0]])
def test_other_logits_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(G4Error, match=r"after 7 tokens its logits have cosine"):
        _compare(wrong, THEIRS[0], 7)


def test_other_tokens_are_refused() -> None:
    ours = THEIRS.clone()
    ours[:10, 3] = 100.0
    with pytest.raises(G4Error, match=r"it chooses 54 of 64 tokens"):
        _judge(list(zip(ours, THEIRS, strict=True)), 0, 900)


def test_an_export_for_other_gpus_is_refused_beforehand() -> None:
    require_own_target("sm_80,sm_90", "sm_90")
    with pytest.raises(G4Error, match="this machine's GPU, which takes sm_90; the export is for sm_80,sm_120") as error:
        require_own_target("sm_80,sm_120", "sm_90")
    assert error.value.hint == "Add it: --target sm_80,sm_120,sm_90"
