"""`g4 inspect-pte` on real exports: ours, and one made with plain ExecuTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import Tensor, nn

from gemma4cli.export.bundle import open_bundle
from gemma4cli.inspection.program import read_program
from tests.support.bundles import demo_bundle, tiny_bundle
from tests.support.mini_program import quiet
from tests.unit.test_inspect_program import assert_same

G4 = Callable[..., Any]
VIEWS = ("--methods", "--delegates", "--weights", "--state", "--memory")


def inspect(g4: G4, *arguments: str | Path) -> dict[str, Any]:
    outcome = g4("inspect-pte", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_demo_bundle(g4: G4) -> None:
    bundle = open_bundle(demo_bundle())
    document = inspect(g4, bundle.path, *VIEWS)
    assert document["overview"]["contract"] == {"problems": [], "runs": True}
    assert document["methods"]["constant_methods"] == bundle.contract.constant_methods()
    assert document["state"]["total_bytes"] == bundle.manifest.memory.kv_bytes
    full = bundle.manifest.kv["full"]
    assert document["state"]["bytes_per_token"] == full.bytes // full.slots
    assert document["state"]["fixed_bytes"] == bundle.manifest.kv["sliding"].bytes
    assert document["weights"]["total_bytes"] == bundle.manifest.memory.weight_bytes
    formats = {w["name"]: w["format"] for w in document["weights"]["weights"]}
    assert formats["model.layers.0.self_attn.q_proj"] == "int4 g32 min"
    assert formats["model.embed_tokens"] == "int8 g32"
    assert None not in formats.values(), "every tensor's format is known"
    assert {w["layer"] for w in document["weights"]["weights"]} == {None, *range(12)}
    assert document["delegates"]["outside"]["decode"]["g4::cpu_attention.out"] == 12
    now = document["memory"]["now"]
    assert abs(now["total"] - bundle.manifest.memory.total_bytes) < 0.03 * now["total"]


def test_the_demo_bundle_reads_as_executorch_reads_it() -> None:
    program = demo_bundle() / "model.pte"
    assert_same(read_program(program), program.read_bytes())


def test_drawings_fit_80_columns(g4: G4) -> None:
    lines = g4("inspect-pte", demo_bundle(), *VIEWS).out.splitlines()[1:]
    assert [line for line in lines if len(line) > 80] == []
    assert len(lines) > 100


def test_two_recipes_differ_in_weights_and_recipe(g4: G4) -> None:
    document = inspect(g4, tiny_bundle("none"), tiny_bundle("default"), "--diff")
    assert not document["same"]
    assert {"key": "model.recipe.name", "a": None, "b": "default"} in document["config"]
    assert {change["key"] for change in document["files"]} == {"model.pte", "weights.ptd"}
    added = [name for name in document["weights"]["added"] if "q_proj" in name]
    assert added and document["weights"]["unread_bytes"] == 0
    assert inspect(g4, tiny_bundle("none"), tiny_bundle("none"), "--diff")["same"]


class Plain(nn.Module):
    """Nothing of ours: two linear layers and a counter that is kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.second(torch.relu(self.first(x))) + self.calls


@pytest.mark.parametrize("delegated", [False, True], ids=["portable", "xnnpack"])
def test_a_program_made_with_plain_executorch(g4: G4, tmp_path: Path, delegated: bool) -> None:
    rows = torch.export.Dim("rows", min=1, max=6)
    with quiet():
        exported = torch.export.export(Plain().eval(), (torch.zeros(3, 16),), dynamic_shapes=({0: rows},))
        partitioner = [XnnpackPartitioner(configs=[LinearConfig])] if delegated else None
        lowered = to_edge_transform_and_lower(exported, partitioner=partitioner, constant_methods={"get_answer": 42})
        config = ExecutorchBackendConfig(emit_mutable_buffer_names=True)
        data = bytes(lowered.to_executorch(config).buffer)
    (tmp_path / "plain.pte").write_bytes(data)
    assert_same(read_program(tmp_path / "plain.pte"), data)

    document = inspect(g4, tmp_path / "plain.pte", *VIEWS)
    assert document["overview"]["contract"] is None
    assert document["methods"]["constant_methods"] == {"get_answer": 42}
    (method,) = document["methods"]["methods"]
    assert (method["inputs"][0]["shape"], method["inputs"][0]["is_dynamic"]) == ([6, 16], True)
    assert [(b["name"], b["shape"]) for b in document["state"]["buffers"]] == [("calls", [1])]
    shapes = [tuple(w["shape"]) for w in document["weights"]["weights"] if w["shape"]]
    assert {(32, 16), (8, 32), (32,), (8,)} <= {*shapes, *(shape[::-1] for shape in shapes)}
    (outside,) = document["delegates"]["outside"].values()
    if not delegated:
        assert document["delegates"]["delegates"] == []
        assert any("addmm" in name or "linear" in name for name in outside)
    else:
        graphs = [delegate["operators"] for delegate in document["delegates"]["delegates"]]
        assert sum(graph.get("FullyConnected", 0) for graph in graphs) == 2
        assert {delegate["backend"] for delegate in document["delegates"]["delegates"]} == {"XnnpackBackend"}
    check = g4("inspect-pte", tmp_path / "plain.pte", "--check-gpu", "a100")
    assert (check.code, "the program runs on the CPU" in check.out) == (1, True)
