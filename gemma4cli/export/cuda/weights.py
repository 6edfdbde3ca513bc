"""What the `.ptd` of a CUDA program holds: one entry per buffer of ``CudaModel``, under the delegate's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma4cli.export.cuda.layers import CudaCache, TurboQuant
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.weights import WeightEntry, entries_of, layout_of, write_packed
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint


def weight_entries(signature: Signature) -> list[WeightEntry]:
    """List every buffer and parameter of the program, in the order of the file but for the caches, which come last."""
    return _entries(_meta_model(signature))


def planned_bytes(signature: Signature) -> int:
    """Return what the `.ptd` takes on the disk. Its size as listed is larger: empty caches are a hole in it."""
    return layout_of(weight_entries(signature)).written_bytes


def state_bytes(signature: Signature) -> int:
    """Return the bytes of all caches on the device."""
    return sum(entry.nbytes for entry in weight_entries(signature) if entry.is_state)


def write_weights(path: Path, signature: Signature, checkpoint: Checkpoint, progress: Progress = SILENT) -> None:
    """Pack a checkpoint into the data file `path`, which is whole afterwards or not there.

    Args: checkpoint: one whose signature this is.
    Raises: G4Error when the disk is too small or fails, or a weight has no packed form.
    """
    model = _meta_model(signature)
    write_packed(path, model, _entries(model), _constants(model), checkpoint, progress)


def _meta_model(signature: Signature) -> CudaModel:
    with torch.device("meta"):
        return CudaModel(signature)


def _entries(model: CudaModel) -> list[WeightEntry]:
    # The key is formed as in `executorch/backends/cuda/cuda_weight_collector.py`.
    return entries_of(model, lambda fqn: f"cuda_fqn_weight:cuda:{fqn}", lambda module: isinstance(module, CudaCache))


def _constants(model: CudaModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what no checkpoint holds: the numbers that the architecture and the KV format bring along."""
    scale = model.config.hidden_size**0.5
    yield "constants.embed_scale", torch.tensor(scale).to(model.dtype)
    for kind, rotary in model.rotary_emb.items():
        yield f"rotary_emb.{kind}.inv_freq", rotary.inv_freq
    if model.turboquant is not None:
        sizes = [buffer.shape[0] for name, buffer in model.turboquant.named_buffers() if name != "table"]
        for name, buffer in _built_on_cpu(sizes).named_buffers():
            yield f"turboquant.{name}", buffer


def _built_on_cpu(sizes: list[int]) -> nn.Module:
    with torch.device("cpu"):
        return TurboQuant(sizes)
