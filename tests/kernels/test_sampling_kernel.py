"""The sampling op on the CPU and in graphs, and every pass on every target."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gemma4cli.kernels.compile import compile_kernel
from gemma4cli.kernels.sampling import launch, passes, sample_cuda
from gemma4cli.kernels.sampling.configs import SAMPLE
from gemma4cli.kernels.targets import TARGETS, compiling_for, get_target
from gemma4cli.model.sampling import sample

VOCAB = 262144


def arguments(position: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(position)
    logits = torch.randn(1, 3000, generator=generator)
    return (logits, torch.tensor([position]), torch.tensor([1.0]), torch.tensor([64]), torch.tensor([0.95]),
            torch.tensor([0.0]), torch.tensor([7]))  # fmt: skip


def test_the_op_exports_as_one_node_and_samples_on_a_cpu() -> None:
    class Sampler(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return sample_cuda(*inputs)

    with compiling_for(get_target("sm_90")):
        program = torch.export.export(Sampler(), arguments(), strict=False)
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert nodes == ["g4.sample_cuda.default"]
    for position in range(5):
        assert torch.equal(program.module()(*arguments(position)), sample(*arguments(position)))


def test_a_graph_holds_four_launches_and_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch finds a kernel to write it copies first, unless it is fresh: that must be scratch memory alone."""
    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "_active", gpu)
    graph = make_fx(torch.func.functionalize(lambda *x: launch(SAMPLE["sm_90"], *x)), tracing_mode="fake")(*arguments())
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    launches = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    others = {str(node.target) for node in calls} - {str(node.target) for node in launches}
    assert len(launches) == 4
    assert others <= {"aten.empty.memory_format", "<built-in function getitem>"}
    inputs = {"logits_ptr", "position_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr"}
    written: list[str] = [name for node in launches for name in node.kwargs["tensors_to_clone"]]
    assert not inputs & set(written)
    assert len(written) == len(set(written))  # no pass changes what an earlier one wrote


@pytest.mark.parametrize("target_name", sorted(TARGETS))
def test_every_configuration_fits_its_target(target_name: str) -> None:
    target, config = TARGETS[target_name], SAMPLE[target_name]
    blocks = -(-VOCAB // config.block)
    kinds = {"logits": "fp32", "temperature": "fp32", "top_p": "fp32", "min_p": "fp32", "peak": "fp32", "mass": "fp32",
             "total": "fp32", "listed_score": "fp32", "drawn": "fp32", "bound": "fp32", "score": "fp32",
             "position": "i64", "top_k": "i64", "seed": "i64", "out": "i64"}  # fmt: skip
    common = {"V": "i32", "BLOCK": config.block, "BLOCKS": blocks, "PADDED": blocks, "EDGES": 1 << config.tally_bits,
              "BITS": config.search_bits}  # fmt: skip
    for name in ("peak", "tally", "gather", "finish"):
        kernel = getattr(passes, name)
        warps = config.finish_warps if name == "finish" else config.num_warps
        common["LANES"] = 32 * warps
        values = {
            parameter.name: common.get(parameter.name, "*" + kinds.get(parameter.name.removesuffix("_ptr"), "i32"))
            for parameter in kernel.params
        }
        code = compile_kernel(kernel, values, target, num_warps=warps, num_stages=3)
        assert code.shared_bytes <= target.shared_bytes_per_block, name
        assert code.local_bytes == 0, f"{name} spills {code.local_bytes} bytes a thread"
