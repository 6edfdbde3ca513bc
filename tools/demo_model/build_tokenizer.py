"""Build the demo model's tokenizer: byte-fallback BPE in the exact pipeline of Gemma 4's tokenizer.json.

Gemma's pipeline has no word splitting (spaces become ▁ before the splitter looks for them), so a span between special
tokens is one BPE word. Merges are learned here on single words, with ▁ only at their start, digits apart and runs of
newlines apart; such merges never join across words, and the saved pipeline gives the same ids.

    python -m tools.demo_model.build_tokenizer gemma4cli/data/demo
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tools.demo_model import chats

VOCAB_SIZE = 2048
SEED = 20
SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
# Runs of 2 to 8 newlines; with these ranks BPE always reaches the longest run.
_NEWLINE_PAIRS = [(1, 1), (2, 2), (4, 4), (4, 2), (6, 1), (4, 1), (2, 1)]
NEWLINE_MERGES = [("\n" * left, "\n" * right) for left, right in _NEWLINE_PAIRS]
TOKENIZER_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_max_length": 8192,
}


def _learn_merges(texts: list[str], merges: int) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[0-9]|[.,?!:;'\"()*=+-]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    alphabet = [char for char in string.printable if char.isprintable() and char != " "] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 1 + merges,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet) + 1,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(merge) for merge in learned][:merges]


def build_tokenizer() -> Tokenizer:
    """Learn the merges from training chats and assemble the tokenizer."""
    rng = random.Random(SEED)
    texts = []
    for _ in range(30_000):
        texts += [re.sub(r"<\|?[a-z]+\|?>", "", text) for text, _ in chats.short_chat(rng).segments()]
    tokens = [*SPECIAL, *BYTES, *("\n" * length for length in range(1, 9)), "▁"]
    tokens += [char for char in string.printable if char.isprintable() and char != " "]
    learned = _learn_merges(texts, VOCAB_SIZE)
    merges = list(NEWLINE_MERGES)
    known = set(tokens)
    for left, right in learned:
        if left + right in known:
            continue
        if len(tokens) == VOCAB_SIZE:
            break
        tokens.append(left + right)
        known.add(left + right)
        merges.append((left, right))
    tokens += [f"<unused{index}>" for index in range(VOCAB_SIZE - len(tokens))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder that gets tokenizer.json and tokenizer_config.json")
    target = parser.parse_args().target
    tokenizer = build_tokenizer()
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens, {len(json.loads(tokenizer.to_str())['model']['merges'])} merges")


if __name__ == "__main__":
    main()
