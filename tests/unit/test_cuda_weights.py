"""The `.ptd` of a CUDA program: ExecuTorch reads back what the model would hold, and nothing else decides its bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._cord import Cord
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from executorch.runtime import Runtime
from gguf.constants import GGMLQuantizationType as GGML
from torch import nn

from gemma4cli import bulk_file
from gemma4cli.bulk_file import PAGE
from gemma4cli.errors import G4Error
from gemma4cli.export import weights
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.cuda.weights import planned_bytes, state_bytes, weight_entries, write_weights
from gemma4cli.export.flat_tensor import ALIGNMENT, DataTensor, lay_out, writing
from gemma4cli.export.packed import PackedMatrix, fill
from gemma4cli.export.trace import Step
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.quant.checkpoint import Checkpoint, open_checkpoint
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint
from gemma4cli.quant.gguf.convert import convert_gguf
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.gguf_writer import Model, describe, encode, write
from tests.support.tiny import write_checkpoint

SPEC = CacheSpec(context_length=96, prefill_chunk=12, dtype=torch.bfloat16)
# One of each kind of layer, wide enough for blocks of 256 weights.
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "global_head_dim": 128, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("cuda-weights") / "plain", **WIDE)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    quantize_checkpoint(folder, folder.with_name("quantized"), load_recipe("default"))
    return open_checkpoint(folder.with_name("quantized"))


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every constant that torch.export sees, by its name there."""
    step = Step(model)
    return {**dict(step.named_parameters()), **dict(step.named_buffers())}


def stored(path: Path) -> dict[str, bytes]:
    """Key -> bytes, read by ExecuTorch."""
    payload = FlatTensorSerializer().deserialize(Cord(path.read_bytes()))
    return {key: payload.buffers[entry.buffer_index] for key, entry in payload.named_data.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(path: Path, signature: Signature, checkpoint: Checkpoint) -> None:
    """The file has exactly the buffers of a model that was filled in memory."""
    expected = buffers(fill(CudaModel(signature), checkpoint))
    found = stored(path)
    assert found.keys() == {f"cuda_fqn_weight:cuda:{name}" for name in expected}
    for entry in weight_entries(signature):
        tensor = expected[entry.fqn]
        assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert found[entry.storage_key] == raw(tensor), entry.fqn


@pytest.mark.parametrize("kv_format", ["bf16", "folded-tq4"])
@pytest.mark.parametrize("recipe", ["default", "sensitive"])
def test_executorch_reads_every_buffer_of_a_quantized_checkpoint(
    folder: Path, tmp_path: Path, recipe: str, kv_format: str
) -> None:
    quantize_checkpoint(folder, tmp_path / "quantized", load_recipe(recipe))
    checkpoint = open_checkpoint(tmp_path / "quantized")
    signature = Signature.of(checkpoint, SPEC, kv_format)
    write_weights(tmp_path / "model.ptd", signature, checkpoint)
    assert_holds(tmp_path / "model.ptd", signature, checkpoint)


@pytest.mark.parametrize("kind", [GGML.Q4_K, GGML.Q6_K, GGML.Q5_K, GGML.Q4_0, GGML.Q8_0, GGML.Q4_1, GGML.Q2_K])
def test_a_gguf_file_needs_no_conversion(folder: Path, tmp_path: Path, kind: GGML) -> None:
    """The bytes are those of the checkpoint that `g4 convert-gguf` makes of it."""
    file = write(tmp_path / "model.gguf", mixed(folder, kind))
    source = GGUFCheckpoint([file])
    signature = Signature.of(source.first_rows(), SPEC, "folded")
    write_weights(tmp_path / "direct.ptd", signature, source)
    convert_gguf([file], tmp_path / "converted")
    converted = open_checkpoint(tmp_path / "converted")
    assert Signature.of(converted, SPEC, "folded") == signature
    assert_holds(tmp_path / "direct.ptd", signature, converted)
    write_weights(tmp_path / "converted.ptd", signature, converted)
    assert (tmp_path / "direct.ptd").read_bytes() == (tmp_path / "converted.ptd").read_bytes()


def mixed(folder: Path, kind: GGML) -> Model:
    """A model of one type with a Q6_K embedding and two projections in Q6_K beside unlike neighbours."""
    model = describe(folder, kind, embedding=GGML.Q6_K)
    values = np.random.default_rng(5).normal(size=(256, 256)).astype(np.float32)
    for name, rows in (("blk.0.attn_v.weight", 128), ("blk.1.ffn_up.weight", 256)):
        model.tensors[name] = encode(values[:rows], GGML.Q6_K, np.random.default_rng(6))
        model.types[name] = GGML.Q6_K
    return model


def test_a_gguf_checkpoint_reads_like_a_converted_one(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", mixed(folder, GGML.Q4_K))
    source = GGUFCheckpoint([file])
    convert_gguf([file], tmp_path / "converted")
    converted = open_checkpoint(tmp_path / "converted")
    assert source.is_quantized
    assert source.config == converted.config
    assert source.names() == converted.names()
    assert source.recipe == converted.manifest.head.recipe
    assert source.totals.parameters == converted.manifest.head.totals.parameters
    assert source.assets["tokenizer.json"] == (tmp_path / "converted" / "tokenizer.json").read_bytes()
    for (name, tensor), (_, expected) in zip(source.stream(), converted.stream(), strict=True):
        assert type(tensor) is type(expected), name
        for part in getattr(expected, "tensor_data_names", []):
            assert torch.equal(getattr(tensor, part), getattr(expected, part)), name


def test_a_damaged_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    model = mixed(folder, GGML.Q4_K)
    model.tensors["blk.1.ffn_down.weight"][5, 0:2] = (0, 0x7C)  # infinity in float16
    source = GGUFCheckpoint([write(tmp_path / "model.gguf", model)])
    signature = Signature.of(source.first_rows(), SPEC, "bf16")
    with pytest.raises(G4Error, match=r"Tensor blk\.1\.ffn_down\.weight of .* has scales that are not finite"):
        write_weights(tmp_path / "model.ptd", signature, source)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("kind", [None, GGML.Q4_K, GGML.Q4_0], ids=["checkpoint", "Q4_K", "Q4_0"])
def test_same_weights_same_bytes(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: GGML | None
) -> None:
    """Also of a few rows at a time, whose parts begin in the midst of a page, and written past the page cache."""
    source, shown = checkpoint, checkpoint
    if kind is not None:
        source = GGUFCheckpoint([write(tmp_path / "model.gguf", mixed(folder, kind))])
        shown = source.first_rows()
    signature = Signature.of(shown, SPEC, "folded")
    hashes = set()
    for place, page, slab, threads in (("a", PAGE, 1 << 21, 2), ("b/c", 1, 1000, 8), ("a", 1, 4096, 1)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(weights, "PAGE", page)
        monkeypatch.setattr(weights, "_SLAB_WEIGHTS", slab)
        monkeypatch.setattr(weights, "_MAX_THREADS", threads)
        monkeypatch.setattr(bulk_file, "DIRECT_BYTES", slab)
        write_weights(tmp_path / place / "model.ptd", signature, source)
        hashes.add(hashlib.sha256((tmp_path / place / "model.ptd").read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize("columns", [256, 5376, 8192, 21_504])
@pytest.mark.parametrize("weight_format", [WeightFormat(4, 32, True), WeightFormat(6, 16, False)], ids=["4", "6"])
def test_slabs_end_with_pages(weight_format: WeightFormat, columns: int) -> None:
    """What ends in the midst of a page is put together, and written page by page: that took longer than all else."""
    with torch.device("meta"):
        matrix = PackedMatrix(weight_format, 65_536, columns)
    rows = weights._slab_rows(matrix)
    assert weights._SLAB_WEIGHTS <= rows * columns < 8 * weights._SLAB_WEIGHTS
    assert all(rows * part[0].nbytes % PAGE == 0 for part in matrix.buffers())


def test_other_weights_of_one_signature_have_the_same_layout(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(
        write_checkpoint(tmp_path / "plain", seed=1, **WIDE), tmp_path / "other", load_recipe("default")
    )
    files = []
    for name, source in (("one.ptd", checkpoint), ("two.ptd", open_checkpoint(tmp_path / "other"))):
        write_weights(tmp_path / name, Signature.of(source, SPEC, "bf16"), source)
        files.append((tmp_path / name).read_bytes())
    assert len(files[0]) == len(files[1])
    assert files[0] != files[1]
    assert files[0][:ALIGNMENT] == files[1][:ALIGNMENT]


def test_empty_caches_take_no_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    signature = Signature.of(checkpoint, CacheSpec(65_536, 12, torch.bfloat16), "folded")
    path = tmp_path / "model.ptd"
    write_weights(path, signature, checkpoint)
    caches = {entry.storage_key: entry for entry in weight_entries(signature) if entry.is_state}
    assert {key.rsplit(".", 1)[-1] for key in caches} == {"k", "v", "arrived"}
    assert state_bytes(signature) == sum(entry.nbytes for entry in caches.values()) > 16 << 20
    assert path.stat().st_blocks * 512 <= planned_bytes(signature) + ALIGNMENT < path.stat().st_size
    found = stored(path)
    for key, entry in caches.items():
        assert len(found[key]) == entry.nbytes
        assert not any(found[key])


def test_the_runtime_loads_such_a_file(tmp_path: Path) -> None:
    """A program of ExecuTorch's own with its constants in a file of ours, one of them in the hole."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(3, 5))
            self.register_buffer("bias", torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    x, weight = torch.randn(2, 3), torch.randn(3, 5)
    config = ExecutorchBackendConfig(external_constants=True)
    (tmp_path / "model.pte").write_bytes(to_edge(torch.export.export(Affine(), (x,))).to_executorch(config).buffer)
    bias = DataTensor("bias", torch.float32, (5,), 20, is_zero=True)
    layout = lay_out([bias, DataTensor("weight", torch.float32, (3, 5), 60)])
    with writing(tmp_path / "model.ptd", layout) as writer:
        writer.write("weight", 20, memoryview(raw(weight))[20:])
        writer.write("weight", 0, memoryview(raw(weight))[:20])
    method = Runtime.get().load_program(tmp_path / "model.pte", data_path=tmp_path / "model.ptd").load_method("forward")
    torch.testing.assert_close(method.execute([x])[0], x @ weight)


def test_a_disk_that_is_too_small_is_noticed_first(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = Signature.of(checkpoint, SPEC, "bf16")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=planned_bytes(signature) - 1))
    with pytest.raises(G4Error, match=r"Writing model\.ptd needs .* on the disk of .*, which has .* free"):
        write_weights(tmp_path / "model.ptd", signature, checkpoint)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_to, left = os.pwrite, iter(range(40))

    def limited(handle: int, data: memoryview, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_to(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(G4Error, match=r"Writing model\.ptd to .* failed: No space left on device"):
        write_weights(tmp_path / "model.ptd", Signature.of(checkpoint, SPEC, "bf16"), checkpoint)
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_disk_that_shows_late_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the page cache may fail to get to the disk."""

    def failing(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    layout = lay_out([DataTensor("a", torch.uint8, (64,), 64)])
    with pytest.raises(G4Error, match="Input/output error"), writing(tmp_path / "model.ptd", layout) as writer:
        writer.write("a", 0, memoryview(bytes(64)))
    assert not any(tmp_path.iterdir())


def test_what_is_not_quantized_is_refused_by_name(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    signature = Signature.of(checkpoint, SPEC, "bf16")
    with pytest.raises(G4Error, match=r"model\.embed_tokens\.weight is not quantized"):
        write_weights(tmp_path / "model.ptd", signature, open_checkpoint(folder))
    assert not any(tmp_path.iterdir())


PACK = """
import os, signal, sys, threading, time
from contextlib import nullcontext
from pathlib import Path
import torch
from gemma4cli.export.cuda.model import Signature
from gemma4cli.export.cuda.weights import write_weights
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.quant.checkpoint import open_checkpoint

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

class Watch:
    calls = peak = 0
    def phase(self, label, total, unit="B"):
        return nullcontext(self)
    def advance(self, amount, label=None):
        self.calls += 1
        if self.calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    def sample(self):
        while True:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)

checkpoint = open_checkpoint(Path(sys.argv[1]))
signature = Signature.of(checkpoint, CacheSpec(96, 12, torch.bfloat16), "bf16")
watch = Watch()
before = anonymous()
threading.Thread(target=watch.sample, daemon=True).start()
write_weights(Path(sys.argv[2]), signature, checkpoint, watch)
print(watch.peak - before)
"""


def pack(source: Path, target: Path, killed_after: int = 0) -> subprocess.CompletedProcess[str]:
    """Pack in a process of its own, which prints by how many bytes its own memory grew at most."""
    command = [sys.executable, "-c", PACK, str(source), str(target), str(killed_after)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_memory_holds_a_few_slabs_of_a_large_matrix(tmp_path: Path) -> None:
    """An embedding of 65,536 x 1,024: as codes in 16 bits, which packing takes on the way, all of it has 128 MiB."""
    sizes = {**WIDE, "hidden_size": 1024, "vocab_size": 65_536, "intermediate_size": 64, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "plain", dtype=torch.bfloat16, vision=False, **sizes)
    quantize_checkpoint(source, tmp_path / "quantized", load_recipe("default"))
    run = pack(tmp_path / "quantized", tmp_path / "model.ptd")
    assert run.returncode == 0, run.stderr
    slabs = (os.cpu_count() or 1) * weights._SLAB_WEIGHTS
    assert int(run.stdout) < 16 * slabs + (32 << 20) < 65_536 * 1024 * 2


def test_a_kill_leaves_no_file_and_the_next_run_makes_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    signature = Signature.of(checkpoint, SPEC, "bf16")
    write_weights(tmp_path / "whole.ptd", signature, checkpoint)
    killed = pack(checkpoint.path, tmp_path / "model.ptd", killed_after=20)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "model.ptd").exists()
    write_weights(tmp_path / "model.ptd", signature, checkpoint)
    assert (tmp_path / "model.ptd").read_bytes() == (tmp_path / "whole.ptd").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ptd", "whole.ptd"]
