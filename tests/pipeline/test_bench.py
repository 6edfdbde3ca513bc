"""`g4 bench` on the exported demo model: the numbers, the gate, the comparison, the receipt, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma4cli.export.bundle import open_bundle
from gemma4cli.export.receipt import read_receipt
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.workspace import Workspace
from tests.conftest import Outcome
from tests.support import gguf_writer
from tests.support.bundles import DEMO_MODEL, PACKAGE, demo_bundle, demo_checkpoint
from tests.support.fake_llama_bench import write_llama_bench

RunG4 = Callable[..., Outcome]

SIZES = ("--prompt", "64", "--gen", "16", "--depth", "0,300", "--threads", "1")
QUICK = ("--prompt", "64", "--gen", "16", "--depth", "0", "--threads", "1", "--warmup", "0", "--no-text")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole benchmark of the demo bundle as a JSON file."""
    target = tmp_path_factory.mktemp("measured") / "result.json"
    command = [sys.executable, "-m", "gemma4cli", "bench", demo_bundle(), *SIZES, "--json"]
    done = subprocess.run(
        command, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    )
    target.write_bytes(done.stdout)
    return target


def test_the_document_accounts_for_itself(measured: Path) -> None:
    document = json.loads(measured.read_text())
    records = {(record["test"], record["path"]): record for record in document["tests"]}
    assert set(records) == {
        ("pp64", "model"), ("tg16", "model"), ("pp64+tg16", "text"),
        ("pp64 @ d300", "model"), ("tg16 @ d300", "model"), ("pp64+tg16 @ d300", "text"),
    }  # fmt: skip
    manifest = open_bundle(demo_bundle()).manifest
    for record in records.values():
        tokens = record["n_prompt"] + record["n_gen"]
        assert len(record["samples_ns"]) == 5
        assert record["samples_ts"] == pytest.approx([1e9 * tokens / ns for ns in record["samples_ns"]], rel=1e-6)
        assert min(record["samples_ts"]) <= record["p10_ts"] <= record["median_ts"] <= record["p90_ts"]
        assert (record["n_threads"], record["n_ctx"], record["n_batch"]) == (1, 1024, 256)
        assert record["model_n_params"] == manifest.model["totals"]["parameters"]
        assert record["joules_per_token"] is None
        assert record["executorch_version"] == "1.5.1"
    assert document["engine"]["backends"] == "CPU"
    assert document["model"]["recipe"] == "default"
    assert 10 << 20 < document["memory"]["peak_host_bytes"] < 1 << 30
    assert document["engine"]["load_s"] > 0


def test_the_roofline_is_that_of_the_artifact(measured: Path) -> None:
    """The weights are read once each, the embedding of the untied int8 table by row; the bound holds."""
    document = json.loads(measured.read_text())
    manifest = open_bundle(demo_bundle()).manifest
    roofline = document["roofline"]
    table = 2048 * 256 * WeightFormat(8, 32, has_min=False).bits_per_weight / 8
    stored = manifest.memory.weight_bytes
    assert roofline["weight_bytes_per_token"] == pytest.approx(stored - table, rel=0.02)
    assert roofline["kv"] == [
        {"bytes_per_position": 10 * 2 * 4 * 32 * 4, "window": 64},
        {"bytes_per_position": 2 * 2 * 2 * 64 * 4, "window": None},
    ]
    for record in document["tests"]:
        if record["n_gen"] and record["path"] == "model":
            best = max(roofline["bandwidth"]["copy"], roofline["bandwidth"]["read"])
            assert record["bound_ts"] == pytest.approx(best / record["bytes_per_token"])
            assert 0 < record["of_bound"] < 1
            assert record["of_bound"] == pytest.approx(record["median_ts"] / record["bound_ts"])
        else:
            assert record["bound_ts"] is None
    at_0, at_300 = (r["bytes_per_token"] for r in document["tests"] if r["test"].startswith("tg16"))
    assert at_300 - at_0 == pytest.approx(64 * 10240 + 308.5 * 2048 - 8.5 * (10240 + 2048))


def change_medians(measured: Path, target: Path, factor: float) -> Path:
    document = json.loads(measured.read_text())
    for record in document["tests"]:
        record["median_ts"] *= factor
    target.write_text(json.dumps(document))
    return target


def test_the_gate_fails_on_a_regression_only(g4: RunG4, measured: Path, tmp_path: Path) -> None:
    run = ("bench", demo_bundle(), *QUICK, "--repeats", "2")
    slow = g4(*run, "--baseline", change_medians(measured, tmp_path / "fast.json", 1000), "--fail-below", "5%")
    assert slow.code == 1
    assert "warning: pp64 fell by 99." in slow.err
    assert "Compared with the baseline:" in slow.out
    assert "this run has not measured" in slow.err
    fine = g4(*run, "--baseline", change_medians(measured, tmp_path / "slow.json", 0.001), "--json")
    assert fine.code == 0
    assert json.loads(fine.out)["baseline"]["regressed"] is False


def test_llama_bench_takes_turns_with_g4(g4: RunG4, tmp_path: Path) -> None:
    program, log = write_llama_bench(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    run = ("bench", demo_bundle(), *QUICK, "--repeats", "3", "--vs", f"llama-bench={program}", "--gguf", gguf)
    outcome = g4(*run)
    assert outcome.code == 0, outcome.err
    assert len(log.read_text().splitlines()) == 3
    assert f"was not made from {gguf}: the two run different weights." in outcome.err
    assert "llama.cpp 8cf427ff (CPU, 1 thread, cache f16) on model.gguf:" in outcome.out
    ratios = [line.split()[-1] for line in outcome.out.partition("g4 / llama.cpp")[2].splitlines()[2:]]
    assert len(ratios) == 2 and all(ratio.endswith("x") for ratio in ratios)
    table = g4(*run, "--markdown").out
    assert "| test | g4 | llama-bench | ratio |" in table


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(g4: RunG4, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"speed.{suffix}"
    outcome = g4("bench", demo_bundle(), *QUICK, "--repeats", "1", "--plot", target)
    assert outcome.code == 0, outcome.err
    assert f"Wrote {target}." in outcome.err
    assert target.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma4cli", "bench", str(demo_bundle()), "--prompt", "16", "--gen", "4"]
    command += ["--threads", "1", "--warmup", "0", "--repeats", "100000", "--no-text", "--depth", "0"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "tokens/s" not in process.stdout.readline():  # the roofline is out, so the rounds begin
            assert process.poll() is None
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "warning: Interrupted: the numbers are of what was measured so far." in err
    assert "Traceback" not in err
    repeats = [int(line.split()[-1]) for line in out.splitlines() if line.startswith(("pp16", "tg4"))]
    assert len(repeats) == 2
    assert 0 < min(repeats) <= max(repeats) <= min(repeats) + 1 < 100000


def test_a_bundle_refuses_what_only_a_checkpoint_takes(g4: RunG4) -> None:
    outcome = g4("bench", demo_bundle(), "--ctx", "2k", "--device", "cuda")
    assert outcome.code == 2
    assert "is a bundle, whose --device, --ctx was fixed when it was exported." in outcome.err
    outcome = g4("bench", demo_bundle(), "--profile")
    assert (outcome.code, outcome.out) == (1, "")
    assert "--profile looks into PyTorch, and the runner is outside of it." in outcome.err
    outcome = g4("bench", demo_bundle(), "--engine", "torch")
    assert (outcome.code, outcome.out) == (1, "")
    assert "--engine torch runs compiled CUDA code" in outcome.err and "is for the cpu." in outcome.err
    assert "1,024" in g4("bench", demo_bundle(), "--depth", "1k").err


def test_a_gguf_file_is_measured_as_its_checkpoint(g4: RunG4, tmp_path: Path) -> None:
    file = gguf_writer.write(tmp_path / "demo.gguf", gguf_writer.describe(DEMO_MODEL, gguf_writer.GGML.Q8_0))
    program, _ = write_llama_bench(tmp_path)
    sizes = ("--prompt", "16", "--gen", "2", "--repeats", "1", "--warmup", "0", "--ctx", "64", "--no-text")
    outcome = g4("bench", file, *sizes, "--json", "--vs", f"llama-bench={program}", "--gguf", file)
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["model"]["source"]["kind"] == "gguf"
    assert document["versus"]["gguf"] == "demo.gguf"
    assert "different weights" not in outcome.err


def test_quality_is_measured_and_kept_as_the_bundles_receipt(g4: RunG4, tmp_path: Path, workspace_root: Path) -> None:
    """The exported int4 model loses something, but little; the receipt says so and leaves the bundle whole."""
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle(), bundle)
    Workspace(workspace_root).remember("model", DEMO_MODEL)
    outcome = g4("bench", bundle, "--quality", "--tokens", "400", "--threads", "1", "--save-receipt", "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    receipt = read_receipt(bundle)
    assert receipt is not None and receipt.is_current
    assert receipt.result == document["result"]
    assert (receipt.text["name"], receipt.reference["name"]) == ("eval.txt", "demo")
    assert receipt.text["tokens"] <= 400
    result, floor = document["result"], document["floor"]
    assert floor["kl"]["mean"] < result["kl"]["mean"] < 0.05
    assert result["top1_agreement"] > 0.95
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.1)
    open_bundle(bundle, verify=True)
    assert str(tmp_path) not in (bundle / "receipt.json").read_text()


def test_the_checkpoint_behind_a_bundle_can_be_judged_on_any_text(g4: RunG4, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Ada had a red lamp and a small fox. " * 8)
    arguments = ("--quality", "--reference", DEMO_MODEL, "--on", tmp_path / "text.txt", "--tokens", "60")
    outcome = g4("bench", demo_checkpoint(), *arguments)
    assert outcome.code == 0, outcome.err
    rows = [line.split()[:2] for line in outcome.out.splitlines()]
    assert ["the", "original"] in rows and ["this", "model"] in rows and ["noise", "floor"] in rows
    assert "Noise floor: the original computed in bfloat16." in outcome.out
    assert g4("bench", demo_checkpoint(), *arguments, "--quiet").out.startswith("KL 0.")
