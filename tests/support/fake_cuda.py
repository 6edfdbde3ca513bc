"""A CUDA bundle without a GPU: `CompiledEngine` over a library whose model is a checksum of what its ring holds.

Graphs replay what was captured into the same output tensors, so a token that the host reads too late is another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from gemma4cli.engine import compiled
from gemma4cli.export.contract import Contract
from gemma4cli.inspection.delegates import BlobWeight
from gemma4cli.model.settings import SamplingSettings

WINDOW, CHUNK, CONTEXT, VOCABULARY = 8, 6, 96, 1009
SLOTS = WINDOW + CHUNK - 1
_RING = "model.kv_cache.k"


def expected(tokens: Sequence[int], count: int, sampling: SamplingSettings) -> tuple[int, ...]:
    """What the model says, from all tokens, without caches."""
    read = list(tokens)
    for _ in range(count):
        last = len(read) - 1
        window = {p: read[p] for p in range(max(0, last - WINDOW + 1), last + 1)}
        read.append(_choose(window, sampling.temperature, sampling.seed))
    return tuple(read[len(tokens) :])


def _choose(window: Mapping[int, int], temperature: float, seed: int) -> int:
    noise = seed * 77 + max(window) * 31 if temperature > 0 else 0
    return (sum(token * (position + 1) for position, token in window.items()) + noise) % VOCABULARY


class FakeLibrary:
    """One method: writes positions into a ring of `SLOTS` and chooses by the window, the position and the seed."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._ring = torch.zeros(0)

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        self._ring = tensors[_RING]

    def run(self, inputs: Sequence[Tensor], outputs: int) -> list[Tensor]:
        ring, made = self._ring, [torch.zeros(1, dtype=torch.int64), torch.zeros(1, VOCABULARY)]

        def compute() -> None:
            tokens, positions, temperature, *_, seed = inputs
            for token, position in zip(tokens[0].tolist(), positions.tolist(), strict=True):
                ring[position % SLOTS] = token
            last = int(positions[-1])
            window = {p: int(ring[p % SLOTS]) for p in range(max(0, last - WINDOW + 1), last + 1)}
            made[0].fill_(_choose(window, float(temperature), int(seed)))
            made[1].zero_()[0, made[0]] = 1.0

        compute()
        self._device.capture = compute
        return made


class FakeGraph:
    """Keeps what was captured, and replays it."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.captured: Callable[[], None] | None = None

    def replay(self) -> None:
        assert self.captured is not None
        self._device.log.append("launch")
        self.captured()


class FakeEvent:
    """Logs that the host waited for something new."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._pending = False

    def record(self) -> None:
        self._pending = True

    def synchronize(self) -> None:
        if self._pending:
            self._device.log.append("wait")
        self._pending = False


@dataclass
class FakeDevice:
    """`log`: launches of graphs, and waits of the host for a token."""

    log: list[str] = field(default_factory=list)
    capture: Callable[[], None] | None = None

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> Self:
        """Take the place of torch.cuda and of what reads a bundle."""
        device = cls()

        @contextlib.contextmanager
        def graph(target: FakeGraph) -> Iterator[None]:
            yield
            target.captured = device.capture

        cuda: dict[str, Any] = {
            "CUDAGraph": lambda: FakeGraph(device),
            "Event": lambda: FakeEvent(device),
            "graph": graph,
            "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "get_device_capability": lambda *_: (9, 0),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
        ring = BlobWeight(_RING, None, "int64", (SLOTS,), 8 * SLOTS, "cpu")
        monkeypatch.setattr(compiled, "read_program", lambda path: None)
        monkeypatch.setattr(compiled, "_library_of", lambda program, method: (memoryview(b""), (ring,)))
        monkeypatch.setattr(compiled, "CompiledLibrary", lambda code, where: FakeLibrary(device))
        return device

    def engine(self) -> compiled.CompiledEngine:
        contract = Contract(CONTEXT, CHUNK, VOCABULARY, WINDOW, SLOTS, (1,), 2)
        bundle: Any = SimpleNamespace(contract=contract, program_for=lambda target: Path("model.pte"), weights=())
        return compiled.CompiledEngine(bundle, torch.device("cpu"))
