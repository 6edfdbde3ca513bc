"""What is measured: a bundle in the C++ runner, or a checkpoint in PyTorch, with everything that is known of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4cli.benchmark.roofline import Traffic, bundle_traffic, model_traffic
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import FORMAT, Bundle, open_bundle
from gemma4cli.files import read_json
from gemma4cli.model.config import Gemma4Config
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.manifest import MANIFEST_FILE, CheckpointManifest, recipe_name

if TYPE_CHECKING:
    from gemma4cli.engine.compiled import CompiledEngine
    from gemma4cli.engine.eager import EagerEngine
    from gemma4cli.engine.runner import RunnerEngine

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class LoadedSubject:
    """A subject that is ready to run.

    threads: on the CPU; backends: as llama-bench's column; chunk: most prompt tokens per step.
    """

    engine: RunnerEngine | EagerEngine | CompiledEngine
    threads: int
    backends: str
    chunk: int
    load_s: float
    traffic: Traffic


class Subject(ABC):
    """One model in one form. `device` is "cpu" or "cuda…", `model_size` bytes of weights, `source` where it is from."""

    path: Path
    engine_name: str
    device: str
    context_length: int
    kv_format: str
    model_size: int
    recipe: str | None
    source: dict[str, Any] | None

    @property
    @abstractmethod
    def config(self) -> Gemma4Config: ...

    @abstractmethod
    def load(self, threads: int | None, progress: Progress = SILENT) -> LoadedSubject:
        """Load it. `threads` None leaves their number to the engine."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.config.parameter_shapes().values())

    def describe(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "engine": self.engine_name,
            "device": self.device,
            "context_length": self.context_length,
            "kv_format": self.kv_format,
            "weight_bytes": self.model_size,
            "parameters": self.parameters,
            "recipe": self.recipe,
            "source": self.source,
        }


@dataclass
class BundleSubject(Subject):
    """An exported program, in the C++ runner, or, compiled for a GPU, hosted by PyTorch (`engine_name` "torch").

    Raises: G4Error for a bundle that is not for a GPU and yet is to run in PyTorch.
    """

    bundle: Bundle
    engine_name: str = "runner"

    def __post_init__(self) -> None:
        manifest = self.bundle.manifest
        self.path = self.bundle.path
        if self.engine_name == "torch" and manifest.backend != "cuda":
            raise G4Error(
                f"--engine torch runs compiled CUDA code; {self.path} is for the {manifest.backend}.",
                hint="Leave --engine away.",
            )
        self.device = "cpu" if manifest.backend == "cpu" else "cuda"
        self.context_length = manifest.contract.context_length
        self.kv_format = ", ".join(dict.fromkeys(record.format for record in manifest.kv.values()))
        self.model_size = manifest.memory.weight_bytes
        self.recipe = recipe_name(manifest.model.get("recipe"))
        self.source = manifest.model.get("source")

    @property
    def config(self) -> Gemma4Config:
        return Gemma4Config.from_dir(self.path)

    def load(self, threads: int | None, progress: Progress = SILENT) -> LoadedSubject:
        if self.engine_name == "torch":
            return self._load_into_torch(progress)
        from gemma4cli.engine.runner import RunnerEngine

        engine = RunnerEngine(self.path, threads=threads)
        contract = engine.contract
        backends = ",".join(contract["backends"]) or "CPU"
        return LoadedSubject(
            engine,
            contract["threads"],
            backends,
            contract["prefill_chunk"],
            engine.load_s,
            bundle_traffic(self.bundle),
        )

    def _load_into_torch(self, progress: Progress) -> LoadedSubject:
        import torch

        from gemma4cli.engine.compiled import CompiledEngine

        engine = CompiledEngine.from_bundle(self.path, progress)
        chunk, threads = engine.contract.prefill_chunk, torch.get_num_threads()
        return LoadedSubject(engine, threads, "CUDA in PyTorch", chunk, engine.load_s, bundle_traffic(self.bundle))


@dataclass
class CheckpointSubject(Subject):
    """A checkpoint, plain or quantized, in PyTorch. `context` None means 4,096, or the model's if that is less."""

    path: Path
    device: str = "cpu"
    compile: bool = False
    context: int | None = None

    def __post_init__(self) -> None:
        self.engine_name = "eager"
        self.context_length = self.context or min(DEFAULT_CONTEXT, self.config.max_position_embeddings)
        self.kv_format = "float32" if self.device == "cpu" else "bfloat16"
        self.recipe = self.source = None
        if (self.path / MANIFEST_FILE).is_file():
            manifest = CheckpointManifest.read(self.path)
            document = manifest.to_json()
            self.recipe, self.source = recipe_name(manifest.head.recipe), document["source"]
            self.model_size = manifest.head.totals.weight_bytes
        else:
            self.model_size = sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @property
    def config(self) -> Gemma4Config:
        return Gemma4Config.from_dir(self.path)

    def load(self, threads: int | None, progress: Progress = SILENT) -> LoadedSubject:
        import torch

        from gemma4cli.engine.eager import EagerEngine

        if threads is not None:
            torch.set_num_threads(threads)
        engine = EagerEngine.from_checkpoint(
            self.path,
            context_length=self.context_length,
            device=self.device,
            compile=self.compile,
            progress=progress,
        )
        backends = "PyTorch" + (" compiled" if self.compile else "")
        traffic = model_traffic(engine.model)
        return LoadedSubject(
            engine, torch.get_num_threads(), backends, engine.model.cache.prefill_chunk, engine.load_s, traffic
        )


def open_subject(
    path: Path,
    *,
    engine: str | None = None,
    device: str | None = None,
    compile: bool = False,
    context: int | None = None,
) -> BundleSubject | CheckpointSubject:
    """Find out what a folder is.

    Args:
        engine: of a bundle, "runner" or "torch"; None is the runner.
    Raises: G4Error for a folder that is neither, and for options that it does not take.
    """
    if not _is_bundle(path):
        if not (path / "config.json").is_file():
            raise G4Error(f"{path} is neither a bundle nor a checkpoint.", hint="Name what g4 export or g4 pull made.")
        if engine is not None:
            raise G4Error(f"{path} is a checkpoint; --engine is for bundles.", hint="Leave --engine away.", exit_code=2)
        return CheckpointSubject(path, device or "cpu", compile, context)
    given = {"--device": device is not None, "--compile": compile, "--ctx": context is not None}
    if any(given.values()):
        raise G4Error(
            f"{path} is a bundle, whose {', '.join(name for name, is_given in given.items() if is_given)} was fixed "
            "when it was exported.",
            hint="Export it again, or name a checkpoint.",
            exit_code=2,
        )
    return BundleSubject(open_bundle(path), engine or "runner")


def _is_bundle(path: Path) -> bool:
    manifest = path / MANIFEST_FILE
    document = read_json(manifest) if manifest.is_file() else None
    return isinstance(document, dict) and document.get("format") == FORMAT
