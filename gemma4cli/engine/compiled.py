"""Run a CUDA bundle inside PyTorch: the libraries out of the `.pte`, the weights out of the `.ptd`.

A compiled library speaks AOTInductor's C interface both ways: it exports `AOTInductorModelContainer*` and asks its host
for `aoti_torch_*`, which ExecuTorch's CUDA delegate implements and libtorch does too. So PyTorch can host what
ExecuTorch would run: that is how `g4 export --verify` checks an artifact, and how a machine without ExecuTorch's CUDA
delegate runs one. No Python of the model is involved, and decoding is one CUDA graph, launched for the next token
before this one has reached the host.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from gemma4cli.engine.base import Engine, Generation, GenerationRequest, TokenStream
from gemma4cli.engine.stepping import CachedTokens, Read, Step, answer
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import Bundle, open_bundle
from gemma4cli.export.contract import DECODE, METHODS, PREFILL
from gemma4cli.inspection.delegates import CUDA, BlobWeight, read_blob
from gemma4cli.inspection.program import Program, read_program
from gemma4cli.inspection.ptd import DataFile, read_data_file
from gemma4cli.kernels.targets import target_for_capability
from gemma4cli.model.settings import GREEDY, SamplingSettings
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

_HOST_LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libc10_cuda.so", "libtorch_cuda.so")
_STATE = ".kv_cache."
_SCORING_SESSION = "g4.logits"


class _Entry(ctypes.Structure):
    """`AOTInductorConstantMapEntry`."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


class CompiledLibrary:
    """One method's library with a container of its own."""

    def __init__(self, code: memoryview, device: torch.device) -> None:
        """Load a library for `device`. Raises: G4Error when the library does not load or the GPU cannot run it."""
        for name in _HOST_LIBRARIES:
            # The library was linked without its host, which therefore has to be visible to it.
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(code)
            file.flush()
            try:
                self._library = ctypes.CDLL(file.name)
            except OSError as error:
                raise G4Error(
                    f"The bundle's compiled code does not load: {error}.", hint="Export again: g4 export"
                ) from None
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), str(device).encode(), None)
        self.constants = self._constants()
        self._bound: list[Tensor] = []

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the library read, and write, these tensors: by name, all of its constants."""
        entries = (_Entry * len(self.constants))()
        bound = [tensors[name] for name in self.constants.values()]
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(bound)
        for entry, name, handle in zip(entries, self.constants, handles, strict=True):
            entry.name, entry.handle = name.encode(), _pointer(handle)
        self._call("UpdateUserManagedConstantBufferPairs", self._container, entries, ctypes.c_size_t(len(entries)),
                   ctypes.c_bool(False), ctypes.c_bool(True))  # fmt: skip
        self._bound = bound  # the library holds addresses only

    def run(self, inputs: Sequence[Tensor], outputs: int) -> list[Tensor]:
        """Run on the current stream; may be captured into a CUDA graph after a first run."""
        # The library takes its inputs' handles over and hands its outputs' over.
        given = (ctypes.c_void_p * len(inputs))(
            *map(_pointer, torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs)))
        )
        made = (ctypes.c_void_p * outputs)()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("RunSingleThreaded", self._container, given, ctypes.c_size_t(len(inputs)), made,
                   ctypes.c_size_t(outputs), stream, None)  # fmt: skip
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(pointer) for pointer in made])

    def _constants(self) -> dict[str, str]:
        """Map the library's own name of each constant to its name in the weights file."""
        count = ctypes.c_size_t()
        self._call("GetNumConstants", self._container, ctypes.byref(count))
        names = {}
        for index in range(count.value):
            own, original = ctypes.c_char_p(), ctypes.c_char_p()
            self._call("GetConstantName", self._container, ctypes.c_size_t(index), ctypes.byref(own))
            self._call("GetConstantOriginalFQN", self._container, ctypes.c_size_t(index), ctypes.byref(original))
            names[own.value.decode()] = original.value.decode()
        return names

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{function}")(*arguments):
            raise RuntimeError(f"AOTInductorModelContainer{function} failed; its reason is on stderr")


def _pointer(handle: Any) -> int | None:
    """Return the address inside a PyCapsule, as torch hands void pointers out."""
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    return ctypes.pythonapi.PyCapsule_GetPointer(handle, None)


def _capsule(pointer: int) -> Any:
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return ctypes.pythonapi.PyCapsule_New(pointer, None, None)


class _HostToken:
    """A place in pinned memory for a token from the device; `int` of it waits until the token is there."""

    def __init__(self) -> None:
        self._place = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._there = torch.cuda.Event()

    def copy(self, token: Tensor) -> Self:
        """Have a token copied when its step has run; what was copied here before must not be wanted any more.

        Waits for that earlier copy, so steps whose tokens nobody waits for cannot queue up either.
        """
        self._there.synchronize()
        self._place.copy_(token, non_blocking=True)
        self._there.record()
        return self

    def __int__(self) -> int:
        self._there.synchronize()
        return int(self._place)


def _two_places() -> Iterator[_HostToken]:
    """Take turns, so that one token can be read on the host while the next step's is being copied."""
    return itertools.cycle((_HostToken(), _HostToken()))


@dataclass
class _Session(CachedTokens):
    """One conversation's caches, and the graph of a decoding step that was captured over them."""

    state: dict[str, Tensor] = field(default_factory=dict)
    graph: torch.cuda.CUDAGraph | None = None
    token: Tensor | None = None
    logits: Tensor | None = None
    places: Iterator[_HostToken] = field(default_factory=_two_places)


class CompiledEngine(Engine):
    """A CUDA bundle on a GPU, hosted by PyTorch, with one set of caches per session."""

    def __init__(self, bundle: Bundle, device: torch.device, progress: Progress = SILENT) -> None:
        """Load the bundle's program for this GPU, and its weights."""
        started = time.perf_counter()
        self.contract, self._device = bundle.contract, device
        program = read_program(bundle.program_for(target_for_capability(torch.cuda.get_device_capability(device)).name))
        data = [read_data_file(path) for path in bundle.weights]
        self._libraries, wanted = {}, {}
        for method in METHODS:
            code, weights = _library_of(program, method)
            self._libraries[method] = CompiledLibrary(code, device)
            wanted |= {weight.name: weight for weight in weights}
        self._state = {name: weight for name, weight in wanted.items() if _STATE in name}
        self._weights = _load({n: w for n, w in wanted.items() if n not in self._state}, data, device, progress)
        self._inputs = _DecodeInputs.on(device)
        self._sessions: dict[str, _Session] = {}
        self._current: _Session | None = None
        self._load_s = time.perf_counter() - started

    @classmethod
    def from_bundle(cls, path: Path, progress: Progress = SILENT) -> Self:
        """Open a bundle on the first GPU. Raises: G4Error without a GPU, or for a bundle that is not for it."""
        if not torch.cuda.is_available():
            raise G4Error(
                "PyTorch sees no GPU here, and this bundle needs one.",
                hint="Run it where one is, or export for the CPU: g4 export --backend cpu",
            )
        return cls(open_bundle(path, progress=progress), torch.device("cuda", torch.cuda.current_device()), progress)

    @property
    def context_length(self) -> int:
        return self.contract.context_length

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Everything the libraries read that is no cache, on the device, by its name in the weights file."""
        return self._weights

    @property
    def load_s(self) -> float:
        """Seconds it took to load the bundle."""
        return self._load_s

    def generate(self, request: GenerationRequest) -> Generation:
        self.check_fits(request)
        if not all(0 <= token < self.contract.vocab_size for token in request.tokens):
            raise G4Error(
                f"The prompt has a token outside the vocabulary of {self.contract.vocab_size}.",
                hint="The tokenizer belongs to another model.",
            )
        started = time.perf_counter()
        return Generation(lambda cancelled: self._answer(request, cancelled, started))

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # a step ahead may still run
        self._sessions.clear()
        self._weights.clear()

    def logits(self, tokens: Sequence[int], *, chunk: int | None = 1) -> Iterator[np.ndarray]:
        """Read tokens from position 0 and yield float32 [1, V] rows: after each chunk, what the model expects next.

        Args:
            chunk: tokens per step; only with 1 is there a row for every token.
        """
        self._sessions.pop(_SCORING_SESSION, None)
        step = min(chunk or self.contract.prefill_chunk, self.contract.prefill_chunk)
        for start in range(0, len(tokens), step):
            _, row = self.step(_SCORING_SESSION, tokens[start : start + step], GREEDY)
            yield row.float().cpu().numpy()

    def step(self, session: str, tokens: Sequence[int], sampling: SamplingSettings) -> tuple[Tensor, Tensor]:
        """Read tokens after what the session holds; returns (token [1] i64, logits [1, V] f32) on the device.

        The results stay valid until the session's next step.
        """
        held = self._open(session)
        if len(tokens) == 1:
            token, logits = self._decode(held, tokens[0], sampling)
        else:
            token, logits = self._prefill(held, tokens, sampling)
        held.tokens.extend(tokens)
        return token, logits

    def _prefill(self, held: _Session, tokens: Sequence[int], sampling: SamplingSettings) -> list[Tensor]:
        start = len(held.tokens)
        end = start + len(tokens)
        held.written = max(held.written, end)
        positions = torch.arange(start, end, device=self._device)
        inputs = (torch.tensor([list(tokens)], device=self._device), positions, *_settings(sampling, self._device))
        return self._libraries[PREFILL].run(inputs, 2)

    def _decode(self, held: _Session, token: int | Tensor, sampling: SamplingSettings) -> tuple[Tensor, Tensor]:
        """Launch the step that reads a token, on the host or on the device, after what the session holds."""
        position = len(held.tokens)
        held.written = max(held.written, position + 1)
        self._inputs.set(token, position, sampling)
        if held.graph is None:
            library, inputs = self._libraries[DECODE], self._inputs.tensors
            # The first run loads the kernels, which a capture may not; what it writes, the replay writes again.
            library.run(inputs, 2)
            torch.cuda.synchronize(self._device)
            held.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(held.graph):
                held.token, held.logits = library.run(inputs, 2)
        held.graph.replay()
        return held.token, held.logits

    def _answer(self, request: GenerationRequest, cancelled: threading.Event, started: float) -> TokenStream:
        held = self._open(request.session)
        contract = self.contract
        reused = held.rewind(request.tokens, contract.window, contract.ring_slots)
        step = Step(
            self._reader(held, request),
            contract.context_length,
            contract.prefill_chunk,
            self._load_s,
            lambda: torch.cuda.max_memory_allocated(self._device),
        )
        return (yield from answer(request, held, reused, step, cancelled, started))

    def _reader(self, held: _Session, request: GenerationRequest) -> Read:
        """Return how an answer reads: one step ahead, so that the device never waits for the host."""
        token: Tensor  # the last step's, on the device, where other sessions leave it alone
        ahead: _HostToken | None = None  # the same on its way to the host, when its step has not been asked for

        def read(tokens: Sequence[int], more: bool) -> _HostToken:
            nonlocal token, ahead
            chosen, ahead = ahead, None
            if chosen is None:
                token, _ = self.step(request.session, tokens, request.sampling)
                chosen = next(held.places).copy(token)
            else:
                held.tokens.extend(tokens)
            if more:
                token, _ = self._decode(held, token, request.sampling)
                ahead = next(held.places).copy(token)
            return chosen

        return read

    def _open(self, name: str) -> _Session:
        if name not in self._sessions:
            state = {
                fqn: torch.zeros(weight.shape, dtype=getattr(torch, weight.format), device=self._device)
                for fqn, weight in self._state.items()
            }
            self._sessions[name] = _Session(state=state)
        held = self._sessions[name]
        if held is not self._current:
            for library in self._libraries.values():
                library.bind(self._weights | held.state)
            self._current = held
        return held


@dataclass
class _DecodeInputs:
    """The inputs of `decode` at fixed addresses, as the CUDA graphs of all sessions read them.

    Every step sets what differs from the last one's, in the order of the stream: a step in flight keeps its own.
    """

    tensors: tuple[Tensor, ...]
    sampling: SamplingSettings | None = GREEDY

    @classmethod
    def on(cls, device: torch.device) -> Self:
        tokens, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return cls(tuple(t.to(device) for t in (tokens, position, *_settings(GREEDY, torch.device("cpu")))))

    def set(self, token: int | Tensor, position: int, sampling: SamplingSettings) -> None:
        tokens, positions, *settings = self.tensors
        if isinstance(token, Tensor):
            tokens.copy_(token)
        else:
            tokens.fill_(token)
        positions.fill_(position)
        if sampling != self.sampling:
            self.sampling = None  # an interruption leaves a part of each
            for tensor, value in zip(settings, _values(sampling), strict=True):
                tensor.fill_(value)
            self.sampling = sampling


def _values(sampling: SamplingSettings) -> tuple[float, int, float, float, int]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed


def _settings(sampling: SamplingSettings, device: torch.device) -> tuple[Tensor, ...]:
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64)
    return tuple(torch.tensor([v], dtype=d, device=device) for v, d in zip(_values(sampling), dtypes, strict=True))


def _library_of(program: Program, method: str) -> tuple[memoryview, tuple[BlobWeight, ...]]:
    """Find a method's compiled library in a program, and the weights that it wants."""
    for candidate in program.methods:
        if candidate.name == method and len(candidate.delegates) == 1 and candidate.delegates[0].backend == CUDA:
            blob = read_blob(CUDA, program.read(candidate.delegates[0].blob))
            if blob.library in program.named_data:
                return program.read(program.named_data[blob.library]), blob.weights
    raise G4Error(
        f"{program.path} has no compiled CUDA library for {method}.",
        hint="Export it for a GPU: g4 export --backend cuda",
    )


def _load(
    wanted: Mapping[str, BlobWeight], data: Sequence[DataFile], device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Copy weights from memory-mapped files to the device."""
    loaded = {}
    with progress.phase("load weights", sum(weight.nbytes for weight in wanted.values())) as task:
        for file in data:
            # Copy-on-write, because torch wants memory that could be written.
            handle = os.open(file.path, os.O_RDONLY)
            mapping = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
            os.close(handle)
            for name, weight in wanted.items():
                entry = file.entries.get(weight.key or "")
                if entry is None:
                    continue
                raw = torch.frombuffer(mapping, dtype=torch.uint8, count=weight.nbytes, offset=entry.span.offset)
                loaded[name] = raw.to(device).view(getattr(torch, weight.format)).view(weight.shape)
                task.advance(weight.nbytes, name)
    missing = set(wanted) - set(loaded)
    if missing:
        raise G4Error(f"The bundle's weights lack {min(missing)}.", hint="Export the model again: g4 export")
    return loaded
