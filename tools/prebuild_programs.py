"""Compile the CUDA programs of standard configurations ahead, from shapes alone: no checkpoint, no GPU.

    python tools/prebuild_programs.py CONFIG.json --mix q4_k_m --ctx 128k --kv folded --target sm_90 --out DIR

DIR may be given to users: with G4_PROGRAMS=DIR, or as gemma4cli/data/programs in a wheel, their `g4 export` of such a
model packs weights and compiles nothing. A mix is a built-in recipe, or one of llama.cpp's:

    q4_0     every matrix Q4_0, the embedding Q6_K
    q4_k_m   Q4_K; Q6_K for the embedding, and for v and down in the first and last eighth of the layers that have one
             and every third between (llama.cpp, `use_more_bits`)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import typer

from gemma4cli.commands.options import parse_count
from gemma4cli.console import open_console
from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.compile import compiled_libraries
from gemma4cli.export.cuda.layers import KV_FORMATS
from gemma4cli.export.cuda.model import Signature
from gemma4cli.export.cuda_backend import DEFAULT_CHUNK
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.kernels.targets import TARGETS, get_target
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.quant.pack import packed_format
from gemma4cli.quant.quantize import stored_layout
from gemma4cli.quant.recipe import BUILT_IN, load_recipe
from gemma4cli.quant.tensors import is_quantized


def q4_k_m(name: str, index: int, count: int) -> WeightFormat:
    """The format of a matrix, the `index`-th of `count` with its name."""
    better = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
    return _Q6 if name == "embed_tokens" or (better and name in ("v_proj", "down_proj")) else _Q4_WITH_MIN


def q4_0(name: str, index: int, count: int) -> WeightFormat:
    """As ``q4_k_m``."""
    return _Q6 if name == "embed_tokens" else _Q4


_Q4, _Q4_WITH_MIN, _Q6 = WeightFormat(4, 32, False), WeightFormat(4, 32, True), WeightFormat(6, 16, False)
MIXES = {"q4_k_m": q4_k_m, "q4_0": q4_0}


def formats_of(config: Gemma4Config, mix: str) -> dict[str, WeightFormat]:
    """Return the packed format of every matrix of a model quantized by a recipe or a mix."""
    if mix in BUILT_IN:
        layout = {
            what.name: stored_layout(what, torch.bfloat16)
            for what in load_recipe(mix).assign(config, separate_head=False)
        }
        return {name: packed_format(tensor, name) for name, tensor in layout.items() if is_quantized(tensor)}
    matrices = [name for name, shape in config.parameter_shapes().items() if len(shape) == 2]
    kinds: dict[str, list[str]] = {}
    for name in matrices:
        kinds.setdefault(name.split(".")[-2], []).append(name)
    return {
        name: MIXES[mix](kind, index, len(names)) for kind, names in kinds.items() for index, name in enumerate(names)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the model's config.json")
    parser.add_argument("--mix", choices=[*BUILT_IN, *MIXES], required=True)
    parser.add_argument("--ctx", type=_count, required=True)
    parser.add_argument("--chunk", type=_count, default=DEFAULT_CHUNK)
    parser.add_argument("--kv", choices=KV_FORMATS, required=True)
    parser.add_argument("--target", choices=list(TARGETS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        config = Gemma4Config.from_json(json.loads(options.config.read_text()))
        spec = CacheSpec(options.ctx, options.chunk, torch.bfloat16)
        signature = Signature(config, formats_of(config, options.mix), spec, options.kv)
        compiled_libraries(signature, get_target(options.target), options.out, open_console().progress())
    except (G4Error, OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except typer.BadParameter as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()
