"""Lower the operators of `cpu_ops` to XNNPACK delegates by writing XNNPACK's graphs directly.

ExecuTorch's own XNNPACK partitioner re-traces every fragment about fifteen times: minutes for a small model. This
model is made of a dozen known operators, so we write the delegates' graphs ourselves: everything between two attention
calls (output projection, norms, residuals, MLP, the next layer's norm, projections and rotation) becomes one delegate,
and what is left for ExecuTorch's passes is small.

Weights are named data under their parameters' own names in the program's `.ptd`, shared by both methods.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, fx
from torch.export import ExportedProgram

from gemma4cli.export import cpu_ops  # noqa: F401  (defines torch.ops.g4)
from gemma4cli.export.xnnpack_graph import GraphWriter, WeightData

BACKEND_ID = "XnnpackBackend"

_g4, _aten = torch.ops.g4, torch.ops.aten


def delegate(program: ExportedProgram, max_tokens: int, weights: WeightData) -> int:
    """Replace, in place, every run of supported operators by one XNNPACK delegate.

    Args:
        program: one method as traced, before any decomposition: what is delegated need not be decomposed any more.
        max_tokens: upper bound of its dynamic dimension.
        weights: where the weights' bytes are made; both methods must be given the same.
    Returns: the number of delegates.
    """
    constants = _constants(program)
    groups = _group(program.graph, constants)
    for index, nodes in enumerate(groups):
        _replace(program, nodes, constants, max_tokens, weights, index)
    program.graph.lint()
    program.graph_module.recompile()
    return len(groups)


def _constants(program: ExportedProgram) -> dict[fx.Node, tuple[str, Tensor]]:
    """Map each placeholder of a parameter or buffer to its name and value; no supported operator reads a cache."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values = {**program.constants, **program.state_dict}
    return {
        node: (names[node.name], values[names[node.name]])
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in names
    }


def _group(graph: fx.Graph, constants: dict[fx.Node, tuple[str, Tensor]]) -> list[list[fx.Node]]:
    """Split the supported operators into groups that can each run as a whole.

    A node's stage counts the changes between supported and unsupported operators on the longest way to it. Edges
    never lead to an earlier stage, so groups of one stage cannot wait for each other.
    """
    stages: dict[fx.Node, int] = {}
    groups: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        supported = _is_supported(node)
        inputs = [argument for argument in node.all_input_nodes if argument not in constants]
        stage = max((stages[i] + (_is_supported(i) != supported) for i in inputs), default=0)
        stages[node] = stage
        if supported:
            groups.setdefault(stage, []).append(node)
    return [groups[stage] for stage in sorted(groups) if any(_is_work(node) for node in groups[stage])]


def _is_supported(node: fx.Node) -> bool:
    """Tell whether a node is written down by `_WRITERS`: float32, with tokens in dimension 1 of 3 or 4."""
    if node.op != "call_function" or node.target not in _WRITERS:
        return False
    tensors = [node.meta["val"], *(i.meta["val"] for i in node.all_input_nodes[:1])]
    if not all(isinstance(t, Tensor) and t.dtype == torch.float32 and t.dim() in (3, 4) for t in tensors):
        return False
    return node.target not in _BINARY or isinstance(node.args[1], fx.Node)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads; sizes that a view is given are not among them."""
    return [argument for argument in node.all_input_nodes if isinstance(argument.meta["val"], Tensor)]


def _is_work(node: fx.Node) -> bool:
    return node.target not in (_aten.view.default, _aten.reshape.default, _aten.transpose.int)


def _replace(
    program: ExportedProgram,
    nodes: list[fx.Node],
    constants: dict[fx.Node, tuple[str, Tensor]],
    max_tokens: int,
    weights: WeightData,
    index: int,
) -> None:
    members = set(nodes)
    inputs = list(dict.fromkeys(i for n in nodes for i in _operands(n) if i not in members and i not in constants))
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    writer = _Translator(constants, max_tokens, weights)
    binary, named_data = writer.translate(inputs, nodes, outputs)
    module = LoweredBackendModule(_Shapes(inputs, outputs), BACKEND_ID, binary, [], named_data)
    name = f"lowered_module_{index}"
    program.graph_module.register_module(name, module)

    graph = program.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    first_use = min((user for node in outputs for user in node.users if user not in members), key=order.__getitem__)
    assert all(order[node] < order[first_use] for node in inputs), "a delegate would wait for its own result"
    with graph.inserting_before(first_use):
        attribute = graph.get_attr(name)
        call = graph.call_function(executorch_call_delegate, (attribute, *inputs))
        call.meta["val"] = tuple(node.meta["val"] for node in outputs)
        for position, node in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, position))
            item.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(item)
    for node in reversed(nodes):
        graph.erase_node(node)


class _Shapes:
    """What ExecuTorch's passes need of a delegate's original program: outputs of the right shapes, at no cost."""

    def __init__(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        self._shapes = [tuple(node.meta["val"].shape) for node in outputs]
        # Tokens are the only dynamic size, so any symbolic size of an input is the number of tokens.
        self._source = next(
            (
                (i, d)
                for i, node in enumerate(inputs)
                for d, size in enumerate(node.meta["val"].shape)
                if _symbolic(size)
            ),
            None,
        )
        self.graph = fx.Graph()
        self.graph.output(tuple(self.graph.placeholder(f"output_{index}") for index in range(len(outputs))))

    def module(self) -> Callable[..., tuple[Tensor, ...]]:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            tokens = None if self._source is None else inputs[self._source[0]].shape[self._source[1]]
            return tuple(torch.empty([tokens if _symbolic(size) else size for size in shape]) for shape in self._shapes)

        return run


def _symbolic(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int)


class _Translator:
    """Writes one group of nodes into one XNNPACK graph."""

    def __init__(self, constants: dict[fx.Node, tuple[str, Tensor]], max_tokens: int, weights: WeightData) -> None:
        self._constants = constants
        self._max_tokens = max_tokens
        self._graph = GraphWriter(weights)
        self._values: dict[fx.Node, int] = {}
        self._group_sums: dict[tuple[int, int], int] = {}

    def translate(
        self, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> tuple[bytes, Any]:
        for node in inputs:
            self._values[node] = self._graph.input(self._shape(node))
        for node in nodes:
            self._values[node] = _WRITERS[node.target](self, node)
        return self._graph.finish([self._values[node] for node in outputs])

    def _shape(self, node: fx.Node) -> list[int]:
        """A node's sizes, with the dynamic one at its upper bound."""
        return [self._max_tokens if _symbolic(size) else int(size) for size in node.meta["val"].shape]

    def _value(self, node: fx.Node) -> int:
        if node in self._constants and node not in self._values:
            name, tensor = self._constants[node]
            self._values[node] = self._graph.constant(name, tensor)
        return self._values[node]

    def _tensor(self, node: fx.Node) -> tuple[str, Tensor]:
        return self._constants[node]

    def add(self, node: fx.Node) -> int:
        return self._graph.add(self._value(node.args[0]), self._value(node.args[1]))

    def multiply(self, node: fx.Node) -> int:
        return self._graph.multiply(self._value(node.args[0]), self._value(node.args[1]))

    def view(self, node: fx.Node) -> int:
        return self._graph.reshape(self._value(node.args[0]), self._shape(node))

    def transpose(self, node: fx.Node) -> int:
        x, first, second = node.args
        order = list(range(len(node.meta["val"].shape)))
        order[first], order[second] = order[second], order[first]
        return self._graph.transpose(self._value(x), order)

    def linear_int4(self, node: fx.Node) -> int:
        x, qdata, scale, offset = node.args
        weight = self._graph.int4_weight(*self._tensor(qdata), *self._tensor(scale))
        return self._with_offset(self._graph.linear(self._graph.quantize(self._value(x)), weight), x, offset)

    def linear_int8(self, node: fx.Node) -> int:
        x, qdata, scale, offset = node.args
        weight = self._graph.int8_weight(*self._tensor(qdata), *self._tensor(scale))
        return self._with_offset(self._graph.linear(self._graph.quantize(self._value(x)), weight), x, offset)

    def _with_offset(self, y: int, x: fx.Node, offset: fx.Node | None) -> int:
        if offset is None:
            return y
        groups = self._tensor(offset)[1].shape[1]
        sums = self._sums(self._value(x), groups)
        return self._graph.add(y, self._graph.linear(sums, self._value(offset)))

    def _sums(self, x: int, groups: int) -> int:
        if (x, groups) not in self._group_sums:
            shape = self._graph.shape(x)
            group = shape[-1] // groups
            ones = self._graph.constant(f"g4.ones.{group}", torch.ones(1, group))
            runs = self._graph.reshape(x, [*shape[:-1], groups, group])
            self._group_sums[x, groups] = self._graph.reshape(self._graph.linear(runs, ones), [*shape[:-1], groups])
        return self._group_sums[x, groups]

    def linear_float(self, node: fx.Node) -> int:
        return self._graph.linear(self._value(node.args[0]), self._value(node.args[1]))

    def rms_norm(self, node: fx.Node) -> int:
        graph, x, (_, weight, eps) = self._graph, self._value(node.args[0]), node.args
        size = graph.shape(x)[-1]
        # A mean along the last dimension is a linear layer with one output.
        average = graph.constant(f"g4.mean.{size}", torch.full((1, size), 1.0 / size))
        mean = graph.linear(graph.multiply(x, x), average)
        normal = graph.multiply(x, graph.reciprocal_sqrt(graph.add(mean, graph.scalar(eps))))
        return normal if weight is None else graph.multiply(normal, self._value(weight))

    def rope(self, node: fx.Node) -> int:
        graph = self._graph
        x, cos, sin = (self._value(argument) for argument in node.args)
        batch, tokens, _, size = graph.shape(x)
        cos, sin = (graph.reshape(angle, [batch, tokens, 1, size // 2]) for angle in (cos, sin))
        first, second = graph.slice(x, 0, size // 2), graph.slice(x, size // 2, size)
        return graph.concatenate(
            graph.subtract(graph.multiply(first, cos), graph.multiply(second, sin)),
            graph.add(graph.multiply(second, cos), graph.multiply(first, sin)),
        )

    def gelu_mul(self, node: fx.Node) -> int:
        graph = self._graph
        gate, up = self._value(node.args[0]), self._value(node.args[1])
        # gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x sigmoid(x (a + b x^2))
        slope = 2 * (2 / torch.pi) ** 0.5
        inner = graph.add(
            graph.multiply(graph.multiply(gate, gate), graph.scalar(slope * 0.044715)), graph.scalar(slope)
        )
        return graph.multiply(graph.multiply(gate, graph.sigmoid(graph.multiply(gate, inner))), up)

    def softcap(self, node: fx.Node) -> int:
        graph, x, cap = self._graph, self._value(node.args[0]), node.args[1]
        return graph.multiply(graph.tanh(graph.multiply(x, graph.scalar(1 / cap))), graph.scalar(cap))


_BINARY = (_aten.add.Tensor, _aten.mul.Tensor)
_WRITERS: dict[Any, Callable[[_Translator, fx.Node], int]] = {
    _g4.linear_int4.default: _Translator.linear_int4,
    _g4.linear_int8.default: _Translator.linear_int8,
    _g4.linear_float.default: _Translator.linear_float,
    _g4.rms_norm.default: _Translator.rms_norm,
    _g4.rope.default: _Translator.rope,
    _g4.gelu_mul.default: _Translator.gelu_mul,
    _g4.softcap.default: _Translator.softcap,
    _aten.add.Tensor: _Translator.add,
    _aten.mul.Tensor: _Translator.multiply,
    _aten.view.default: _Translator.view,
    _aten.reshape.default: _Translator.view,
    _aten.transpose.int: _Translator.transpose,
}
