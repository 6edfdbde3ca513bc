"""Small ExecuTorch programs made of ExecuTorch's own schema objects, written by its own serializers.

`cuda_program` is what a CUDA export looks like, with any library; `write_cuda_bundle` puts it into a bundle. Nothing
here can run: it is for reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from executorch.backends.cuda.cuda_weight_collector import CudaWeightEntry, encode_cuda_weight_metadata
from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

from gemma4cli.export.bundle import BundleManifest, KVRecord, MemoryRecord, program_file, write_manifest
from gemma4cli.export.contract import DECODE, INPUTS, OUTPUTS, PREFILL, Contract
from tests.support import tiny

CONTEXT, CHUNK, VOCAB, WINDOW = 1024, 128, 160, 8
CONTRACT = Contract(CONTEXT, CHUNK, VOCAB, WINDOW, WINDOW + CHUNK - 1, eos_ids=(1, 6), bos_id=2)
LIBRARY_KEY = "0123abcd_so_blob"
_TYPES = {"i64": ScalarType.LONG, "f32": ScalarType.FLOAT}

# name -> (dtype, shape): two layers' weights, one growing cache and one ring.
CUDA_WEIGHTS = {
    "model.embed_tokens.codes": (ScalarType.CHAR, (160, 64)),
    "model.layers.0.self_attn.q_proj.codes": (ScalarType.INT, (64, 8)),
    "model.layers.1.self_attn.q_proj.codes": (ScalarType.INT, (64, 8)),
    "model.layers.0.self_attn.kv_cache.k": (ScalarType.BFLOAT16, (2, CONTRACT.ring_slots, 16)),
    "model.layers.1.self_attn.kv_cache.k": (ScalarType.BFLOAT16, (1, CONTEXT, 32)),
    "model.norm.weight": (ScalarType.BFLOAT16, (64,)),
}
_BYTES = {ScalarType.CHAR: 1, ScalarType.INT: 4, ScalarType.BFLOAT16: 2, ScalarType.FLOAT: 4, ScalarType.LONG: 8}


def tensor(
    dtype: ScalarType,
    sizes: Sequence[int],
    *,
    memory: int | None = None,
    constant: int = 0,
    name: str | None = None,
    external: bool = False,
    cuda: bool = False,
    dynamic: bool = False,
) -> schema.EValue:
    """A tensor value; `memory` is the offset in buffer 1 (or 2 with `cuda`)."""
    extra = None
    if name or external or cuda:
        location = schema.TensorDataLocation.EXTERNAL if external else schema.TensorDataLocation.SEGMENT
        device = schema.DeviceType.CUDA if cuda else schema.DeviceType.CPU
        extra = schema.ExtraTensorInfo(0, name, location, device, 0)
    shape = schema.TensorShapeDynamism.DYNAMIC_BOUND if dynamic else schema.TensorShapeDynamism.STATIC
    details = None if memory is None else schema.AllocationDetails(2 if cuda else 1, memory, 0)
    order = list(range(len(sizes)))
    return schema.EValue(schema.Tensor(dtype, 0, list(sizes), order, False, 0, constant, details, shape, extra))


def method(
    name: str,
    values: Sequence[schema.EValue],
    inputs: Iterable[int] = (),
    outputs: Iterable[int] = (),
    *,
    instructions: Sequence[Any] = (),
    operators: Sequence[str] = (),
    delegates: Sequence[schema.BackendDelegate] = (),
    buffers: Sequence[int] = (0,),
    devices: Sequence[schema.NonConstBufferDevice] | None = None,
) -> schema.ExecutionPlan:
    chain = schema.Chain([], [], [schema.Instruction(i) for i in instructions], None)
    listed = [schema.Operator(*operator.rsplit(".", 1)) for operator in operators]
    return schema.ExecutionPlan(
        name,
        schema.ContainerMetadata("", ""),
        list(values),
        list(inputs),
        list(outputs),
        [chain],
        listed,
        list(delegates),
        list(buffers),
        list(devices) if devices else None,
    )


def serialize(
    methods: Sequence[schema.ExecutionPlan],
    *,
    constants: Sequence[bytes] = (),
    blobs: Sequence[bytes] = (),
    named: Mapping[str, bytes] | None = None,
    segments: bool = False,
) -> bytes:
    """Serialize a program; constant 0 is ExecuTorch's reserved one. `segments` puts delegate blobs into segments."""
    program = schema.Program(
        0,
        list(methods),
        [schema.Buffer(b""), *(schema.Buffer(data) for data in constants)],
        [schema.BackendDelegateInlineData(data) for data in blobs],
        [],
        schema.SubsegmentOffsets(0, []),
    )
    entries = {key: DataEntry(index, 16, None) for index, key in enumerate(named or {})}
    store = NamedDataStoreOutput(list((named or {}).values()), entries, {}) if named else None
    file = PTEFile(program, None, store)
    return bytes(serialize_pte_binary(file, extract_delegate_segments=segments))


def constant_methods(values: Mapping[str, int | list[int]] | None = None) -> list[schema.ExecutionPlan]:
    """The contract's constant methods; a list becomes the i64 tensor that constant 1 holds."""
    made = []
    for name, value in (values or CONTRACT.constant_methods()).items():
        answer = (
            tensor(ScalarType.LONG, [len(value)], constant=1)
            if isinstance(value, list)
            else schema.EValue(schema.Int(value))
        )
        made.append(method(name, [answer], outputs=[0]))
    return made


def _cuda_method(name: str, tokens: int) -> schema.ExecutionPlan:
    sizes = {"T": tokens, "V": VOCAB}
    values = [
        tensor(_TYPES[spec.dtype], [sizes.get(size, size) for size in spec.shape], memory=64 * number, cuda=True,
               dynamic=tokens > 1 and "T" in spec.shape)
        for number, spec in enumerate((*INPUTS, *OUTPUTS))
    ]  # fmt: skip
    reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0)
    delegate = schema.BackendDelegate("CudaBackend", reference, [CompileSpec("method_name", name.encode())])
    call = schema.DelegateCall(0, list(range(len(values))))
    copy = schema.KernelCall(0, [0, 1])
    return method(
        name,
        values,
        range(len(INPUTS)),
        range(len(INPUTS), len(values)),
        instructions=[copy, call, copy],
        operators=["et_copy::_h2d_copy.out"],
        delegates=[delegate],
        buffers=[0, 256, 4096],
        devices=[schema.NonConstBufferDevice(2, schema.DeviceType.CUDA, 0)],
    )


def cuda_blob(library: str = LIBRARY_KEY) -> bytes:
    """What ExecuTorch's CUDA delegate keeps: the library's key and the list of weights."""
    entries = []
    for name, (dtype, shape) in CUDA_WEIGHTS.items():
        size = _BYTES[dtype]
        for dimension in shape:
            size *= dimension
        strides = tuple([1] * len(shape))
        entries.append(CudaWeightEntry(name, f"cuda_fqn_weight:cuda:{name}", size, int(dtype), 1, 0, shape, strides))
    return encode_cuda_weight_metadata(library, entries)


def cuda_program(library: bytes, **constants: int | list[int]) -> bytes:
    """A `.pte` that obeys the contract, with `library` inside; `constants` replace constant methods' values."""
    methods = [_cuda_method(PREFILL, CHUNK), _cuda_method(DECODE, 1)]
    values = {**CONTRACT.constant_methods(), **constants}
    eos = b"".join(number.to_bytes(8, "little") for number in CONTRACT.eos_ids)
    return serialize(
        [*methods, *constant_methods(values)], constants=[eos], blobs=[cuda_blob()], named={LIBRARY_KEY: library}
    )


def data_file(contents: Mapping[str, bytes], layouts: Mapping[str, TensorLayout] | None = None) -> bytes:
    """A `.ptd` of named bytes."""
    layouts = layouts or {}
    entries = {key: DataEntry(index, 16, layouts.get(key)) for index, key in enumerate(contents)}
    return bytes(FlatTensorSerializer().serialize(DataPayload(list(contents.values()), entries)))


def cuda_data(fill: int = 0) -> bytes:
    """The `.ptd` that `cuda_program` needs, every byte of its weights `fill`."""
    contents = {}
    for name, (dtype, shape) in CUDA_WEIGHTS.items():
        size = _BYTES[dtype]
        for dimension in shape:
            size *= dimension
        contents[f"cuda_fqn_weight:cuda:{name}"] = bytes([fill]) * size
    return data_file(contents)


def write_cuda_bundle(
    folder: Path,
    library: bytes | Mapping[str, bytes],
    *,
    fill: int = 0,
    workspace_bytes: int = 1 << 20,
    created_with: Mapping[str, str] | None = None,
    **constants: int | list[int],
) -> Path:
    """Write a bundle as `g4 export --backend cuda` lays it out: for sm_90, or for each target that has a library."""
    folder.mkdir(parents=True)
    libraries = {"sm_90": library} if isinstance(library, bytes) else library
    for target, code in libraries.items():
        (folder / program_file(target, tuple(libraries))).write_bytes(cuda_program(code, **constants))
    (folder / "weights.ptd").write_bytes(cuda_data(fill))
    (folder / "config.json").write_text(json.dumps(tiny.tiny_text_config()))
    write_manifest(
        folder,
        lambda files: BundleManifest(
            created_with=dict(created_with or {"g4": "0", "torch": "2.13.0"}),
            model={
                "source": {"kind": "safetensors", "name": "tiny", "revision": None, "files": {}},
                "recipe": None,
                "totals": None,
            },
            backend="cuda",
            targets=tuple(libraries),
            contract=CONTRACT,
            kv={"full": KVRecord("bfloat16", 1, CONTEXT, 2 * 32 * CONTEXT)},
            memory=MemoryRecord(1, 1, workspace_bytes),
            files=files,
        ),
    )
    return folder
