"""Turn the traced CPU model into an ExecuTorch program: `model.pte` (code) and `weights.ptd` (every constant)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, ExecutorchProgramManager, to_edge
from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.remove_unused_parameters_pass import remove_unused_parameters_pass
from executorch.exir.tensor import TensorSpec
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from gemma4cli.export.bundle import PROGRAM_FILE
from gemma4cli.export.contract import DECODE, Contract
from gemma4cli.export.quiet import quiet
from gemma4cli.export.xnnpack import delegate
from gemma4cli.export.xnnpack_graph import WeightData

WEIGHTS_FILE = "weights.ptd"
_TAG = WEIGHTS_FILE.removesuffix(".ptd")


def lower(
    programs: Mapping[str, ExportedProgram], contract: Contract, scratch: Path | None = None
) -> ExecutorchProgramManager:
    """Lower both methods together, so that they share their caches and weights.

    scratch: an existing folder where converted weights wait on disk until the program is written and released.
    """
    weights = WeightData(_TAG, scratch)
    with quiet():
        methods = {}
        for name, program in programs.items():
            delegate(program, 1 if name == DECODE else contract.prefill_chunk, weights)
            methods[name] = remove_unused_parameters_pass(program)
        edge = to_edge(
            methods,
            constant_methods={
                name: torch.tensor(value) if isinstance(value, list) else value
                for name, value in contract.constant_methods().items()
            },
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        return edge.to_executorch(
            ExecutorchBackendConfig(
                # One instance for both methods: it is what places their caches at the same addresses.
                memory_planning_pass=MemoryPlanningPass(_plan_activations, share_mutable_buffers=True),
                # Without it a write to a cache copies the whole cache, twice.
                run_reinplace_pass=True,
                emit_mutable_buffer_names=True,
                external_constants=lambda node: _TAG,
            )
        )


def write(program: ExecutorchProgramManager, folder: Path) -> None:
    """Write the two files."""
    with open(folder / PROGRAM_FILE, "wb") as file:
        program.write_to_file(file)
    program.write_tensor_data_to_file(str(folder))


def _plan_activations(
    alignment: int,
    specs: Iterable[TensorSpec],
    graph_module: torch.fx.GraphModule,
    graph_signature: ExportGraphSignature,
    extra_padding: int = 0,
) -> list[int]:
    """Plan everything but the caches, which get a buffer of their own.

    A method that writes to a cache also has it as an output, and ExecuTorch's planner would reserve room for that
    among the method's activations: three times the memory.
    """
    outputs = graph_module.graph.output_node().meta["spec"]
    caches = set(outputs[: len(graph_signature.buffers_to_mutate)])  # mutated buffers come first
    for spec in caches:
        spec.mem_id, spec.mem_offset = 1, 0  # the planner wants some place; nothing is ever stored there
    activations = [spec for spec in specs if spec not in caches]
    return MemoryPlanningAlgorithmSuite()(alignment, activations, graph_module, graph_signature, extra_padding)
