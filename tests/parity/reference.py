"""transformers' own Gemma 4, filled with our weights: the independent reference of the parity tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemma4cli.model.attention import Attend, attend
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model


def transformers_model(
    text_config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> Gemma4ForCausalLM:
    """Build the reference on `text_config` as it stands in config.json."""
    keys = {key: value for key, value in text_config.items() if key not in ("model_type", "dtype")}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**keys, attn_implementation="eager")).to(dtype).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return model


class _Weights:
    """A checkpoint that is already in memory."""

    def __init__(self, config: Gemma4Config, weights: dict[str, Tensor]) -> None:
        self.config = config
        self._weights = weights
        self.nbytes = sum(tensor.nbytes for tensor in weights.values())

    def names(self) -> list[str]:
        return list(self._weights)

    def tensor(self, name: str) -> Tensor:
        return self._weights[name].clone()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self._weights)


def our_model(config: Gemma4Config, weights: dict[str, Tensor], cache: CacheSpec, attend: Attend = attend) -> Gemma4:
    """Build ours without going through files, in the cache's dtype."""
    return build_model(_Weights(config, weights), cache, cache.dtype, "cpu", attend=attend)


@torch.no_grad()
def read_in_chunks(model: Gemma4, tokens: Tensor, chunks: list[int]) -> Tensor:
    """Read tokens [1, N] in chunks of the given sizes (the last one repeats) and return all logits [1, N, V]."""
    sizes = list(chunks)
    start, logits = 0, []
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        positions = torch.arange(start, min(start + size, tokens.shape[1]))
        logits.append(model(tokens[:, positions], positions, last_only=False))
        start += size
    return torch.cat(logits, dim=1)


def clear(model: Gemma4, value: float = 0.0) -> None:
    """Forget what the caches hold; `value` shows whether slots that were never written matter."""
    for cache in model.kv_caches():
        cache.k.fill_(value)
        cache.v.fill_(value)


@torch.no_grad()
def layer_errors(theirs: Gemma4ForCausalLM, ours: Gemma4, tokens: Tensor) -> list[float]:
    """Feed each of our layers the input that the reference's layer got; return the largest differences."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # The reference scales the residual stream in place, so both must be copied.
        outputs.append(output.clone())

    hooks = [layer.register_forward_hook(record) for layer in theirs.model.layers]
    hooks += [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
        for layer in theirs.model.layers
    ]
    theirs(tokens)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(tokens.shape[1])
    angles = {kind: rotary(positions) for kind, rotary in ours.model.rotary_emb.items()}
    return [
        (layer(x, positions, *angles[layer.kind]) - y).abs().max().item()
        for layer, x, y in zip(ours.model.layers, inputs, outputs, strict=True)
    ]


@torch.no_grad()
def logit_error(theirs: Gemma4ForCausalLM, ours: Gemma4, tokens: Tensor, chunk: int = 16) -> float:
    """Return the largest difference of any logit, ours read in chunks."""
    return (theirs(tokens).logits - read_in_chunks(ours, tokens, [chunk])).abs().max().item()
