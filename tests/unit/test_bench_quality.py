"""Comparing distributions: the numbers against torch's, what of a text counts, and that nothing differs from itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gemma4cli.benchmark.passages import Passage, read_text
from gemma4cli.benchmark.quality import Tally, judge_quality, log_softmax
from gemma4cli.benchmark.reference import find_reference, find_text
from gemma4cli.benchmark.subject import open_subject
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from gemma4cli.workspace import Workspace
from tests.support.bundles import DEMO_MODEL
from tests.support.tiny import write_checkpoint

TEXT = "a small text about nothing, read twice and then some more of it. " * 3


def random_logits(seed: int, rows: int, vocabulary: int = 50) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(rows, vocabulary, generator=generator)).numpy()


def test_the_numbers_are_torchs() -> None:
    ids = tuple(range(10, 30)) * 8
    counted = tuple(index > 0 and index % 3 != 0 for index in range(len(ids)))
    reference, other = random_logits(1, len(ids) - 1), random_logits(2, len(ids) - 1)
    tally = Tally()
    tally.add(Passage(ids, counted), reference, other)
    result = tally.to_json()

    keep = torch.tensor(counted)[1:]
    p = torch.tensor(reference, dtype=torch.float64)[keep].log_softmax(-1)
    q = torch.tensor(other, dtype=torch.float64)[keep].log_softmax(-1)
    target = torch.tensor(ids)[1:][keep]
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert result["kl"]["max"] == pytest.approx(float(kl.max()), rel=1e-6)
    assert result["kl"]["median"] == pytest.approx(float(kl.quantile(0.5)), rel=1e-6)
    assert result["perplexity"] == pytest.approx(float(F.nll_loss(q, target).exp()), rel=1e-6)
    assert result["reference_perplexity"] == pytest.approx(float(F.nll_loss(p, target).exp()), rel=1e-6)
    assert result["perplexity_ratio"] == pytest.approx(result["perplexity"] / result["reference_perplexity"])
    assert result["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_model_does_not_differ_from_itself() -> None:
    logits = random_logits(3, 9)
    tally = Tally()
    tally.add(Passage(tuple(range(10)), (False, *[True] * 9)), logits, logits + 7)
    result = tally.to_json()
    assert result["kl"]["mean"] == pytest.approx(0, abs=1e-12)
    assert result["top1_agreement"] == 1
    assert result["perplexity_ratio"] == pytest.approx(1)


def test_probabilities_of_huge_logits_are_finite() -> None:
    values = log_softmax(np.array([[1e4, 0.0, -1e4]], dtype=np.float32))
    assert values.tolist() == [[0.0, -1e4, -2e4]]


def test_in_a_chat_only_the_models_turns_count(tmp_path: Path) -> None:
    chat = Chat.from_dir(DEMO_MODEL)
    turns = "<bos><|turn>user\nHello there.<turn|>\n<|turn>model\nHi.<turn|>\n"
    (tmp_path / "chat.txt").write_text(turns + turns)
    text = read_text(tmp_path / "chat.txt", chat)
    assert len(text.passages) == 2
    for passage in text.passages:
        assert passage.ids[0] == chat.bos_id
        said = [token for token, counts in zip(passage.ids, passage.counted, strict=True) if counts]
        assert chat.tokenizer.decode(said, skip_special=False) == "Hi.<turn|>"


def test_the_demo_models_text_is_whole(tmp_path: Path) -> None:
    chat = Chat.from_dir(DEMO_MODEL)
    text = read_text(DEMO_MODEL / "eval.txt", chat)
    assert text.tokens == len(chat.tokenizer.encode((DEMO_MODEL / "eval.txt").read_text()))
    assert 0.4 < text.counted / text.tokens < 0.9


def test_a_plain_text_counts_as_a_whole_in_windows(tmp_path: Path) -> None:
    chat = Chat.from_dir(DEMO_MODEL)
    (tmp_path / "plain.txt").write_text(TEXT)
    ids = chat.tokenizer.encode(TEXT)
    text = read_text(tmp_path / "plain.txt", chat, window=16)
    assert all(passage.ids[0] == chat.bos_id and len(passage.ids) <= 16 for passage in text.passages)
    assert [token for passage in text.passages for token in passage.ids[1:]] == ids
    assert all(not passage.counted[0] and all(passage.counted[1:]) for passage in text.passages)


def test_a_limit_takes_whole_passages_but_something(tmp_path: Path) -> None:
    chat = Chat.from_dir(DEMO_MODEL)
    (tmp_path / "plain.txt").write_text(TEXT)
    assert [len(p.ids) for p in read_text(tmp_path / "plain.txt", chat, window=16, limit=40).passages] == [16, 16]
    assert [len(p.ids) for p in read_text(tmp_path / "plain.txt", chat, window=16, limit=5).passages] == [5]


def test_texts_that_say_nothing_are_refused(tmp_path: Path) -> None:
    chat = Chat.from_dir(DEMO_MODEL)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(G4Error, match="has nothing to predict in its first 0 tokens"):
        read_text(tmp_path / "empty.txt", chat)
    (tmp_path / "user.txt").write_text("<|turn>user\nHello.<turn|>")
    with pytest.raises(G4Error, match="has nothing to predict"):
        read_text(tmp_path / "user.txt", chat)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(G4Error, match="is not UTF-8: byte 3 is 0xe9"):
        read_text(tmp_path / "latin.txt", chat)


def test_int4_differs_more_than_the_noise_and_less_than_another_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", seed=1)
    quantize_checkpoint(source, tmp_path / "int4", load_recipe("default"))
    other = write_checkpoint(tmp_path / "other", seed=2)
    (tmp_path / "text.txt").write_text(TEXT)

    def judge(path: Path) -> dict:
        return judge_quality(open_subject(path), source, tmp_path / "text.txt", limit=120)

    itself, int4, another = judge(source), judge(tmp_path / "int4"), judge(other)
    assert itself["result"]["kl"]["mean"] < 1e-6
    assert itself["result"]["top1_agreement"] == 1
    assert math.isclose(itself["result"]["perplexity"], itself["result"]["reference_perplexity"], rel_tol=1e-6)
    floor = itself["floor"]
    assert floor["method"] == "the original computed in bfloat16"
    assert 1e-7 < floor["kl"]["mean"] < int4["result"]["kl"]["mean"] < another["result"]["kl"]["mean"]
    assert int4["text"]["counted"] == 119 - (int4["text"]["passages"] - 1)
    assert int4["reference"] == {"name": "tiny", "dtype": "float32"}


def test_models_with_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one")
    two = write_checkpoint(tmp_path / "two", vocab_size=192, vocab_size_per_layer_input=192)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(G4Error, match="have different vocabularies"):
        judge_quality(open_subject(one), two, tmp_path / "text.txt")


def test_the_reference_is_the_model_it_came_from(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    source = write_checkpoint(tmp_path / "tiny")
    quantize_checkpoint(source, tmp_path / "int4", load_recipe("default"))
    quantized = open_subject(tmp_path / "int4")
    said: list[str] = []
    with pytest.raises(G4Error, match="No model was given and none has been pulled yet"):
        find_reference(workspace, quantized, None, said.append)
    workspace.remember("model", source)
    assert find_reference(workspace, quantized, None, said.append) == source
    assert find_reference(workspace, open_subject(source), None, said.append) == source
    other = write_checkpoint(tmp_path / "other", seed=1)
    workspace.remember("model", other)
    with pytest.raises(G4Error, match=r"was not made from .*other, the last model pulled"):
        find_reference(workspace, quantized, None, said.append)
    assert find_reference(workspace, quantized, str(source), said.append) == source
    with pytest.raises(G4Error, match="is quantized: it cannot say what quantization cost"):
        find_reference(workspace, quantized, str(tmp_path / "int4"), said.append)


def test_the_text_is_the_one_given_or_the_references_own(tmp_path: Path) -> None:
    assert find_text(DEMO_MODEL, None) == DEMO_MODEL / "eval.txt"
    (tmp_path / "mine.txt").write_text("x")
    assert find_text(DEMO_MODEL, tmp_path / "mine.txt") == tmp_path / "mine.txt"
    with pytest.raises(G4Error, match="is not a file") as caught:
        find_text(DEMO_MODEL, tmp_path)
    assert "--on" in (caught.value.hint or "")
    with pytest.raises(G4Error, match=r"comes with no eval\.txt"):
        find_text(tmp_path, None)
