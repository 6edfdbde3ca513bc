"""Compare next-token logits with llama.cpp's on the same GGUF files of the demo model.

    pip install llama-cpp-python          # builds llama.cpp from source; in an environment of its own is best
    python bench/compare_llama_cpp.py --out bench/results/compare-llama-cpp.json [--llama-python PATH]

Writes the demo model as GGUF in several types, converts each with g4, and continues the same prompt greedily. llama.cpp
runs in `--llama-python` (default: this interpreter), keeps K and V in float32, and is fed our tokens, so that one
differing choice does not make all later ones differ. It is asked twice: with the file itself, where it rounds
activations to 8 bits before it multiplies them by quantized weights, which g4's eager engine does not, and with a
float32 file of the same weights (gguf-py's decoder), where both compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import dequantize as dequantize_by_gguf

from gemma4cli.files import write_json
from gemma4cli.model.chat import Chat
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.gguf.convert import convert_gguf
from gemma4cli.quant.tensors import dequantize
from tests.support.chat_fixture import DEMO
from tests.support.gguf_writer import Model, describe, write

STEPS = 64
CONTEXT = 512
QUESTION = "Tell me a story about Ada, a fox and a lamp."
KINDS: dict[str, tuple[GGML, GGML | None]] = {
    "F32": (GGML.F32, None),
    "F16": (GGML.F16, None),
    "Q8_0": (GGML.Q8_0, None),
    "Q5_0": (GGML.Q5_0, None),
    "Q4_0": (GGML.Q4_0, None),
    "Q4_K, embedding Q6_K": (GGML.Q4_K, GGML.Q6_K),
    "Q6_K": (GGML.Q6_K, None),
}
# Runs in the other interpreter: token ids in, one row of logits per position out.
LLAMA = """
import sys, json
import numpy as np
import llama_cpp
path, context, tokens, out = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
llama = llama_cpp.Llama(
    model_path=path, n_ctx=context, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0, flash_attn=False
)
llama.eval(tokens)
np.save(out, llama.scores[:len(tokens)])
print(llama_cpp.__version__)
"""


@torch.no_grad()
def our_logits(folder: Path, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """Continue greedily; return all tokens and the logits after each of them from the prompt's last on."""
    cache = CacheSpec(CONTEXT, len(prompt), torch.float32)
    model = build_model(
        open_checkpoint(folder), cache, torch.float32, torch.device("cpu"), prepare=lambda _, t: dequantize(t)
    )
    tokens, rows = list(prompt), []
    step = prompt
    for _ in range(STEPS):
        positions = torch.arange(len(tokens) - len(step), len(tokens))
        logits = model(torch.tensor([step]), positions)[0, -1]
        rows.append(logits.numpy())
        step = [int(logits.argmax())]
        tokens += step
    return tokens[:-1], np.stack(rows)


def their_logits(python: str, file: Path, tokens: list[int], folder: Path) -> tuple[str, np.ndarray]:
    """Return llama-cpp-python's version and llama.cpp's logits after every token."""
    out = folder / "logits.npy"
    done = subprocess.run(
        [python, "-c", LLAMA, file, str(CONTEXT), json.dumps(tokens), out], check=True, capture_output=True, text=True
    )
    return done.stdout.strip(), np.load(out)


def as_floats(model: Model) -> Model:
    """Return the model with every matrix as float32, decoded by gguf-py."""
    tensors = {
        name: dequantize_by_gguf(data, model.types[name]) if name in model.types else data
        for name, data in model.tensors.items()
    }
    return Model(model.metadata, tensors, dict.fromkeys(model.types, GGML.F32))


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | int]:
    """Count equal choices and measure the logits' difference around their mean."""
    centred = [rows - rows.mean(-1, keepdims=True) for rows in (ours, theirs)]
    cosine = (centred[0] * centred[1]).sum(-1) / np.prod([np.linalg.norm(rows, axis=-1) for rows in centred], axis=0)
    choices = theirs.argmax(-1)
    return {
        "steps": len(ours),
        "same_tokens": int((ours.argmax(-1) == choices).sum()),
        "worst_cosine": round(float(cosine.min()), 7),
        "largest_logit_difference": round(float(np.abs(ours - theirs).max()), 5),
        # How far below our best the token lies that llama.cpp would have chosen.
        "largest_regret": round(float((ours.max(-1) - ours[np.arange(len(ours)), choices]).max()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {}
    llama = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompt = Chat.from_dir(DEMO).prompt_ids([{"role": "user", "content": QUESTION}])
        for label, (kind, embedding) in KINDS.items():
            model = describe(DEMO, kind, embedding=embedding)
            file = write(folder / "demo.gguf", model)
            convert_gguf([file], folder / "checkpoint", force=True)
            tokens, ours = our_logits(folder / "checkpoint", prompt)
            result = {}
            for what, path in {"file": file, "float32": write(folder / "floats.gguf", as_floats(model))}.items():
                llama, theirs = their_logits(options.llama_python, path, tokens, folder)
                result[what] = compare(ours, theirs[len(prompt) - 1 :])
            results[label] = result
            print(label, result, flush=True)
    document = {
        "command": "python bench/compare_llama_cpp.py",
        "versions": {"llama-cpp-python": llama, "torch": torch.__version__, "gguf": version("gguf")},
        "prompt": QUESTION,
        "types": results,
    }
    if options.out:
        write_json(options.out, document)


if __name__ == "__main__":
    main()
