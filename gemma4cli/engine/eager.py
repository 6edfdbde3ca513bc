"""Run a checkpoint, plain or quantized, in PyTorch without any export: on a CPU or a GPU, compiled or not.

Quantized weights compute as what they stand for: the code times its scale, in the activation's dtype. Activations are
not quantized here (the CPU backend's exported program does that).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from gemma4cli.engine.base import Engine, Generation, GenerationRequest, TokenStream
from gemma4cli.engine.stepping import CachedTokens, Step, answer
from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.model.attention import attend
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.sampling import sample
from gemma4cli.model.settings import SamplingSettings
from gemma4cli.model.weights import build_model
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

    from gemma4cli.quant.checkpoint import Checkpoint

DEFAULT_PREFILL_CHUNK = 512
_SCORING_SESSION = "g4.logits"


@dataclass
class _Session(CachedTokens):
    """One conversation's caches."""

    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class EagerEngine(Engine):
    """A `Gemma4` in PyTorch, with one set of caches per session."""

    def __init__(self, model: Gemma4, *, compile: bool = False, load_s: float = 0.0) -> None:
        """Take a loaded model, whose own caches become the first session's.

        Args:
            compile: whether the model's step of one token goes through torch.compile; the first then takes a while.
        """
        self.model = model
        self._load_s = load_s
        self._sessions: dict[str, _Session] = {}
        self._device = model.model.embed_tokens.embed_scale.device
        # Without the sampler, whose unrolled bisections would be most of the compiler's work.
        self._decode: Callable[..., Tensor] = torch.compile(model) if compile else model

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        *,
        context_length: int,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        compile: bool = False,
        progress: Progress = SILENT,
    ) -> Self:
        """Load a plain or quantized checkpoint folder.

        Args:
            prefill_chunk: prompts are read in pieces of at most this many tokens.
            device: "cpu", "cuda" or "cuda:1".
            dtype: of activations, caches and plain weights; None is float32 on a CPU and bfloat16 on a GPU.
        Raises: G4Error for a checkpoint that is damaged, a context it does not have, or a device that is not there.
        """
        from gemma4cli.quant.checkpoint import open_checkpoint

        started = time.perf_counter()
        where = _device(device)
        dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        reader = open_checkpoint(path, progress)
        model = build_model(
            reader,
            CacheSpec(context_length, min(prefill_chunk, context_length), dtype),
            dtype,
            where,
            # Skipping the empty part of a cache costs a GPU a synchronization per layer, and a compiler its graph.
            attend=attend if compile or where.type != "cpu" else attend_to_filled,
            prepare=weight_form(reader, dtype, available_bytes(where), progress),
            progress=progress,
        )
        return cls(model, compile=compile, load_s=time.perf_counter() - started)

    @property
    def context_length(self) -> int:
        return self.model.cache.context_length

    @property
    def load_s(self) -> float:
        """Seconds it took to load the checkpoint."""
        return self._load_s

    def generate(self, request: GenerationRequest) -> Generation:
        self.check_fits(request)
        self._check_vocabulary(request.tokens)
        started = time.perf_counter()
        return Generation(lambda cancelled: self._answer(request, cancelled, started))

    def logits(self, tokens: Sequence[int], *, chunk: int | None = None) -> Iterator[np.ndarray]:
        """Read tokens from position 0 and yield float32 [n, V] blocks: for each token, what the model expects next.

        Args:
            chunk: tokens per step; None means as many as the caches allow.
        """
        self._check_vocabulary(tokens)
        session = self._open_session(_SCORING_SESSION)
        session.tokens.clear()
        session.written, session.owner = 0, object()
        step = min(chunk or self.model.cache.prefill_chunk, self.model.cache.prefill_chunk)
        for start in range(0, len(tokens), step):
            yield self._advance(session, tokens[start : start + step], last_only=False)[0].float().cpu().numpy()

    def close(self) -> None:
        self._sessions.clear()

    def _answer(self, request: GenerationRequest, cancelled: threading.Event, started: float) -> TokenStream:
        session = self._open_session(request.session)
        settings = _settings_tensors(request.sampling, self._device)
        cache, config = self.model.cache, self.model.config
        reused = session.rewind(request.tokens, _window(self.model), config.sliding_window + cache.prefill_chunk - 1)
        step = Step(
            lambda tokens, more: self._read(session, tokens, settings),
            self.context_length,
            cache.prefill_chunk,
            self._load_s,
            lambda: torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None,
        )
        return (yield from answer(request, session, reused, step, cancelled, started))

    def _check_vocabulary(self, tokens: Sequence[int]) -> None:
        if not all(0 <= token < self.model.config.vocab_size for token in tokens):
            raise G4Error(
                f"The prompt has a token outside the vocabulary of {self.model.config.vocab_size}.",
                hint="The tokenizer belongs to another model.",
            )

    def _open_session(self, name: str) -> _Session:
        if name not in self._sessions:
            caches = list(self.model.kv_caches())
            fresh = [(cache.k, cache.v) for cache in caches]
            if self._sessions:
                fresh = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in fresh]
            self._sessions[name] = _Session(caches=fresh)
        return self._sessions[name]

    def _read(self, session: _Session, tokens: Sequence[int], settings: tuple[Tensor, ...] | None) -> Tensor:
        """Read tokens into a session's caches and choose the next one; without settings the most probable."""
        logits = self._advance(session, tokens)[:, -1]
        position = torch.tensor([len(session.tokens) - 1], device=self._device)
        return logits.argmax() if settings is None else sample(logits, position, *settings)

    @torch.no_grad()
    def _advance(self, session: _Session, tokens: Sequence[int], *, last_only: bool = True) -> Tensor:
        """Read tokens into a session's caches; returns logits [1, 1 or T, V]."""
        for cache, (k, v) in zip(self.model.kv_caches(), session.caches, strict=True):
            cache.k, cache.v = k, v
        start = len(session.tokens)
        end = start + len(tokens)
        # Before the step, so that an interrupted one counts as having overwritten what it might have.
        session.written = max(session.written, end)
        forward = self._decode if len(tokens) == 1 else self.model
        input_pos = torch.arange(start, end, device=self._device)
        logits = forward(torch.tensor([tokens], device=self._device), input_pos, last_only)
        session.tokens.extend(tokens)
        return logits


def attend_to_filled(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """`attend`, without the slots that no position has reached yet; the result is the same."""
    filled = int(input_pos[-1]) + 1
    return attend(q, k[:, :, :filled], v[:, :, :filled], input_pos, window)


def weight_form(
    reader: Checkpoint, dtype: torch.dtype, available: int, progress: Progress = SILENT
) -> Callable[[str, Tensor], Tensor]:
    """Choose how quantized weights are held: as values when half of the `available` bytes suffice, else as codes.

    Values are computed once at load. Codes take a byte each and are turned into values in every step.

    Raises: G4Error when not even that fits.
    """
    from gemma4cli.quant.tensors import dequantize, int4_to_intx, is_quantized
    from gemma4cli.quant.torchao_types import Int4Tensor

    count = sum(torch.Size(shape).numel() for shape in reader.config.parameter_shapes().values())
    needed = count * dtype.itemsize
    as_values = needed <= available // 2
    least = count if reader.is_quantized else needed
    if least > available:
        raise G4Error(
            f"The weights need {format_bytes(least)}; {format_bytes(available)} are free.",
            hint="Export the model (g4 export) and run the bundle, which maps its weights from the disk.",
        )
    if reader.is_quantized and not as_values:
        progress.note(
            f"{format_bytes(needed)} of values would not fit into half of the {format_bytes(available)} free: "
            "quantized weights stay as codes, which is slower."
        )

    def prepare(name: str, tensor: Tensor) -> Tensor:
        if not is_quantized(tensor):
            return tensor
        if as_values:
            return dequantize(tensor, dtype)
        return (int4_to_intx(tensor) if isinstance(tensor, Int4Tensor) else tensor).to(dtype=dtype)

    return prepare


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _window(model: Gemma4) -> int:
    """Return the sliding window, 0 when every layer sees everything."""
    return max(model.config.layer(index).window for index in range(model.config.num_hidden_layers))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise G4Error(f"{name!r} is not a device.", hint="Use cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise G4Error(f"g4 does not run on {name!r}.", hint="Use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise G4Error(f"There is no GPU {name!r} on this machine.", hint="Use --device cpu.")
    return device


def _settings_tensors(sampling: SamplingSettings, device: torch.device) -> tuple[Tensor, ...] | None:
    """Return temperature, top_k, top_p, min_p and seed as `sample` takes them, each [1]; None for greedy."""
    if sampling.temperature == 0:
        return None
    floats, whole = torch.float32, torch.int64
    values = (
        (sampling.temperature, floats),
        (sampling.top_k, whole),
        (sampling.top_p, floats),
        (sampling.min_p, floats),
        (sampling.seed, whole),
    )
    return tuple(torch.tensor([value], dtype=dtype, device=device) for value, dtype in values)
