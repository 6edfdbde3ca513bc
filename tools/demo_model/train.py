"""Train the demo model and write its checkpoint in Hugging Face's format.

    python -m tools.demo_model.train OUTPUT [--budget SECONDS] [--log FILE]

Data comes from forked worker processes; Muon for the matrices, AdamW for embedding, norms and layer scalars; the
learning rate follows the clock, so that a run of any length ends at zero.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model import heldout, network, rows

SEED = 20
DEMO = Path(__file__).parents[2] / "gemma4cli" / "data" / "demo"
MUON_LR, ADAM_LR = 0.02, 3e-3
DECAY_FROM = 0.35  # share of the budget after which the learning rate falls linearly to zero
# (row length, share of a batch's tokens is the same for all, packed, share of steps, from which part of the run on)
ROW_KINDS = [(1024, True, 0.72, 0.0), (4096, False, 0.18, 0.10), (8192, False, 0.10, 0.25)]


class Muon:
    """Momentum orthogonalized by Newton-Schulz (Jordan et al., 2024), over all matrices of one shape at a time."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {shape: torch.zeros(len(g), *shape, device=g[0].device) for shape, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.float().unbind()), alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix towards 1 with five quintic Newton-Schulz steps."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        product = x @ x.mT
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x if wide else x.mT


def _feed(queue: multiprocessing.Queue, seed: int, tokenizer: Tokenizer, length: int, size: int, packed: bool) -> None:
    for batch in rows.batches(seed, tokenizer, length, size, packed):
        queue.put(batch)


def _start_workers(tokenizer: Tokenizer, batch_tokens: int, processes: int, kinds: list) -> list:
    """One queue per kind of row; returns (row kind, queue) pairs, the worker processes die with this one."""
    context = multiprocessing.get_context("fork")
    fed = []
    for index, kind in enumerate(kinds):
        length, packed, share, _ = kind
        queue = context.Queue(24)
        for worker in range(max(1, round(processes * share))):
            arguments = (queue, SEED * 1000 + index * 100 + worker, tokenizer, length, batch_tokens // length, packed)
            context.Process(target=_feed, args=arguments, daemon=True).start()
        fed.append((kind, queue))
    return fed


def batch_loss(model: network.Network, ids: Tensor, weights: Tensor, documents: Tensor | None) -> Tensor:
    """Weighted mean cross entropy over the trained positions; `weights[b, t]` belongs to the token at t."""
    trained = weights[:, 1:].flatten().nonzero().squeeze(1)  # on the CPU: no wait for the device
    weight = weights[:, 1:].flatten()[trained]
    device = model.norm.weight.device
    target = ids[:, 1:].flatten()[trained].to(device, non_blocking=True)
    row, column = trained // (ids.shape[1] - 1), trained % (ids.shape[1] - 1)
    place = (row * ids.shape[1] + column).to(device, non_blocking=True)
    weight = weight.to(device, non_blocking=True)
    given = None if documents is None else documents.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model(ids.to(device, non_blocking=True), given)
    logits = model.logits(hidden.flatten(0, 1)[place].float())
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()


def train(model: network.Network, tokenizer: Tokenizer, arguments: argparse.Namespace, log: TextIO) -> None:
    device = model.norm.weight.device
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=False)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("embed")]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or n.startswith("embed")]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)
    kinds = [kind for kind in ROW_KINDS if kind[0] <= arguments.batch_tokens]
    fed = _start_workers(tokenizer, arguments.batch_tokens, arguments.workers, kinds)
    rng, started, step = random.Random(SEED), time.time(), 0
    while (part := (time.time() - started) / arguments.budget) < 1 and step < arguments.steps:
        open_kinds = [entry for entry in fed if part >= entry[0][3]]
        (length, packed, _, _), queue = rng.choices(open_kinds, [entry[0][2] for entry in open_kinds])[0]
        ids, weights, documents = (torch.from_numpy(array) for array in queue.get())
        loss = batch_loss(model, ids.long(), weights, documents if packed else None)
        rate = min(1.0, (step + 1) / 100) * min(1.0, (1 - part) / (1 - DECAY_FROM))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(MUON_LR * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * rate
        adam.step()
        model.zero_grad(set_to_none=True)
        if step % arguments.log_every == 0:
            line = f"step {step:6d}  row {length:5d}  loss {loss.item():.4f}  rate {rate:.3f}"
            print(f"{line}  {time.time() - started:6.1f} s  queue {queue.qsize()}", file=log, flush=True)
        step += 1
    print(f"end at step {step}, {step * arguments.batch_tokens / 1e6:.0f} M tokens, loss {loss.item():.4f}", file=log)


@torch.no_grad()
def greedy(model: network.Network, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Greedy replies for a batch of prompts, by full recomputation, until every one has stopped."""
    device = model.norm.weight.device
    texts, done = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(limit):
        longest = max(map(len, texts))
        width = -(-longest // network.WINDOW) * network.WINDOW
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        hidden = model(ids)[torch.arange(len(texts), device=device), last]
        for index, token in enumerate(model.logits(hidden).argmax(-1).tolist()):
            if not done[index]:
                texts[index].append(token)
                done[index] = token in network.STOP_IDS or len(texts[index]) >= network.CONTEXT
        if all(done):
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def measure(model: network.Network, tokenizer: Tokenizer, count: int, log: TextIO) -> dict[str, float]:
    """Held-out accuracy per task with the weights as stored (bfloat16 values), in float32."""
    encode = rows.Encoder(tokenizer)
    results = {}
    for name, make in heldout.suites(encode.length).items():
        long = name.startswith("recall-") and name.removeprefix("recall-").isdigit()
        asked = heldout.questions(name, make, count // 4 if long else count)
        replies: list[str] = []
        size = 8 if long else 128
        for start in range(0, len(asked), size):
            prompts = [
                encode("".join(text for text, _ in chat.segments()[:-1])) for chat in asked[start : start + size]
            ]
            limit = 8 + max(len(encode(chat.target())) for chat in asked[start : start + size])
            replies += [tokenizer.decode(ids, skip_special_tokens=False) for ids in greedy(model, prompts, limit)]
        right = [heldout.is_right(chat, reply) for chat, reply in zip(asked, replies, strict=True)]
        results[name] = sum(right) / len(right)
        wrong = next((i for i, ok in enumerate(right) if not ok), None)
        example = "" if wrong is None else f"  e.g. {asked[wrong].turns[-1].question[-60:]!r} -> {replies[wrong]!r}"
        print(f"{name:32s} {sum(right):4d}/{len(right)}{example}", file=log, flush=True)
    return results


def write_checkpoint(model: network.Network, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    save_file(network.hf_state_dict(model), target / "model.safetensors", metadata={"format": "pt"})
    for name, document in (("config", network.HF_CONFIG), ("generation_config", network.GENERATION_CONFIG)):
        (target / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder that gets the weights and both configs")
    parser.add_argument("--budget", type=float, default=440, help="seconds of training")
    parser.add_argument("--steps", type=int, default=1 << 30, help="stop after so many steps, whatever the clock says")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--questions", type=int, default=256, help="held-out questions per task at the end")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--log", type=argparse.FileType("w"), default="-")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network.Network().to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.2f} M parameters, torch {torch.__version__}, {device}, budget {arguments.budget:.0f} s, "
        f"{arguments.batch_tokens} tokens per step, {arguments.workers} workers, seed {SEED}",
        file=arguments.log,
        flush=True,
    )
    train(model, tokenizer, arguments, arguments.log)
    write_checkpoint(model, arguments.target)
    stored = network.Network().to(device)  # also: not compiled, since questions come in every shape
    stored.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    measure(stored, tokenizer, arguments.questions, arguments.log)


if __name__ == "__main__":
    main()
