"""Write quantized checkpoints as ExecuTorch's gemma4_31b example does: torchao's saver, its own names, no g4.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.groupwise import quantize
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.tensors import MatrixBuilder
from gemma4cli.quant.torchao_types import flatten_tensor_state_dict

ASSETS = ("config.json", "tokenizer.json", "tokenizer_config.json")
LENT = ("generation_config.json", "chat_template.jinja")
_INT4 = QuantSpec(4, 32, False, "min-max")
_INT8 = QuantSpec(8, 0, True, "min-max")


def quantized_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Quantize a plain folder by ExecuTorch's default recipe: int4 in groups of 32, embedding int8 per row, lm_head."""
    reader = open_checkpoint(source)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in reader.stream()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return {
        name: _quantized(tensor, _INT8 if "embed" in name else _INT4) if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def _quantized(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    builder = MatrixBuilder((weight.shape[0], weight.shape[1]), spec)
    builder.put(0, quantize(weight.float(), spec))
    return builder.finish()


def executorch_name(name: str) -> str:
    """Return what ExecuTorch's model calls one of our parameters."""
    return name.removeprefix("model.")


def save(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor], *, lent: bool = True) -> Path:
    """Write tensors by our names, and the files beside them; without `lent` only those that ExecuTorch copies."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces, metadata = flatten_tensor_state_dict({executorch_name(name): t for name, t in tensors.items()})
    save_file(pieces, folder / "model.safetensors", metadata=metadata)
    for name in (*ASSETS, *(LENT if lent else ())):
        shutil.copyfile(source / name, folder / name)
    return folder
