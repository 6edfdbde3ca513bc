"""The tokenizer rebuilt from GGUF metadata gives the original's ids, on the demo model's and 10,000 strings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gemma4cli.errors import G4Error
from gemma4cli.quant.gguf.reader import GGUF, open_gguf
from gemma4cli.quant.gguf.tokenizer import build_tokenizer, read_vocabulary, tokenizer_config, tokenizer_json
from tests.support.chat_fixture import DEMO
from tests.support.gguf_writer import Model, tokenizer_keys, write

CODE = [
    "def f(x: int) -> str:\n    return f'{x!r}'\n", "#include <stdio.h>\nint main(void) { return 0; }\n",
    "SELECT * FROM t WHERE a <= 3 -- <|turn>\n", "<div class=\"x\">&nbsp;</div>", "\t\tif (a && b || !c) {\r\n\t}\r\n",
    "λx.x∘f → ∀ε>0", '{"k": [1, 2.5e-3, null]}', "git commit -m 'fix: <eos>' && echo $?",
]  # fmt: skip
WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "Paris;",
    "12345",
    "Größe",
    "naïve",
    "東京",
    "Москва",
    "עברית",
    "العربية",
    "हिन्दी",
]
EMOJI = [
    *("😀", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇫🇷", "👍🏽", "☃\ufe0f", "e\u0301", "\u200d", "\ufeff"),
    *("▁", "▁▁", "\u00a0", "\x00", "\x7f", "Ġ"),
]
SPACES = [" ", "  ", "\n", "\n\n", "\t", " " * 17, "\n" * 9, " \n \n", "\r\n", "\u2028", "\u3000"]


def random_text(rng: random.Random, control: list[str]) -> str:
    def any_character() -> str:
        plane = rng.choice([0x80, 0x800, 0xD800, 0x110000])
        code = rng.randrange(plane)
        return chr(code if not 0xD800 <= code < 0xE000 else 0x41)

    pools = [
        lambda: rng.choice(WORDS), lambda: rng.choice(SPACES), lambda: rng.choice(EMOJI), lambda: rng.choice(control),
        lambda: rng.choice(CODE), any_character, lambda: "".join(any_character() for _ in range(rng.randrange(12))),
        lambda: rng.choice(control)[: rng.randrange(1, 8)], lambda: str(rng.randrange(10**9)),
    ]  # fmt: skip
    return "".join(rng.choice(pools)() for _ in range(rng.randrange(1, 14)))


def rebuilt(folder: Path, path: Path) -> Tokenizer:
    """Tokenizer folder -> GGUF, as llama.cpp's converter writes it -> tokenizer."""
    gguf = open_gguf([write(path / "t.gguf", Model(tokenizer_keys(folder)))])
    return Tokenizer.from_buffer(tokenizer_json(read_vocabulary(gguf)))


def newline_tokenizer(folder: Path) -> Path:
    """A tokenizer with the other things that Gemma's has: added tokens that are ordinary text, long merges, no mask."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image|>"]
    tokens = [*special, "<unused0>", "[multimodal]", *(f"<0x{value:02X}>" for value in range(256)), "▁", "\n"]
    tokens += [chr(code) for code in range(33, 127)] + ["é", "東"]
    merges = []
    for left, right in ["▁▁", "\n\n", "th", ("th", "e"), ("▁", "the"), ("▁▁", "▁▁"), ("\n\n", "\n"), "in", ("in", "g")]:
        tokens.append(left + right)
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<unused0>", "[multimodal]")])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("name", ["demo", "newlines"])
def test_the_same_ids_and_text_on_thousands_of_strings(tmp_path: Path, name: str) -> None:
    folder = DEMO if name == "demo" else newline_tokenizer(tmp_path / "n")
    original, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), rebuilt(folder, tmp_path)
    assert ours.get_vocab() == original.get_vocab()
    control = [token.content for token in original.get_added_tokens_decoder().values()]
    rng = random.Random(0)
    texts = [random_text(rng, control) for _ in range(10_000 if name == "demo" else 2_000)]
    expected = [encoding.ids for encoding in original.encode_batch(texts, add_special_tokens=False)]
    assert [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)] == expected
    assert sum(any(i < 20 for i in ids) for ids in expected) > len(texts) // 5, "control tokens do occur"
    for skip in (True, False):
        assert ours.decode_batch(expected, skip_special_tokens=skip) == original.decode_batch(
            expected, skip_special_tokens=skip
        )


@pytest.mark.parametrize("name", ["demo", "newlines"])
def test_every_property_of_the_pipeline_is_the_originals(tmp_path: Path, name: str) -> None:
    folder = DEMO if name == "demo" else newline_tokenizer(tmp_path / "n")
    original = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads(rebuilt(folder, tmp_path).to_str())
    for part in ("model", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert ours[part] == original[part], part
    assert ours["added_tokens"] == original["added_tokens"]


def test_special_tokens_keep_their_names(tmp_path: Path) -> None:
    gguf = open_gguf([write(tmp_path / "t.gguf", Model(tokenizer_keys(DEMO)))])
    ours = tokenizer_config(read_vocabulary(gguf))
    original = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert ours == {key: value for key, value in original.items() if key != "model_max_length"}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tokenizer_keys(newline_tokenizer(tmp_path / "n")))


def open_model(path: Path, model: Model) -> GGUF:
    return open_gguf([write(path / "t.gguf", model)])


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"])
def test_a_missing_key_is_named(tmp_path: Path, model: Model, key: str) -> None:
    with pytest.raises(G4Error, match=rf"t\.gguf: tokenizer\.ggml\.{key} is missing"):
        read_vocabulary(open_model(tmp_path, model.without(f"tokenizer.ggml.{key}")))


def test_unknown_token_is_required(tmp_path: Path, model: Model) -> None:
    with pytest.raises(G4Error, match=r"tokenizer\.ggml\.unknown_token_id is missing"):
        read_vocabulary(open_model(tmp_path, model.without("tokenizer.ggml.unknown_token_id")))


WRONG = {
    "model": ("llama", "tokenizer.ggml.model is 'llama'; g4 rebuilds 'gemma4'"),
    "tokens": ([1, 2], "tokenizer.ggml.tokens is not a list of texts"),
    "token_type": ([1, 2], "tokenizer.ggml.token_type has 2 entries, but there are 372 tokens"),
    "merges": ("t h", "tokenizer.ggml.merges is not a list of texts"),
    "bos_token_id": (372, "tokenizer.ggml.bos_token_id is 372, which is no token of the vocabulary of 372"),
    "eos_token_id": ("<eos>", "tokenizer.ggml.eos_token_id is '<eos>', which is no token"),
    "add_space_prefix": (1, "tokenizer.ggml.add_space_prefix is set"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named(tmp_path: Path, model: Model, key: str) -> None:
    value, sentence = WRONG[key]
    if key == "tokens":
        model.metadata["tokenizer.ggml.tokens"] = (value, GGUFValueType.ARRAY, GGUFValueType.INT32)
    else:
        model.set(f"tokenizer.ggml.{key}", value)
    with pytest.raises(G4Error) as error:
        read_vocabulary(open_model(tmp_path, model))
    assert sentence in error.value.message


def test_types_must_be_numbers(tmp_path: Path, model: Model) -> None:
    with pytest.raises(G4Error, match=r"tokenizer\.ggml\.token_type is not a list of whole numbers"):
        read_vocabulary(open_model(tmp_path, model.set("tokenizer.ggml.token_type", "normal")))


def test_a_token_twice(tmp_path: Path, model: Model) -> None:
    tokens = model.metadata["tokenizer.ggml.tokens"][0]
    tokens[10] = "the"
    with pytest.raises(G4Error, match=r"tokenizer\.ggml\.tokens has token 'the' twice, at 10 and \d+"):
        read_vocabulary(open_model(tmp_path, model))


def test_a_byte_token_missing(tmp_path: Path, model: Model) -> None:
    model.metadata["tokenizer.ggml.tokens"][0][9 + 0x41] = "<other>"
    with pytest.raises(G4Error, match="lacks the byte token <0x41>"):
        build_tokenizer(read_vocabulary(open_model(tmp_path, model)))


@pytest.mark.parametrize("merge", ["the", "the zebra", "zebra the", " the", "the "])
def test_merges_of_what_are_not_tokens(tmp_path: Path, model: Model, merge: str) -> None:
    model.metadata["tokenizer.ggml.merges"][0][3] = merge
    with pytest.raises(G4Error, match=r"tokenizer\.ggml\.merges \[3\] is .*, which are not two tokens"):
        read_vocabulary(open_model(tmp_path, model))


def test_merges_that_make_no_token_are_counted(tmp_path: Path, model: Model) -> None:
    before = read_vocabulary(open_model(tmp_path, model))
    model.metadata["tokenizer.ggml.merges"][0].append("t i")
    after = read_vocabulary(open_model(tmp_path, model))
    assert (before.useless_merges, after.useless_merges) == (0, 1)
    assert after.merges == before.merges


def test_types_that_files_get_wrong(tmp_path: Path, model: Model) -> None:
    """<eos> typed as ordinary text and <|turn> as text to be shown are control tokens all the same."""
    types = model.metadata["tokenizer.ggml.token_type"][0]
    assert types[1] == TokenType.NORMAL
    types[4] = TokenType.USER_DEFINED
    added = dict(read_vocabulary(open_model(tmp_path, model)).added_tokens)
    assert added["<eos>"]
    assert added["<|turn>"]
    assert not added["[multimodal]"]
