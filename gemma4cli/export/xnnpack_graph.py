"""Write one XNNPACK graph in the serialized form that ExecuTorch's XNNPACK delegate loads.

The schema and its serializer are ExecuTorch's (`backends/xnnpack/serialization`). A value is known by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    PerChannelGroupQuant,
    PerChannelQuant,
    PerTokenDynamicQuant,
    XNNAdd,
    XNNConcatenate2,
    XNNConvert,
    XNNDatatype,
    XNNFullyConnected,
    XNNGraph,
    XNNMultiply,
    XNNQuantizedTensorValue,
    XNNReciprocalSquareRoot,
    XNNSigmoid,
    XNNStaticReshape,
    XNNStaticSlice,
    XNNStaticTranspose,
    XNNSubtract,
    XNNTanh,
    XNNTensorValue,
    XNode,
    XNodeUnion,
    XValue,
)
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from torch import Tensor

_ALIGNMENT = 16
# Buffer 0 of a graph means "no data"; the serializer reserves it.
_NO_BUFFER = 0


class WeightData:
    """Bytes of named constants, made once for both methods; with `scratch` they wait there instead of in memory.

    tag: the name, without suffix, of the `.ptd` file they go to.
    """

    def __init__(self, tag: str, scratch: Path | None = None) -> None:
        self.tag = tag
        self._scratch = scratch
        self._made: dict[str, bytes | FileBackedData] = {}

    def get(self, name: str, tensor: Tensor) -> bytes | FileBackedData:
        if name not in self._made:
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            if self._scratch is None:
                self._made[name] = data.tobytes()
            else:
                path = self._scratch / f"{len(self._made):06d}.bin"
                data.tofile(path)
                self._made[name] = FileBackedData(str(path), cleanup=True)
        return self._made[name]


class GraphWriter:
    """One graph in the making. Shapes have the upper bound of tokens where that is dynamic."""

    def __init__(self, weights: WeightData) -> None:
        self._weights = weights
        self._values: list[XNNTensorValue | XNNQuantizedTensorValue] = []
        self._nodes: list[XNode] = []
        self._inputs: list[int] = []
        self._data = [ConstantDataOffset(0, 0)]
        self._store = NamedDataStore()
        self._named: dict[str, int] = {}
        self._quantized: dict[int, int] = {}

    def input(self, shape: Sequence[int]) -> int:
        """Declare the next external input."""
        number = self._new(shape, external_id=len(self._inputs), flags=XNN_VALUE_FLAG_EXTERNAL_INPUT)
        self._inputs.append(number)
        return number

    def finish(self, outputs: Sequence[int]) -> tuple[bytes, NamedDataStoreOutput]:
        """Declare the external outputs and serialize; the writer must not be used afterwards."""
        for position, number in enumerate(outputs):
            value = self._tensor(number)
            value.external_id = len(self._inputs) + position
            value.flags = XNN_VALUE_FLAG_EXTERNAL_OUTPUT
        graph = XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=[XValue(value) for value in self._values],
            num_externs=len(self._inputs) + len(outputs),
            input_ids=self._inputs,
            output_ids=list(outputs),
            constant_data=self._data,
        )
        return serialize_xnnpack_binary(graph, bytearray()), self._store.get_named_data_store_output()

    def shape(self, number: int) -> list[int]:
        return self._tensor(number).dims

    # Constants

    def constant(self, name: str, tensor: Tensor) -> int:
        """A float32 tensor; a scalar becomes one element."""
        tensor = tensor.float().reshape(tensor.shape or (1,))
        return self._constant(name, tensor, tensor.shape, XNNDatatype.xnn_datatype_fp32)

    def scalar(self, value: float) -> int:
        return self.constant(f"g4.scalar.{value!r}", torch.tensor([value]))

    def int4_weight(self, name: str, qdata: Tensor, scale_name: str, scale: Tensor) -> int:
        """Codes [N, K / 2] uint8 around 8 and scales [N, K / group] bfloat16."""
        rows, columns = qdata.shape[0], 2 * qdata.shape[1]
        quant = PerChannelGroupQuant(
            scale=[],
            channel_dim=0,
            group_size=columns // scale.shape[1],
            scale_buffer_idx=self._buffer(scale_name, scale),
            num_scales=scale.numel(),
        )
        return self._constant(name, qdata, (rows, columns), XNNDatatype.xnn_datatype_qbint4, quant)

    def int8_weight(self, name: str, qdata: Tensor, scale_name: str, scale: Tensor) -> int:
        """Codes [N, K] int8 and scales [N] float32."""
        quant = PerChannelQuant(
            scale=[], channel_dim=0, scale_buffer_idx=self._buffer(scale_name, scale), num_scales=scale.numel()
        )
        return self._constant(name, qdata, qdata.shape, XNNDatatype.xnn_datatype_qcint8, quant)

    # Operators

    def quantize(self, x: int) -> int:
        """Quantize each row to 8 bits, once however often it is asked for."""
        if x not in self._quantized:
            number = self._new(
                self.shape(x), XNNDatatype.xnn_datatype_qdint8, PerTokenDynamicQuant(num_nonbatch_dims=1)
            )
            self._node(XNNConvert(input_id=x, output_id=number, flags=0))
            self._quantized[x] = number
        return self._quantized[x]

    def linear(self, x: int, weight: int) -> int:
        y = self._new([*self.shape(x)[:-1], self.shape(weight)[0]])
        self._node(XNNFullyConnected(x, weight, XNN_INVALID_VALUE_ID, y, 0))
        return y

    def add(self, a: int, b: int) -> int:
        return self._binary(XNNAdd, a, b)

    def subtract(self, a: int, b: int) -> int:
        return self._binary(XNNSubtract, a, b)

    def multiply(self, a: int, b: int) -> int:
        return self._binary(XNNMultiply, a, b)

    def reciprocal_sqrt(self, x: int) -> int:
        return self._unary(XNNReciprocalSquareRoot, x)

    def sigmoid(self, x: int) -> int:
        return self._unary(XNNSigmoid, x)

    def tanh(self, x: int) -> int:
        return self._unary(XNNTanh, x)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        """Change the shape; dimension 1, the tokens, is inferred at run time."""
        y = self._new(shape)
        new_shape = [0 if dimension == 1 else size for dimension, size in enumerate(shape)]
        self._node(XNNStaticReshape(len(shape), new_shape, x, y, 0))
        return y

    def transpose(self, x: int, order: Sequence[int]) -> int:
        shape = self.shape(x)
        y = self._new([shape[dimension] for dimension in order])
        self._node(XNNStaticTranspose(len(shape), list(order), x, y, 0))
        return y

    def slice(self, x: int, begin: int, end: int) -> int:
        """Cut the last dimension; a size of 0 means all of a dimension, whatever it is at run time."""
        shape = self.shape(x)
        y = self._new([*shape[:-1], end - begin])
        offsets, sizes = [0] * len(shape), [0] * len(shape)
        offsets[-1], sizes[-1] = begin, end - begin
        self._node(XNNStaticSlice(len(shape), offsets, sizes, x, y, 0))
        return y

    def concatenate(self, a: int, b: int) -> int:
        """Join along the last dimension."""
        shape = self.shape(a)
        y = self._new([*shape[:-1], shape[-1] + self.shape(b)[-1]])
        none = XNN_INVALID_VALUE_ID
        self._node(XNNConcatenate2(len(shape) - 1, a, b, none, none, y, 0, none))
        return y

    # Pieces

    def _tensor(self, number: int) -> XNNTensorValue:
        value = self._values[number]
        return value.tensor_value if isinstance(value, XNNQuantizedTensorValue) else value

    def _new(
        self,
        shape: Sequence[int],
        dtype: XNNDatatype = XNNDatatype.xnn_datatype_fp32,
        quant: PerChannelGroupQuant | PerChannelQuant | PerTokenDynamicQuant | None = None,
        *,
        buffer: int = _NO_BUFFER,
        external_id: int = XNN_INVALID_VALUE_ID,
        flags: int = 0,
    ) -> int:
        number = len(self._values)
        tensor = XNNTensorValue(dtype, len(shape), list(shape), buffer, external_id, flags, number)
        self._values.append(tensor if quant is None else XNNQuantizedTensorValue(tensor, quant))
        return number

    def _constant(
        self,
        name: str,
        tensor: Tensor,
        shape: Sequence[int],
        dtype: XNNDatatype,
        quant: PerChannelGroupQuant | PerChannelQuant | None = None,
    ) -> int:
        if name not in self._named:
            self._named[name] = self._new(shape, dtype, quant, buffer=self._buffer(name, tensor))
        return self._named[name]

    def _buffer(self, name: str, tensor: Tensor) -> int:
        data = self._weights.get(name, tensor)
        self._data.append(ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=name))
        self._store.add_named_data(name, data, _ALIGNMENT, self._weights.tag)
        return len(self._data) - 1

    def _node(self, node: XNodeUnion) -> None:
        self._nodes.append(XNode(node, debug_handle=len(self._nodes)))

    def _binary(self, kind: type[XNNAdd | XNNSubtract | XNNMultiply], a: int, b: int) -> int:
        y = self._new(torch.broadcast_shapes(self.shape(a), self.shape(b)))
        self._node(kind(input1_id=a, input2_id=b, output_id=y, flags=0))
        return y

    def _unary(self, kind: type[XNNReciprocalSquareRoot | XNNSigmoid | XNNTanh], x: int) -> int:
        y = self._new(self.shape(x))
        self._node(kind(input_id=x, output_id=y, flags=0))
        return y
