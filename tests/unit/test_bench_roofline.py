"""Bytes per decoded token, counted a second way; the bound; the bandwidth of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma4cli.benchmark.bandwidth import Bandwidth, measure_bandwidth
from gemma4cli.benchmark.plan import Case
from gemma4cli.benchmark.roofline import KVTraffic, Roofline, Traffic, model_traffic, sum_weights
from gemma4cli.errors import G4Error
from gemma4cli.inspection.files import Span
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import SafetensorsReader, build_model
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.tiny import write_checkpoint

TRAFFIC = Traffic(1000, (KVTraffic(10, window=4), KVTraffic(3, window=None)))


def test_a_window_ends_the_growth_of_its_layers() -> None:
    assert [TRAFFIC.kv_bytes(position) for position in (0, 3, 4, 9)] == [13, 52, 55, 70]


def test_bytes_per_token_are_averaged_over_the_decoded_tokens() -> None:
    assert TRAFFIC.bytes_per_token(Case(0, 0, 1)) == 1013
    assert TRAFFIC.bytes_per_token(Case(9, 0, 2)) == 1000 + (70 + 73) / 2
    assert TRAFFIC.bytes_per_token(Case(4, 5, 1, "text")) == 1070


def test_the_bound_is_the_better_bandwidth_over_the_bytes() -> None:
    roofline = Roofline(TRAFFIC, Bandwidth("cpu", 1, 1 << 20, copy=2026.0, read=1013.0))
    assert roofline.bound(Case(0, 0, 1)) == 2.0
    assert roofline.bound(Case(0, 512, 0)) is None
    assert Roofline(TRAFFIC, None).bound(Case(0, 0, 1)) is None


def test_of_stored_weights_only_what_every_token_reads_counts() -> None:
    def at(offset: int, size: int) -> tuple[Path, Span]:
        return Path("weights.ptd"), Span(offset, size)

    table, layer, cache = (at(0, 1000), "model.embed_tokens.codes"), (at(1000, 30), "model.layers.0.q_proj.codes"), (
        at(1030, 500), "model.layers.0.self_attn.kv_cache.k")  # fmt: skip
    assert sum_weights([table, layer, cache], vocab_size=100) == 1030, "the embedding is the head, too"
    assert sum_weights([table, layer, (at(0, 1000), "model.lm_head.weight0")], vocab_size=100) == 1030
    assert sum_weights([table, layer, (at(2000, 600), "model.lm_head.weight0")], vocab_size=100) == 10 + 30 + 600


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_reads_every_weight_once_and_one_row_of_a_lookup_table(tmp_path: Path, tied: bool) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    reader = SafetensorsReader(folder)
    model = build_model(reader, CacheSpec(96, 12, torch.float32), torch.float32, "cpu")
    traffic = model_traffic(model)
    shapes = reader.config.parameter_shapes()
    embedding = shapes["model.embed_tokens.weight"]
    assert ("lm_head.weight" in shapes) != tied
    numbers = sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith("layer_scalar"))
    expected = numbers if tied else numbers - (embedding[0] - 1) * embedding[1]
    assert traffic.weight_bytes == 4 * expected
    # Ten sliding layers: 2 KV heads of 16; two full ones: 1 of 32. Keys and values, float32.
    assert set(traffic.kv) == {KVTraffic(10 * 2 * 2 * 16 * 4, 8), KVTraffic(2 * 2 * 1 * 32 * 4, None)}


def test_codes_count_as_they_are_stored(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny")
    quantize_checkpoint(source, tmp_path / "int4", load_recipe("default"))
    reader = open_checkpoint(tmp_path / "int4")
    model = build_model(reader, CacheSpec(96, 12, torch.float32), torch.float32, "cpu")
    stored = model_traffic(model).weight_bytes
    assert stored < sum(4 * torch.Size(shape).numel() for shape in reader.config.parameter_shapes().values()) / 2
    assert stored == pytest.approx(reader.manifest.head.totals.weight_bytes, rel=0.05)


def test_the_bandwidth_of_this_machine_is_measured_in_another_process() -> None:
    threads = torch.get_num_threads()
    band = measure_bandwidth(5e6, "cpu", 1)
    assert (band.device, band.threads) == ("cpu", 1)
    assert band.buffer_bytes == 5_000_000
    assert 1e8 < band.copy < 1e13
    assert 1e8 < band.read < 1e13
    assert band.best == max(band.copy, band.read)
    assert torch.get_num_threads() == threads


def test_a_device_that_is_not_there_has_no_bandwidth() -> None:
    with pytest.raises(G4Error, match="The memory bandwidth cannot be measured: "):
        measure_bandwidth(1e6, "warp", 1)
