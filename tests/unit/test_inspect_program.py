"""Reading `.pte` and `.ptd` files: the same values as ExecuTorch's own readers see, and a sentence for damaged ones."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import pytest
from executorch.exir import schema
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

from gemma4cli.errors import G4Error
from gemma4cli.inspection.artifact import open_artifact
from gemma4cli.inspection.delegates import read_blob
from gemma4cli.inspection.flatbuffer import Buffer, Malformed
from gemma4cli.inspection.program import Program, Value, read_program
from gemma4cli.inspection.ptd import read_data_file
from tests.support import programs
from tests.support.mini_program import mini_program

KINDS = {
    schema.Null: "none", schema.Int: "int", schema.Bool: "bool", schema.Double: "double", schema.String: "string",
    schema.IntList: "int list", schema.DoubleList: "double list", schema.BoolList: "bool list",
    schema.TensorList: "tensor list", schema.OptionalTensorList: "optional tensor list", schema.Tensor: "tensor",
}  # fmt: skip
DTYPES = {
    ScalarType.LONG: "int64", ScalarType.FLOAT: "float32", ScalarType.CHAR: "int8", ScalarType.BOOL: "bool",
    ScalarType.INT: "int32", ScalarType.HALF: "float16",
}  # fmt: skip


def everything() -> bytes:
    """A program with a value of every kind, every place a tensor can have, and every instruction."""
    values = [
        schema.EValue(schema.Null()), schema.EValue(schema.Int(-(2**40))), schema.EValue(schema.Bool(True)),
        schema.EValue(schema.Double(0.1)), schema.EValue(schema.String("größe")),
        schema.EValue(schema.IntList([1, 2, -3])), schema.EValue(schema.DoubleList([0.5])),
        schema.EValue(schema.BoolList([True, False])), schema.EValue(schema.TensorList([9, 10])),
        programs.tensor(ScalarType.LONG, [1, 7], memory=2**20, dynamic=True),
        programs.tensor(ScalarType.FLOAT, [2, 3], constant=1),
        programs.tensor(ScalarType.FLOAT, [4], memory=64, name="model.layers.3.k_cache"),
        programs.tensor(ScalarType.CHAR, [8], constant=1, name="weight", external=True),
        programs.tensor(ScalarType.FLOAT, [1, 5], memory=0, cuda=True),
    ]  # fmt: skip
    values[9].val.allocation_info.memory_offset_high = 3
    reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0)
    delegate = schema.BackendDelegate("SomeBackend", reference, [programs.CompileSpec("key", b"\x00value")])
    instructions = [
        schema.KernelCall(0, [9, 10]), schema.DelegateCall(0, [9]), schema.MoveCall(1, 2), schema.JumpFalseCall(2, 0),
        schema.FreeCall(9), schema.KernelCall(1, []), schema.KernelCall(0, []), schema.DelegateCall(0, []),
    ]  # fmt: skip
    forward = programs.method(
        "forward", values, [9], [13], instructions=instructions, operators=["aten::mul.out", "aten::copy."],
        delegates=[delegate], buffers=[0, 4096, 512],
        devices=[schema.NonConstBufferDevice(2, schema.DeviceType.CUDA, 1)],
    )  # fmt: skip
    answers = [programs.method("answer", [schema.EValue(schema.Int(42))], outputs=[0]),
               programs.method("pair", values[2:4], outputs=[0, 1]),
               programs.method("table", values[10:11], outputs=[0])]  # fmt: skip
    table = struct.pack("<6f", *range(6))
    return programs.serialize([forward, *answers], constants=[table], blobs=[b"blob bytes"], named={"lib": b"library"})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "model.pte"
        path.write_bytes(data)
        return path

    return write


def plain(value: Value) -> Any:
    """A value of ours as ExecuTorch's dataclasses have it."""
    if value.kind != "tensor":
        return value.value
    t = value.value
    return (t.dtype, list(t.shape), t.is_dynamic, t.name, t.data_index, t.is_external, t.memory, t.device)


def theirs(value: Any) -> Any:
    if not isinstance(value, schema.Tensor):
        fields = list(vars(value).values())
        return float(fields[0]) if isinstance(value, schema.Double) else fields[0] if fields else None
    extra, planned = value.extra_tensor_info or schema.ExtraTensorInfo(), value.allocation_info
    place = planned and (planned.memory_id, planned.memory_offset_low + (planned.memory_offset_high << 32))
    device = "cpu" if extra.device_type == schema.DeviceType.CPU else f"cuda:{extra.device_index}"
    is_dynamic = value.shape_dynamism != schema.TensorShapeDynamism.STATIC
    external = extra.location == schema.TensorDataLocation.EXTERNAL
    return (DTYPES[value.scalar_type], list(value.sizes), is_dynamic, extra.fully_qualified_name or None,
            value.data_buffer_idx, external, place, device)  # fmt: skip


def assert_same(ours: Program, data: bytes) -> None:
    parsed = deserialize_pte_binary(data)
    assert [m.name for m in ours.methods] == [plan.name for plan in parsed.program.execution_plan]
    for method, plan in zip(ours.methods, parsed.program.execution_plan, strict=True):
        assert [(v.kind, plain(v)) for v in method.values] == [(KINDS[type(v.val)], theirs(v.val)) for v in plan.values]
        assert list(method.inputs) == plan.inputs and list(method.outputs) == plan.outputs
        assert [buffer.nbytes for buffer in method.buffers] == plan.non_const_buffer_sizes
        calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
        assert method.instructions == len(calls)
        kernels = [plan.operators[c.op_index] for c in calls if isinstance(c, schema.KernelCall)]
        assert sorted(method.operators.items()) == sorted(
            {(o.name + (f".{o.overload}" if o.overload else ""), kernels.count(o)) for o in kernels}
        )
        for index, (delegate, expected) in enumerate(zip(method.delegates, plan.delegates, strict=True)):
            assert delegate.backend == expected.id
            assert delegate.specs == tuple((spec.key, bytes(spec.value)) for spec in expected.compile_specs)
            blob = parsed.program.backend_delegate_data[expected.processed.index].data
            assert bytes(ours.read(delegate.blob)) == bytes(blob)
            assert delegate.calls == sum(
                isinstance(c, schema.DelegateCall) and c.delegate_index == index for c in calls
            )
        for tensor in method.tensors:
            stored = ours.constant(tensor)
            if stored is not None and tensor.is_constant:
                expected = bytes(parsed.program.constant_buffer[tensor.data_index].storage)
                assert bytes(stored) == expected[: tensor.nbytes]


@pytest.mark.parametrize("data", [everything, mini_program], ids=["everything", "export"])
def test_we_read_what_executorch_reads(write: Callable[[bytes], Path], data: Callable[[], bytes]) -> None:
    assert_same(read_program(write(data())), data())


def test_details_of_a_program(write: Callable[[bytes], Path]) -> None:
    program = read_program(write(everything()))
    assert {m.name: program.constant_value(m) for m in program.methods if m.is_constant} == {
        "answer": 42,
        "pair": [True, 0.1],
        "table": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    }
    assert bytes(program.read(program.named_data["lib"])) == b"library"
    assert [buffer.device for buffer in program.methods[0].buffers] == ["cpu", "cpu", "cuda:1"]
    assert program.methods[0].values[9].value.memory == (1, (3 << 32) + 2**20)
    assert [t.name for t in program.methods[0].tensors if t.is_state] == ["model.layers.3.k_cache"]


def test_blobs_in_segments_are_found(write: Callable[[bytes], Path]) -> None:
    reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0)
    delegate = schema.BackendDelegate("B", reference, [])
    plan = programs.method("forward", [], delegates=[delegate], instructions=[schema.DelegateCall(0, [])])
    program = read_program(write(programs.serialize([plan], blobs=[b"a blob in a segment"], segments=True)))
    (found,) = program.methods[0].delegates
    assert (bytes(program.read(found.blob)), found.is_inline) == (b"a blob in a segment", False)


def test_weights_in_blobs_are_those_executorch_wrote() -> None:
    blob = read_blob("CudaBackend", memoryview(programs.cuda_blob()))
    assert blob.library == programs.LIBRARY_KEY
    assert {w.name: w.shape for w in blob.weights} == {n: shape for n, (_, shape) in programs.CUDA_WEIGHTS.items()}
    assert {w.device for w in blob.weights} == {"cuda:0"}
    assert blob.weights[0].nbytes == 160 * 64


def test_a_blob_of_an_older_or_unknown_backend_stays_closed() -> None:
    assert read_blob("CudaBackend", memoryview(b"key_so_blob\nkey_weights")).library == "key_so_blob"
    assert read_blob("CudaBackend", memoryview(b"\xff\x00")).library is None
    assert read_blob("QnnBackend", memoryview(b"anything")) == read_blob("XnnpackBackend", memoryview(b"anything"))


def test_data_files_are_read_as_executorch_reads_them(tmp_path: Path) -> None:
    layouts = {"b": TensorLayout(ScalarType.FLOAT, [2, 3], [0, 1])}
    data = programs.data_file({"a": b"anything", "b": bytes(24), "c": b"x" * 1000}, layouts)
    (tmp_path / "weights.ptd").write_bytes(data)
    ours, payload = read_data_file(tmp_path / "weights.ptd"), FlatTensorSerializer().deserialize(Cord(data))
    assert {k: bytes(ours.read(e.span)) for k, e in ours.entries.items()} == {
        k: bytes(payload.buffers[e.buffer_index]) for k, e in payload.named_data.items()
    }
    assert (ours.entries["b"].dtype, ours.entries["b"].shape) == ("float32", (2, 3))
    assert ours.entries["a"].dtype is None


def at(data: bytes, position: int, layout: str, value: int) -> bytes:
    return data[:position] + struct.pack(layout, value) + data[position + struct.calcsize(layout) :]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: b"", "is not an ExecuTorch program: bytes 4 to 7 are b'' instead of b'ET12'"),
        (lambda d: d[:4] + b"ET99" + d[8:], "bytes 4 to 7 are b'ET99'"),
        (lambda d: b"PK\x03\x04 a zip file", "is not an ExecuTorch program"),
        (lambda d: d[:1000], "is damaged: it has 1,000 of "),
        (lambda d: d[:-10], ", so it was cut off"),
        (lambda d: at(d, 0, "<I", 2**31), "is damaged: a value at byte 2,147,483,648 lies outside its"),
        (lambda d: at(d, 12, "<I", 3), "its header says to be 3 bytes long"),
        (lambda d: at(d, 16, "<Q", 2**63), "of 9,223,372,036,854,775,808 bytes, so it was cut off"),
        (lambda d: at(d, 24, "<Q", 2**62), "so it was cut off"),
    ],
)
def test_damaged_programs_get_a_sentence(
    write: Callable[[bytes], Path], damage: Callable[[bytes], bytes], sentence: str
) -> None:
    with pytest.raises(G4Error, match=re.escape(sentence)):
        read_program(write(damage(everything())))


def broken(change: Callable[[schema.ExecutionPlan], Any]) -> bytes:
    """A well-formed file whose contents contradict each other."""
    reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0)
    values = [programs.tensor(ScalarType.FLOAT, [2], constant=1)]
    plan = programs.method(
        "forward", values, [0], [0], instructions=[schema.KernelCall(0, []), schema.DelegateCall(0, [])],
        operators=["aten::mul.out"], delegates=[schema.BackendDelegate("B", reference, [])],
    )  # fmt: skip
    change(plan)
    return programs.serialize([plan], constants=[bytes(8)], blobs=[b"blob"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.inputs.append(7), "it refers to value 7 of 1"),
        (lambda p: p.outputs.append(-1), "it refers to value -1 of 1"),
        (lambda p: setattr(p.chains[0].instructions[0].instr_args, "op_index", 5), "it refers to operator 5 of 1"),
        (lambda p: setattr(p.chains[0].instructions[1].instr_args, "delegate_index", 2), "refers to delegate 2 of 1"),
        (lambda p: setattr(p.delegates[0].processed, "index", 3), "it refers to delegate blob 3 of 1"),
        (lambda p: setattr(p.values[0].val, "data_buffer_idx", 9), "a tensor refers to constant 9 of 2"),
        (lambda p: setattr(p.values[0].val, "sizes", [3, -2]), "it has a tensor with a dimension of -2"),
        (lambda p: setattr(p.values[0].val, "sizes", [1] * 17), "it has a tensor of 17 dimensions"),
        (lambda p: setattr(p, "non_const_buffer_sizes", [0, -5]), "it plans memory of a negative size"),
    ],
)
def test_contradictions_get_a_sentence(
    write: Callable[[bytes], Path], change: Callable[[schema.ExecutionPlan], Any], sentence: str
) -> None:
    with pytest.raises(G4Error, match=re.escape(sentence)) as caught:
        read_program(write(broken(change)))
    assert caught.value.hint == "Export the model again (g4 export), or copy the file again."


def test_a_constant_that_is_cut_short_gets_a_sentence(write: Callable[[bytes], Path]) -> None:
    answer = programs.method("answer", [programs.tensor(ScalarType.LONG, [100], constant=1)], outputs=[0])
    artifact = open_artifact([write(programs.serialize([answer], constants=[bytes(8)]))])
    with pytest.raises(G4Error, match="constant 1 has 8 of 800 bytes"):
        _ = artifact.constants


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: d[:4] + b"XXXX" + d[8:], "is not an ExecuTorch data file: bytes 4 to 7 are b'XXXX'"),
        (lambda d: d[:8] + b"nope" + d[12:], "is damaged: it has no header"),
        (lambda d: at(d, 12, "<I", 1), "its header says to be 1 bytes long"),
        (lambda d: at(d, 24, "<Q", 2**40), "so it was cut off"),
        (lambda d: d[:-1], "segment 1 ends at byte"),
        (lambda d: at(d, 0, "<I", 2**31), "lies outside its"),
    ],
)
def test_damaged_data_files_get_a_sentence(tmp_path: Path, damage: Callable[[bytes], bytes], sentence: str) -> None:
    path = tmp_path / "weights.ptd"
    path.write_bytes(damage(programs.data_file({"a": bytes(100), "b": bytes(200)})))
    with pytest.raises(G4Error, match=re.escape(sentence)):
        read_data_file(path)


def test_a_layout_larger_than_its_bytes_gets_a_sentence(tmp_path: Path) -> None:
    layouts = {"a": TensorLayout(ScalarType.FLOAT, [1000], [0])}
    (tmp_path / "weights.ptd").write_bytes(programs.data_file({"a": bytes(100)}, layouts))
    with pytest.raises(G4Error, match="'a' has 100 of 4,000 bytes"):
        read_data_file(tmp_path / "weights.ptd")


def cuda_blob(name: bytes = b"w", dtype: int = 6, device: int = 1, dimensions: int = 1) -> bytes:
    """A blob with one weight, as `encode_cuda_weight_metadata` lays it out."""
    head = b"ETCUDAFQN3" + struct.pack("<I", 3) + b"lib" + struct.pack("<I", 1)
    names = b"".join(struct.pack("<I", len(text)) + text for text in (name, b"key"))
    return head + names + struct.pack("<QiiqI", 4, dtype, device, 0, dimensions) + struct.pack("<2q", 1, 1)


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (cuda_blob()[:-1], "the list of weights of a CUDA delegate ends early"),
        (cuda_blob()[:20], "the list of weights of a CUDA delegate ends early"),
        (b"ETCUDAFQN3" + struct.pack("<I", 2**31), "the list of weights of a CUDA delegate ends early"),
        (cuda_blob(name=b"\xff\xfe"), "a weight of a CUDA delegate has a name that is not text"),
        (cuda_blob(dimensions=2**30), "a weight of a CUDA delegate has 1,073,741,824 dimensions"),
        (cuda_blob(dtype=99), "it has a tensor of the unknown data type 99"),
        (cuda_blob(device=7), "it has a tensor on the unknown device type 7"),
    ],
)
def test_damaged_cuda_blobs_get_a_sentence(blob: bytes, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)):
        read_blob("CudaBackend", memoryview(blob))


def xnnpack_blob(*, node: int = 1, value: int = 1, dtype: int = 1, buffer: int = 0, scales: int | None = None) -> bytes:
    """An XNNPACK graph of one node and one value, with one constant; field numbers as in its schema."""
    b = flatbuffers.Builder()

    def table(*fields: tuple[int, str, int]) -> int:
        b.StartObject(9)
        for number, kind, content in fields:
            getattr(b, f"Prepend{kind}Slot")(number, content, 0)
        return b.EndObject()

    def vector(*offsets: int) -> int:
        b.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            b.PrependUOffsetTRelative(offset)
        return b.EndVector()

    def union(kind: int, content: int) -> int:
        return table((0, "Uint8", kind), (1, "UOffsetTRelative", content))

    tensor = table((0, "Int16", dtype), (3, "Uint32", buffer))
    if scales is not None:
        per_channel = table((2, "Uint32", scales), (3, "Uint32", 4))
        tensor = table((0, "UOffsetTRelative", tensor), (1, "Uint8", 1), (2, "UOffsetTRelative", per_channel))
    nodes, values = vector(union(node, table())), vector(union(value, tensor))
    places = vector(table((1, "Uint64", 0)), table((1, "Uint64", 16)))
    root = table((1, "UOffsetTRelative", nodes), (2, "UOffsetTRelative", values), (8, "UOffsetTRelative", places))
    b.Finish(root)
    graph = bytes(b.Output())
    return bytes(4) + b"XH00" + struct.pack("<HIIIQ", 30, 32, len(graph), 32 + len(graph), 0) + bytes(2) + graph


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (b"\0\0\0\0XH00", "an XNNPACK blob ends in its header"),
        (xnnpack_blob()[:-1], "an XNNPACK blob is shorter than its header says"),
        (xnnpack_blob(node=200), "an XNNPACK graph has a node of the unknown kind 200"),
        (xnnpack_blob(value=3), "an XNNPACK graph has a value of the unknown kind 3"),
        (xnnpack_blob(value=2, dtype=0), "an XNNPACK graph has a quantized value without a tensor"),
        (xnnpack_blob(buffer=5), "an XNNPACK tensor refers to constant 5 of 2"),
        (xnnpack_blob(buffer=1, dtype=77), "an XNNPACK tensor has the unknown data type 77"),
        (xnnpack_blob(value=2, buffer=1, scales=9), "an XNNPACK tensor's scales refer to constant 9 of 2"),
    ],
)
def test_damaged_xnnpack_blobs_get_a_sentence(blob: bytes, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)):
        read_blob("XnnpackBackend", memoryview(blob))


def test_a_quantized_xnnpack_tensor_comes_with_its_scales() -> None:
    weights = read_blob("XnnpackBackend", memoryview(xnnpack_blob(value=2, dtype=6, buffer=1, scales=1))).weights
    assert [(w.format, w.shape, w.nbytes) for w in weights] == [("int8 per row", (), 16), ("float32", (4,), 16)]


def test_tables_that_point_at_each_other_over_and_over_are_refused() -> None:
    """A megabyte of offsets to one table with a long name would mean gigabytes of names."""
    b = flatbuffers.Builder()
    name = b.CreateString("x" * 4096)
    b.StartObject(1)
    b.PrependUOffsetTRelativeSlot(0, name, 0)
    shared = b.EndObject()
    b.StartVector(4, 5000, 4)
    for _ in range(5000):
        b.PrependUOffsetTRelative(shared)
    tables = b.EndVector()
    b.StartObject(1)
    b.PrependUOffsetTRelativeSlot(0, tables, 0)
    b.Finish(b.EndObject())
    root = Buffer(memoryview(bytes(b.Output()))).root()
    with pytest.raises(Malformed, match="its tables point at each other over and over"):
        root.tables(0, lambda table: table.text(0))
