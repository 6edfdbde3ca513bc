"""The profile of a step: every operator belongs to one group, and the groups are what the model is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma4cli.benchmark.plan import make_plan
from gemma4cli.benchmark.profile import GROUPS, Work, group_of_kernel, profile_steps, summarize
from gemma4cli.benchmark.subject import CheckpointSubject
from gemma4cli.errors import G4Error
from tests.support.tiny import write_checkpoint


def test_a_step_is_added_up() -> None:
    work = [
        Work("mm", "matvec", 0.2),
        Work("mm", "matvec", 0.1),
        Work("exp", "attention", 0.3),
        Work("add", "other", 0.1),
    ]
    step = summarize(work, seconds=1.0)
    assert step["groups"] == pytest.approx({"matvec": 0.3, "attention": 0.3, "norm": 0, "other": 0.1})
    assert step["gap_s"] == pytest.approx(0.3)
    assert step["launches"] == 4
    assert step["top"][0] == {"name": "mm", "group": "matvec", "count": 2, "seconds": pytest.approx(0.3)}


def test_a_model_is_taken_apart_by_its_modules(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    plan = make_plan(96, prompts=[20], gens=[4], depths=[0, 30], text=False, repeats=3)
    document = profile_steps(CheckpointSubject(folder, context=96), plan, None)
    assert [step["test"] for step in document["steps"]] == ["pp20", "tg4", "pp20 @ d30", "tg4 @ d30"]
    for step in document["steps"]:
        assert step["tokens"] == (1 if step["test"].startswith("tg") else 20)
        assert all(step["groups"][group] > 0 for group in GROUPS)
        assert sum(step["groups"].values()) + step["gap_s"] == pytest.approx(step["seconds"], rel=0.01)
    products = {(top["name"], top["group"]): top["count"] for step in document["steps"] for top in step["top"]}
    # 12 layers: q, k, o, gate, up, down, and v in the ten that do not share it with k; the head.
    assert products[("aten::mm", "matvec")] == 12 * 6 + 10 + 1
    assert ("aten::mm", "attention") not in products


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    from gemma4cli.benchmark.profile import _scopes
    from gemma4cli.engine.eager import EagerEngine

    model = EagerEngine.from_checkpoint(write_checkpoint(tmp_path / "tiny"), context_length=32).model
    inputs = torch.tensor([[5, 6, 7]]), torch.arange(3)
    with torch.no_grad():
        before = model(*inputs)
        with _scopes(model):
            inside = model(*inputs)
        after = model(*inputs)
    assert torch.equal(before, inside) and torch.equal(before, after)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.forward.__func__ is torch.nn.Linear.forward
    assert attention.attend.__name__ == "attend_to_filled"


@pytest.mark.parametrize(
    ("name", "group"),
    [("matvec", "matvec"), ("matvec_int8_3", "matvec"), ("quantize_rows", "matvec"), ("matmul", "matvec"),
     ("split", "attention"), ("combine_1", "attention"), ("attend", "attention"),
     ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_4", "norm"), ("triton_poi_fused_gelu_mul_2", "other"),
     ("peak", "other"), ("Memcpy DtoH", "other"), ("triton_poi_fused_split_with_sizes_1", "other")],
)  # fmt: skip
def test_kernels_of_compiled_programs_are_told_apart_by_name(name: str, group: str) -> None:
    assert group_of_kernel(name) == group


def test_a_compiled_model_has_no_modules_to_tell_apart(tmp_path: Path) -> None:
    subject = CheckpointSubject(write_checkpoint(tmp_path / "tiny"), compile=True, context=96)
    with pytest.raises(G4Error, match="--profile tells modules apart, which --compile fuses"):
        profile_steps(subject, make_plan(96), None)
