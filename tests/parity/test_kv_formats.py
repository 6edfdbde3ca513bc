"""What the caches' formats cost a trained model: the demo, on text of its own kind."""

from __future__ import annotations

import pytest
import torch

from bench.kv_formats import STEP, compare, logits
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.packed import fill
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.tokenizer import Tokenizer
from gemma4cli.quant.checkpoint import Checkpoint, open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.chat_fixture import DEMO

TOKENS = 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("kv-formats") / "demo"
    quantize_checkpoint(DEMO, folder, load_recipe("default"))
    return open_checkpoint(folder)


def made(checkpoint: Checkpoint, kv_format: str) -> torch.Tensor:
    tokens = torch.tensor([Tokenizer.from_dir(DEMO).encode((DEMO / "eval.txt").read_text())[:TOKENS]])
    signature = Signature.of(checkpoint, CacheSpec(TOKENS, STEP, torch.float32), kv_format)
    return logits(fill(CudaModel(signature), checkpoint), tokens)


def test_folding_costs_nothing_eight_bits_next_to_it_and_four_little(checkpoint: Checkpoint) -> None:
    exact = made(checkpoint, "bf16")
    assert compare(made(checkpoint, "folded"), exact)["cosine_worst"] > 0.99999
    eight = compare(made(checkpoint, "folded-q8"), exact)
    assert eight["cosine_worst"] > 0.9999
    assert eight["kl_divergence_nats"] < 1e-4
    coarse = compare(made(checkpoint, "folded-tq4"), exact)
    assert coarse["cosine_median"] > 0.9997
    assert coarse["kl_divergence_nats"] < 0.01
