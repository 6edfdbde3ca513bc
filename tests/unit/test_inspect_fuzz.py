"""Whatever bytes are given, `g4 inspect-pte` answers or says in one sentence what is wrong, and quickly.

More than 2,000 damaged files, the same in every run: bits flipped, numbers made huge, pieces cut, moved and doubled.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from executorch.exir.tensor_layout import TensorLayout

from gemma4cli.commands import inspect_views
from gemma4cli.console import Console
from gemma4cli.errors import G4Error
from gemma4cli.inspection import documents
from gemma4cli.inspection.artifact import open_artifact
from gemma4cli.inspection.cubin import read_cubin
from gemma4cli.inspection.delegates import read_blob
from gemma4cli.inspection.flatbuffer import Malformed
from gemma4cli.inspection.gpus import GPUS
from gemma4cli.inspection.library import read_library
from gemma4cli.inspection.predict import check_gpu
from tests.support import programs
from tests.support.gpu_library import FakeKernel, build_library, cubin, fatbin
from tests.support.mini_program import mini_program

KERNEL = FakeKernel("scale", static_shared=2048, dynamic_shared=4096, launches=2)
SLOWEST_S = 2.0
"""No input may take this long; a sound one of this size takes milliseconds."""

Mutation = Callable[[random.Random, bytearray], None]


def flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_bits_at_the_start(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)


def write_a_huge_number(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 3)):
        size = rng.choice((2, 4, 8))
        value = rng.choice(
            (2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 0, len(data), len(data) * 4)
        )
        place = rng.randrange(max(1, len(data) - size)) // size * size
        data[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def cut_the_end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def cut_the_middle(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 256)]


def move_a_piece(rng: random.Random, data: bytearray) -> None:
    size = rng.randrange(1, 128)
    source, target = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[source : source + size]
    data[target : target + len(piece)] = piece


def fill_with_noise(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    size = min(rng.randrange(1, 512), len(data) - start)
    data[start : start + size] = rng.randbytes(size)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, flip_bits_at_the_start, write_a_huge_number, cut_the_end, cut_the_middle, move_a_piece, fill_with_noise,
)  # fmt: skip


def mutants(seed: bytes, count: int, name: str) -> list[bytes]:
    rng = random.Random(name)
    made = []
    for index in range(count):
        data = bytearray(seed)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if data:
                MUTATIONS[index % len(MUTATIONS)](rng, data)
        made.append(bytes(data))
    return made


def assert_sentence(message: str) -> None:
    assert message.endswith(".") and "\n" not in message and len(message) < 400, message


def look_at_everything(paths: list[Path], *, draw: bool = True) -> str:
    """Make all views of an artifact; returns what a terminal would get."""
    artifact = open_artifact(paths)
    document = {"overview": documents.overview(artifact)}
    for view in (documents.methods, documents.delegates, documents.weights, documents.state, documents.memory):
        document[view.__name__] = view(artifact)
    document["check"] = documents.check(check_gpu(artifact, GPUS["4090"]))
    out = io.StringIO()
    if draw:
        inspect_views.draw(Console(stdout=out), document)
    return out.getvalue()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    entries = [("elf", "sm_80", cubin(KERNEL, "sm_80"), False), ("ptx", "sm_80", b"ptx", True)]
    return build_library(tmp_path_factory.mktemp("library"), [KERNEL], {KERNEL.name: fatbin(entries)})


def survive(make: Callable[[], object]) -> bool:
    """Run one input; returns whether it was accepted."""
    started = time.monotonic()
    try:
        make()
        accepted = True
    except G4Error as error:
        assert_sentence(error.message)
        accepted = False
    except Malformed as error:
        assert_sentence(f"{error}.")
        accepted = False
    assert time.monotonic() - started < SLOWEST_S
    return accepted


def test_damaged_programs(library: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    accepted = 0
    # A lone cubin stands for the library where damage should hit the rest of the file.
    small, whole = programs.cuda_program(cubin(KERNEL, "sm_90a")), programs.cuda_program(library)
    for name, seed, count in (("cuda", small, 600), ("library", whole, 100), ("xnnpack", mini_program(), 200)):
        for index, data in enumerate(mutants(seed, count, name)):
            path.write_bytes(data)
            accepted += survive(lambda index=index: look_at_everything([path], draw=index % 5 == 0))
    assert 100 < accepted < 800, "the damage is too weak or too strong to test anything"


def test_damaged_data_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.ptd"
    layout = TensorLayout(programs.ScalarType.FLOAT, [2, 2], [0, 1])
    names = [f"model.layers.{layer}.self_attn.{part}" for layer in range(3) for part in ("q_proj.weight", "kv_cache.k")]
    seed = programs.data_file({name: bytes(16) for name in names}, dict.fromkeys(names[::2], layout))
    accepted = 0
    for data in mutants(seed, 300, "data"):
        path.write_bytes(data)
        accepted += survive(lambda: look_at_everything([path]))
    assert 20 < accepted < 280


def test_damaged_libraries_and_cubins(library: bytes) -> None:
    accepted = sum(
        survive(lambda data=data: read_library(memoryview(data))) for data in mutants(library, 400, "library")
    )
    code = cubin(KERNEL, "sm_90a")
    accepted += sum(survive(lambda data=data: read_cubin(memoryview(data))) for data in mutants(code, 400, "cubin"))
    assert 50 < accepted < 750


def test_damaged_blobs() -> None:
    accepted = 0
    for data in mutants(programs.cuda_blob(), 400, "blob"):
        accepted += survive(lambda data=data: read_blob("CudaBackend", memoryview(data)))
    assert 50 < accepted < 390


@pytest.mark.parametrize("magic", [b"", b"\0\0\0\0ET12", b"\x14\0\0\0ET12eh00", b"\x14\0\0\0FT01FH01"])
def test_noise(magic: bytes, tmp_path: Path) -> None:
    rng = random.Random(magic)
    path = tmp_path / "noise.pte"
    for size in (0, 1, 7, 8, 40, 64, 100, 5000) * 4:
        path.write_bytes(magic + rng.randbytes(size))
        survive(lambda: look_at_everything([path]))


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "x\x1b[2J\x07\r\n\u202egnp"
    plan = programs.method(evil, [programs.tensor(programs.ScalarType.FLOAT, [1], memory=0, name=evil)], [0], [0])
    (tmp_path / "model.pte").write_bytes(programs.serialize([plan]))
    drawn = look_at_everything([tmp_path / "model.pte"])
    assert "x\\x1b[2J\\x07\\r\\n\\u202egnp" in drawn
    assert all(character.isprintable() or character == "\n" for character in drawn)
