"""Compile the two methods for one GPU architecture: from shapes alone, with no weight in memory and no GPU needed.

`trace` records the model on tensors that have shapes and nothing else, AOTInductor turns each method into a shared
library, and `assemble` wraps the libraries in an ExecuTorch program whose only content is one call per method. That
skips ExecuTorch's passes over thousands of operators, all of which its CUDA partitioner would hand over unchanged.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor
import torch._inductor.graph as inductor_graph
import torch.utils._pytree as pytree
from executorch.backends.cuda.cuda_backend import AOTI_DEVICE_TYPE_CUDA, CudaBackend
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
from executorch.backends.cuda.cuda_weight_collector import CudaWeightEntry, encode_cuda_weight_metadata
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import PreprocessResult
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.propagate_device_config import PropagateDeviceConfig
from executorch.exir.tensor import scalar_type_enum
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.pt2_archive._package_weights import Weights

from gemma4cli.export.contract import Contract
from gemma4cli.export.cuda.compile import Library
from gemma4cli.export.cuda.fake_gpu import fake_gpu
from gemma4cli.export.cuda.launch import dependent_launches
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.cuda.weights import weight_entries
from gemma4cli.export.quiet import quiet
from gemma4cli.export.trace import Step, trace_method, trace_methods
from gemma4cli.export.weights import WeightEntry
from gemma4cli.kernels.compile import KernelUsage
from gemma4cli.kernels.sampling import sample_cuda
from gemma4cli.kernels.targets import Target, compiling_for

_DEVICE = torch.device("cuda", 0)
_OPTIONS = {
    # Machine code for the target alone: what was checked here is what runs, and nothing is compiled at load.
    "aot_inductor.emit_multi_arch_kernel": False,
    # Configurations come from tables and heuristics, never from a measurement on whatever GPU is here.
    "max_autotune": False,
    "shape_padding": False,
    "max_autotune_gemm": True,  # a product must be a Triton kernel: the runtime has no other
    # A program must not hold values of weights, however few: one program serves every checkpoint of its signature.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
}


def trace(signature: Signature, method: str) -> ExportedProgram:
    """Record a method on tensors without storage, as if on a CPU; the target decides which kernels are called."""
    with torch.no_grad():
        with torch.device("meta"):
            model = CudaModel(signature).eval()
        # Not on the device yet: indexing a tensor in Python sets its device up.
        with FakeTensorMode(allow_non_fake_inputs=True):
            _replace_tensors(
                model, lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            )
        return trace_method(Step(model, sample_cuda), method, signature.cache.prefill_chunk)


def _replace_tensors(model: nn.Module, make: Any) -> None:
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    made = make(tensor)
                    store[name] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made


def compile_method(signature: Signature, method: str, target: Target) -> Library:
    """Compile `prefill` or `decode` for a target: minutes of work, in a process of its own (see ``compile``)."""
    known = {entry.fqn: entry for entry in weight_entries(signature)}
    with quiet(), torch.no_grad(), compiling_for(target):
        program = trace(signature, method)
        with fake_gpu(target) as usage:
            return _compile(program, method, known, usage)


def _compile(
    program: ExportedProgram, method: str, known: Mapping[str, WeightEntry], usage: Mapping[str, KernelUsage]
) -> Library:
    _move_to_gpu(program)
    inputs = set(program.graph_signature.user_inputs)
    arguments = tuple(node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in inputs)
    missing: set[str] = set()
    with (
        # Two constants are one when they are one object: without storage, addresses tell nothing.
        mock.patch.object(inductor_graph, "is_same_tensor", lambda a, b: a is b),
        CudaBackend.collect_unsupported_fallback_kernels(missing),
        CudaBackend.get_extra_aoti_compile_context_manager([]),
        dependent_launches(),
    ):
        made = torch._inductor.aot_compile(
            program.module(check_guards=False), arguments, options=CudaBackend.get_aoti_compile_options([]) | _OPTIONS
        )
    if missing:
        raise RuntimeError(f"{method} calls {', '.join(sorted(missing))}, which ExecuTorch's CUDA runtime lacks")
    (weights,) = (part for part in made if isinstance(part, Weights))
    (path,) = (Path(part) for part in made if isinstance(part, str) and part.endswith(".wrapper.so"))
    unknown = set(weights) - set(known)
    if unknown:
        raise RuntimeError(f"{method} holds constants that no weight fills: {', '.join(sorted(unknown))}")
    for name, (tensor, properties) in weights.items():
        if tuple(properties.shape) != known[name].shape or properties.offset or not tensor.is_contiguous():
            raise RuntimeError(f"{method} wants {name} in another layout than the weights file has it")
    _strip(path)
    return Library(path.read_bytes(), tuple(sorted(weights)), dict(usage))


def _move_to_gpu(program: ExportedProgram) -> None:
    """Say "cuda" wherever the traced program says "cpu": its tensors have no storage, so nothing is copied."""
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(pytree.tree_leaves(values))
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            with mode:
                moved[id(tensor)] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_DEVICE
                )
        return moved[id(tensor)]

    originals = [dict(program._state_dict), dict(program._constants)]  # kept: `moved` goes by identity
    for store in (program._state_dict, program._constants):
        for name, value in store.items():
            if isinstance(value, Tensor):
                store[name] = nn.Parameter(move(value), False) if isinstance(value, nn.Parameter) else move(value)
    program._example_inputs = pytree.tree_map_only(Tensor, move, program._example_inputs)
    del originals
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": _DEVICE}
            node.meta["val"] = pytree.tree_map_only(Tensor, lambda t: t.to(_DEVICE), node.meta.get("val"))


def _strip(library: Path) -> None:
    """Drop what depends on the machine or the moment and nobody needs: symbols, the linker's build id, its version."""
    sections = [argument for name in (".note.gnu.build-id", ".comment") for argument in ("-R", name)]
    subprocess.run(["strip", "-s", *sections, str(library)], check=True, capture_output=True)


def assemble(libraries: Mapping[str, Library], signature: Signature, contract: Contract) -> bytes:
    """Write the ExecuTorch program that calls the libraries: what is stored as `model.pte`.

    The libraries travel inside; weights are looked up by name in the `.ptd`, where both methods find the same.
    """
    store = NamedDataStore()
    known = {entry.fqn: entry for entry in weight_entries(signature)}
    results = {name: _preprocess_result(library, known, store) for name, library in libraries.items()}

    def preprocess_multimethod(programs: Any, specs: Any) -> dict[str, list[PreprocessResult]]:
        output = store.get_named_data_store_output()
        for result in results.values():
            result.data_store_output = output
        return {name: [results[name]] for name in programs}

    vocabulary = contract.vocab_size
    methods = trace_methods(_Signature(vocabulary), contract.prefill_chunk)
    with quiet(), mock.patch.object(CudaBackend, "preprocess_multimethod", preprocess_multimethod):
        edge = to_edge_transform_and_lower(
            methods,
            partitioner={
                name: [CudaPartitioner([CudaBackend.generate_method_name_compile_spec(name)])] for name in methods
            },
            constant_methods={
                name: torch.tensor(value) if isinstance(value, list) else value
                for name, value in contract.constant_methods().items()
            },
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                # The runner hands over tensors that are on the device already, and fetches what it needs.
                propagate_device_config=PropagateDeviceConfig(
                    skip_h2d_for_method_inputs=True, skip_d2h_for_method_outputs=True
                ),
                # ExecuTorch copies into inputs that it planned with the host's memcpy; so they must be the caller's.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    return program.buffer


class _Signature(nn.Module):
    """The inputs and outputs of a method and nothing between.

    The delegate is handed the inputs in the order in which they are first read here, and the library takes them in the
    order of the contract.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        read = tokens[0, -1:] + input_pos[-1:] + temperature + top_k + top_p + min_p + seed
        token, logits = read.long(), read.expand(1, self._vocab_size) + 0.0
        return token, logits


def _preprocess_result(library: Library, known: Mapping[str, WeightEntry], store: NamedDataStore) -> PreprocessResult:
    key = hashlib.sha256(library.code).hexdigest() + "_so_blob"
    store.add_named_data(key, library.code, 1, None)
    entries = [
        CudaWeightEntry(
            entry.fqn,
            entry.storage_key,
            entry.nbytes,
            int(scalar_type_enum(entry.dtype)),
            AOTI_DEVICE_TYPE_CUDA,
            0,
            entry.shape,
            _strides(entry.shape),
        )
        for entry in (known[name] for name in library.constants)
    ]
    return PreprocessResult(encode_cuda_weight_metadata(key, entries), {}, None)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
