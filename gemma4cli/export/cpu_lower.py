"""Turn the traced CPU model into an ExecuTorch program that names its weights; they are written apart from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, ExecutorchProgramManager, to_edge
from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.tensor import TensorSpec
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from gemma4cli.export.contract import Contract
from gemma4cli.export.quiet import quiet

WEIGHTS_FILE = "weights.ptd"


def lower(programs: Mapping[str, ExportedProgram], contract: Contract) -> ExecutorchProgramManager:
    """Lower both methods together, so that they share their caches.

    Every constant is looked up in a `.ptd` by its name in the program when the program is loaded; what the constants
    hold here goes nowhere.
    """
    with quiet():
        edge = to_edge(
            dict(programs),
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
                external_constants=_name_only,
            )
        )


class _WrittenApart(TensorSpec):
    """A constant of which the emitter takes nothing but type and shape; it would copy and hash every byte."""

    @property
    def allocated_memory(self) -> int:
        return 0

    def nbytes(self) -> int:
        return 0


def _name_only(node: fx.Node) -> str:
    """Mark a constant as one of the data file's, and return the file's tag."""
    node.meta["spec"].__class__ = _WrittenApart
    return WEIGHTS_FILE.removesuffix(".ptd")


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
