"""The C++ sampler inside an exported program draws what `model.sampling.sample` draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gemma4cli.export.cpu_lower import quiet
from gemma4cli.kernels import cpu_sampling
from gemma4cli.model.sampling import sample
from gemma4cli.native import load_kernels

VOCAB = 1000
DRAWS = 60

Sampler = Callable[..., Tensor]


class OneOperator(nn.Module):
    def forward(self, *arguments: Tensor) -> Tensor:
        return cpu_sampling.sample(*arguments)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Sampler]:
    """`g4::sample` as an exported program runs it."""
    from executorch.exir import EdgeCompileConfig, to_edge
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    load_kernels()
    with quiet():
        program = torch.export.export(OneOperator(), arguments(torch.zeros(1, VOCAB)), strict=False)
        edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
        buffer = edge.to_executorch().buffer  # read in place: it must live as long as the module
    module = _load_for_executorch_from_buffer(buffer)
    yield lambda *inputs: module.forward(inputs)[0]  # noqa: F821
    del module, buffer


def arguments(
    logits: Tensor, position: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (logits, torch.tensor([position]), torch.tensor([temperature]), torch.tensor([top_k]),
            torch.tensor([top_p]), torch.tensor([min_p]), torch.tensor([seed]))  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"temperature": 2.5, "top_k": 5},
        {"top_k": 1},
        {"top_k": VOCAB},
        {"top_p": 0.5},
        {"temperature": 1.5, "top_p": 0.95},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 64, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_are_those_of_the_definition(compiled: Sampler, settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn, expected = [], []
    for seed in range(DRAWS):
        logits = 4 * torch.randn(1, VOCAB, generator=generator)
        inputs = arguments(logits, position=17 * seed, seed=seed * 0x1234_5678_9ABC - 5, **settings)
        drawn.append(int(compiled(*inputs)))
        expected.append(int(sample(*inputs)))
    assert drawn == expected
    assert len(set(drawn)) > DRAWS // 2


def test_equal_logits_and_infinities(compiled: Sampler) -> None:
    flat = torch.zeros(1, VOCAB)
    spike = torch.full((1, VOCAB), -torch.inf)
    spike[0, 7] = torch.inf
    for seed in range(20):
        for logits in (flat, spike):
            inputs = arguments(logits, top_k=3, top_p=0.9, seed=seed)
            assert int(compiled(*inputs)) == int(sample(*inputs))
    assert int(compiled(*arguments(spike))) == 7
