"""The demo model: its checkpoint is a whole Gemma 4 checkpoint, its data say what they should, and it answers."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat as ModelChat
from gemma4cli.model.chat import Message
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import SafetensorsReader, build_model
from tools.demo_model import build_tokenizer, chats, facts, heldout, network, rows, tasks, train, write_eval_text
from tools.demo_model.chats import Chat
from tools.demo_model.tasks import Exchange

DEMO = train.DEMO


@pytest.fixture(scope="module")
def trained() -> network.Network:
    stored = load_file(DEMO / "model.safetensors")
    model = network.Network()
    model.load_state_dict({name.removeprefix("model.language_model."): value.float() for name, value in stored.items()})
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def encode() -> rows.Encoder:
    return rows.Encoder(Tokenizer.from_file(str(DEMO / "tokenizer.json")))


@pytest.fixture(scope="module")
def model_chat() -> ModelChat:
    return ModelChat.from_dir(DEMO)


def sample_chats(count: int) -> list[Chat]:
    rng = random.Random(1)
    return [chats.short_chat(rng) for _ in range(count)]


# The checkpoint


def test_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 12_000_000
    assert sum(tensor.numel() for tensor in load_file(DEMO / "model.safetensors").values()) <= 6_000_000


def test_checkpoint_holds_exactly_the_parameters_of_its_config_in_bfloat16() -> None:
    stored = load_file(DEMO / "model.safetensors")
    expected = {
        name.replace("model.", "model.language_model.", 1): shape
        for name, shape in Gemma4Config.from_dir(DEMO).parameter_shapes().items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_checkpoint_has_the_features_of_the_31b() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    text = config["text_config"]
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert "global_head_dim" in text
    assert "per_layer_config" not in text
    pattern = [5 * ["sliding_attention"] + ["full_attention"]] * 2
    assert text["layer_types"] == list(itertools.chain(*pattern))
    assert text["attention_k_eq_v"] is True
    assert text["final_logit_softcapping"] == 30.0
    stored = load_file(DEMO / "model.safetensors")
    scalars = [stored[f"model.language_model.layers.{index}.layer_scalar"] for index in range(12)]
    assert all(scalar.shape == (1,) and scalar != 1 for scalar in scalars)
    assert len({scalar.item() for scalar in scalars}) > 6
    norms = [tensor for name, tensor in stored.items() if "_norm" in name or "layernorm" in name]
    assert all(norm.float().std() > 1e-3 for norm in norms)


def test_every_matrix_can_be_quantized_in_blocks_of_256() -> None:
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        if tensor.ndim == 2:
            assert tensor.shape[1] % 256 == 0, name
            assert tensor.shape[0] % 32 == 0, name


def test_generation_defaults_are_gemmas(model_chat: ModelChat) -> None:
    defaults = model_chat.defaults
    names = [model_chat.tokenizer.piece(token, skip_special=False) for token in defaults.stop_ids]
    assert names == ["<eos>", "<turn|>", "<|tool_response>"]
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.bos_id) == (1.0, 64, 0.95, 2)


def test_g4_runs_the_network_that_was_trained(trained: network.Network, encode: rows.Encoder) -> None:
    """Two implementations, one for training in blocks and one with caches: the same logits past several windows."""
    ids = torch.tensor([encode((DEMO / "eval.txt").read_text(encoding="utf-8"))[:320]])
    cache = CacheSpec(context_length=512, prefill_chunk=64, dtype=torch.float32)
    model = build_model(SafetensorsReader(DEMO), cache, torch.float32, "cpu")
    chunks = [
        model(ids[:, start : start + 64], torch.arange(start, start + 64), last_only=False)
        for start in range(0, 320, 64)
    ]
    theirs = trained.logits(trained(ids))
    assert theirs.abs().max() > 10
    assert torch.allclose(torch.cat(chunks, dim=1), theirs, atol=2e-3)


# Tokenizer and template


def test_special_tokens_have_gemmas_names_and_the_first_five_their_ids() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert [tokenizer.id_to_token(index) for index in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    for token in build_tokenizer.SPECIAL:
        assert tokenizer.encode(f"a{token}b").tokens[1:2] == [token]
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    named = {value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    assert named == set(build_tokenizer.SPECIAL)


@pytest.mark.parametrize("text", ["naïve ☃ 日本", "  two  spaces ", "tab\tand\n\n\nlines", "", "🙂" * 3])
def test_any_text_survives(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("count", range(1, 9))
def test_a_run_of_newlines_is_one_token(count: int) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.encode("a" + "\n" * count + "b").tokens == ["a", "\n" * count, "b"]


def test_training_text_is_what_the_template_renders(model_chat: ModelChat, encode: rows.Encoder) -> None:
    """Ids of every training chat, up to the answer, equal those `g4 run` gives the model."""
    kinds = set()
    for chat in sample_chats(20):
        *given, (answer, trained) = chat.segments()
        messages: list[Message] = [Message(role=m["role"], content=m["content"]) for m in chat.messages()]
        assert encode("".join(text for text, _ in given)) == model_chat.prompt_ids(messages, thinking=chat.thinking)
        assert trained
        assert answer.endswith("<turn|>")
        kinds.add((chat.thinking, bool(chat.system), len(chat.turns) > 1))
    assert len(kinds) >= 4


def test_rows_are_encoded_as_the_tokenizer_would(encode: rows.Encoder) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for chat in sample_chats(60):
        ids, weights = rows.encode_chat(chat, encode)
        assert ids == tokenizer.encode("".join(text for text, _ in chat.segments()), add_special_tokens=False).ids
        assert len(weights) == len(ids)


def test_template_maps_roles_trims_and_strips_thoughts_from_history(model_chat: ModelChat) -> None:
    messages: list[Message] = [
        {"role": "developer", "content": " Be brief.\n"},
        {"role": "user", "content": "  Hi "},
    ]
    text = model_chat.tokenizer.decode(model_chat.prompt_ids(messages), skip_special=False)
    expected = "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    assert text == f"{expected}{chats.EMPTY_THOUGHT}"


def test_template_drops_channels_of_earlier_model_turns(model_chat: ModelChat) -> None:
    """Through Jinja itself: `Chat.prompt_ids` keeps control tokens out of messages."""
    from gemma4cli.model.chat_template import render

    assert model_chat.template is not None
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<|channel>thought\nA greeting.<channel|>Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = render(model_chat.template, {**model_chat.tokens, "messages": history, "add_generation_prompt": False})
    assert text == ("<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nBye<turn|>\n")


def test_template_refuses_a_late_system_message(model_chat: ModelChat) -> None:
    messages: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}]
    with pytest.raises(G4Error, match="one system message, at its start"):
        model_chat.prompt_ids(messages)


# The data


def test_training_never_shows_a_held_out_pair() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        assert not tasks.is_held_out(chats.single(rng))
    for _ in range(20):
        told = chats.recall_crowded(rng)[-1]
        asked = Exchange("", told.question.splitlines()[-1].rsplit(". ", 1)[-1], told.answer, "")
        assert asked.answer == "I do not know." or not tasks.is_held_out(asked)


def test_held_out_pairs_are_a_tenth() -> None:
    rng = random.Random(4)
    share = sum(tasks.is_held_out(tasks.arithmetic_3(rng)) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_thoughts_and_answers_agree() -> None:
    """Every step of a worked sum is true, and its last number is the answer."""
    rng = random.Random(5)
    for generator in (tasks.arithmetic_2, tasks.arithmetic_3, tasks.multiply, tasks.word_problem):
        for _ in range(200):
            turn = generator(rng)
            steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", turn.thought)
            for left, sign, right, result in steps:
                computed = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
                assert computed[sign] == int(result)
            assert steps[-1][-1] == turn.answer


def test_recalled_facts_were_told_or_are_not_known() -> None:
    rng = random.Random(6)
    for make in (chats.recall_short, chats.recall_crowded):
        for _ in range(100):
            turns = make(rng)
            said = " ".join(turn.question for turn in turns)
            last = turns[-1]
            assert last.answer == "I do not know." or last.thought in said


def test_long_chats_fill_the_length_asked_for(encode: rows.Encoder) -> None:
    for wanted in (1024, 4096):
        chat = Chat(chats.recall_long(random.Random(7), wanted, encode.length))
        length = len(rows.encode_chat(chat, encode)[0])
        assert wanted - 400 < length < 1.05 * wanted


def test_packed_rows_hold_whole_chats(encode: rows.Encoder) -> None:
    ids, weights, documents = next(rows.packed_rows(random.Random(8), encode, 1024))
    starts = [index for index, token in enumerate(ids) if token == network.BOS]
    assert len(ids) == len(weights) == len(documents) == 1024
    assert [documents[start] for start in starts] == list(range(len(starts)))
    assert sum(weight > 0 for weight in weights) > 100


def test_capitals_have_one_country_each() -> None:
    assert len(facts.CAPITALS) == len(set(facts.CAPITALS.values())) == 139
    assert facts.CAPITALS["France"] == "Paris"


def test_judge_accepts_the_right_reply_only() -> None:
    plain = Chat([Exchange("capital", "What is the capital of France?", "Paris", "")])
    assert heldout.is_right(plain, "Paris<turn|>")
    assert not heldout.is_right(plain, "Paris is it<turn|>")
    thinking = Chat(plain.turns, thinking=True)
    assert heldout.is_right(thinking, "<|channel>thought\nIt is Paris.<channel|>Paris<turn|>")
    assert not heldout.is_right(thinking, "Paris<turn|>")
    tale = Chat([tasks.story(random.Random(9))])
    assert heldout.is_right(tale, tale.target())
    assert not heldout.is_right(tale, "Once upon a time. The end.<turn|>")


def test_eval_text_is_what_the_script_writes() -> None:
    assert (DEMO / "eval.txt").read_text(encoding="utf-8") == write_eval_text.eval_text()


# Training and answering


def test_muon_makes_the_update_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (3, 64, 16)):
        singular = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)).float())
        assert singular.min() > 0.5
        assert singular.max() < 1.4


def test_training_steps_lower_the_loss_and_the_checkpoint_can_be_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    batch = next(rows.batches(1, tokenizer, 128, 1, packed=True))
    ids, weights, documents = (torch.from_numpy(array) for array in batch)
    model = network.Network()
    muon = train.Muon([p for p in model.layers[0].parameters() if p.ndim == 2])
    losses = []
    for _ in range(3):
        loss = train.batch_loss(model, ids.long(), weights, documents)
        loss.backward()
        muon.step(0.02)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    train.write_checkpoint(model, tmp_path)
    assert SafetensorsReader(tmp_path).names() == SafetensorsReader(DEMO).names()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Which country has the capital Tokyo?", "Japan"),
        ("What is 348 + 271?", "619"),
        ("Ada's boat is red. Ben's boat is blue. What color is Ada's boat?", "red"),
        ("What is the capital of Atlantis?", "I do not know."),
    ],
)
def test_it_answers(trained: network.Network, encode: rows.Encoder, question: str, answer: str) -> None:
    chat = Chat([Exchange("", question, answer, "")])
    prompt = encode("".join(text for text, _ in chat.segments()[:-1]))
    (reply,) = train.greedy(trained, [prompt], 16)
    assert reply == encode(f"{answer}<turn|>")
