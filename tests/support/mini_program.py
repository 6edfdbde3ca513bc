"""A toy bundle that obeys the method contract, for tests of the runner: a few thousand weights.

One sliding and one full attention layer with real caches and `g4::cpu_attention`, a head delegated to XNNPACK, and a
sampler whose choice depends on every sampling input, so that a swapped or forgotten one is seen. `MiniModel` is also
the eager reference: the runner's tokens must equal `reference_tokens`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4cli.export.contract import Contract
from gemma4cli.kernels import cpu_attention

CONTEXT, WINDOW, CHUNK, VOCAB = 96, 8, 6, 64
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 32
RING_SLOTS = WINDOW + CHUNK - 1
CONTRACT = Contract(CONTEXT, CHUNK, VOCAB, WINDOW, RING_SLOTS, eos_ids=(1, 6), bos_id=2)

Sampling = tuple[float, int, float, float, int]
GREEDY: Sampling = (0.0, 0, 1.0, 0.0, 0)


class MiniAttention(nn.Module):
    def __init__(self, slots: int, window: int) -> None:
        super().__init__()
        self.slots, self.window = slots, window
        # Matrices and not nn.Linear: only the head is delegated, which keeps the export short.
        self.qkv = nn.Parameter(torch.empty(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
        self.out = nn.Parameter(torch.empty(HEADS * HEAD_DIM, HIDDEN))
        self.register_buffer("k_cache", torch.zeros(1, KV_HEADS, slots, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(1, KV_HEADS, slots, HEAD_DIM))

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        qkv = (x @ self.qkv).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        slot = input_pos % self.slots
        self.k_cache.index_copy_(2, slot, k)
        self.v_cache.index_copy_(2, slot, v)
        mixed = cpu_attention.attention(q, self.k_cache, self.v_cache, input_pos, self.window)
        return x + mixed.flatten(2) @ self.out


class MiniModel(nn.Module):
    """Input and output of the contract's `prefill` and `decode`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(20)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([MiniAttention(RING_SLOTS, WINDOW), MiniAttention(CONTEXT, 0)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.requires_grad_(False).eval()

    def forward(self, tokens: Tensor, input_pos: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
                min_p: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        frequencies = 0.05 * torch.arange(1, HIDDEN + 1)
        x = self.embedding(tokens) + torch.sin(input_pos[:, None] * frequencies)
        for layer in self.layers:
            x = layer(x, input_pos)
        logits = self.head(x[:, -1])
        phase = 0.7 * seed + 0.3 * top_k + 2.9 * top_p + 5.7 * min_p + input_pos[-1:]
        noise = torch.sin(phase[:, None] + torch.arange(VOCAB))
        return (logits + 300 * temperature * noise).argmax(-1), logits


def _inputs(tokens: Iterable[int], start: int, sampling: Sampling) -> tuple[Tensor, ...]:
    ids = torch.tensor([list(tokens)])
    temperature, top_k, top_p, min_p, seed = sampling
    return (ids, torch.arange(start, start + ids.shape[1]), torch.tensor([temperature]), torch.tensor([top_k]),
            torch.tensor([top_p]), torch.tensor([min_p]), torch.tensor([seed]))  # fmt: skip


def reference_tokens(prompt: Iterable[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """Return `count` tokens that follow `prompt`, one eager step per token on a fresh model."""
    model, known = MiniModel(), list(prompt)
    produced: list[int] = []
    for position in range(len(known) + count - 1):
        token, _ = model(*_inputs([known[position]], position, sampling))
        if position >= len(known) - 1:
            known.append(int(token))
            produced.append(int(token))
    return produced


@cache
def mini_program() -> bytes:
    """Return the bytes of the exported `.pte`, from `build/tests` when nothing that shapes it has changed since."""
    sources = [Path(__file__), Path(cpu_attention.__file__)]
    versions = [importlib.metadata.version(package) for package in ("torch", "executorch")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(versions).encode()).hexdigest()
    stored = Path(__file__).parents[2] / "build" / "tests" / f"mini-{key[:16]}.pte"
    stored.parent.mkdir(parents=True, exist_ok=True)
    with open(stored.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test workers exports, the others wait for it
        if not stored.exists():
            partial = stored.with_suffix(".partial")
            partial.write_bytes(_export())
            partial.rename(stored)
    return stored.read_bytes()


def _export() -> bytes:
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    model = MiniModel()
    length = torch.export.Dim("length", min=2, max=CHUNK)
    dynamic = ({1: length}, {0: length}, None, None, None, None, None)
    with quiet():
        methods = {
            "prefill": torch.export.export(model, _inputs(range(CHUNK), 0, GREEDY), dynamic_shapes=dynamic),
            "decode": torch.export.export(model, _inputs([0], 0, GREEDY)),
        }
        constants = {
            name: torch.tensor(value) if isinstance(value, list) else value
            for name, value in CONTRACT.constant_methods().items()
        }
        lowered = to_edge_transform_and_lower(
            methods,
            partitioner={name: [XnnpackPartitioner(configs=[LinearConfig])] for name in methods},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        plan = MemoryPlanningPass(share_mutable_buffers=True)
        config = ExecutorchBackendConfig(memory_planning_pass=plan, run_reinplace_pass=True)
        return bytes(lowered.to_executorch(config).buffer)


def write_mini_bundle(folder: Path, edit: Callable[[Any], None] | None = None) -> Path:
    """Write `folder`/model.pte; `edit` may change the program (an ExecuTorch schema object) first."""
    folder.mkdir(parents=True, exist_ok=True)
    program = mini_program()
    if edit is not None:
        from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

        parsed = deserialize_pte_binary(program)
        edit(parsed.program)
        program = bytes(serialize_pte_binary(parsed))
    (folder / "model.pte").write_bytes(program)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the lowering's warnings out of the test report; it prints some of them."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
