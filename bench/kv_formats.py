"""What KV formats cost the demo model in accuracy: logits against those with a bf16 cache, on text.

    python -m bench.kv_formats --tokens 2048 --out bench/results/kv-formats-demo.json

Runs the CUDA backend's model on the CPU implementations of its kernels, weights of the default recipe (4-bit, the
embedding 8-bit) and float32 activations, so that nothing but the caches of the full layers differs. Logits are compared
after every 8 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4cli.export.cuda.layers import KV_FORMATS
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.packed import fill
from gemma4cli.files import write_json
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.tokenizer import Tokenizer
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.chat_fixture import DEMO

STEP = 8


@torch.no_grad()
def logits(model: CudaModel, tokens: Tensor) -> Tensor:
    """After every STEP tokens: [n, V]."""
    starts = range(0, tokens.shape[1], STEP)
    return torch.stack([model(tokens[:, i : i + STEP], torch.arange(i, i + STEP))[0, 0] for i in starts])


def compare(ours: Tensor, exact: Tensor) -> dict[str, Any]:
    cosines = F.cosine_similarity(ours, exact, dim=1).tolist()
    divergence = F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), reduction="batchmean", log_target=True).item()
    return {
        "cosine_median": statistics.median(cosines),
        "cosine_worst": min(cosines),
        "kl_divergence_nats": divergence,
        "same_token": (ours.argmax(-1) == exact.argmax(-1)).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = Tokenizer.from_dir(DEMO).encode((DEMO / "eval.txt").read_text())
    tokens = torch.tensor([text[: options.tokens // STEP * STEP]])
    with tempfile.TemporaryDirectory() as folder:
        quantize_checkpoint(DEMO, Path(folder) / "demo", load_recipe("default"))
        checkpoint = open_checkpoint(Path(folder) / "demo")
        spec = CacheSpec(tokens.shape[1], STEP, torch.float32)
        made = {
            kv: logits(fill(CudaModel(Signature.of(checkpoint, spec, kv)), checkpoint), tokens) for kv in KV_FORMATS
        }
    report = {
        "tokens": tokens.shape[1],
        "against_bf16": {kv: compare(made[kv], made["bf16"]) for kv in KV_FORMATS if kv != "bf16"},
    }
    print(report)
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
