"""How fast decoding could be: the bytes that every token must read, over what the memory delivers.

A decoded token reads every weight once and the keys and values of every position it attends to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4cli.benchmark.bandwidth import Bandwidth
from gemma4cli.benchmark.plan import Case

if TYPE_CHECKING:
    import torch

    from gemma4cli.export.bundle import Bundle
    from gemma4cli.inspection.files import Span
    from gemma4cli.model.gemma4 import Gemma4

_EMBEDDING, _HEAD, _CACHE = "model.embed_tokens.", "lm_head.", ".kv_cache."


@dataclass(frozen=True)
class KVTraffic:
    """One kind of layer: bytes per position in all its caches together, and how many positions a token sees at most."""

    bytes_per_position: int
    window: int | None


@dataclass(frozen=True)
class Traffic:
    """What decoding must read: `weight_bytes` per token, whatever the depth, and the caches."""

    weight_bytes: int
    kv: tuple[KVTraffic, ...]

    def kv_bytes(self, position: int) -> int:
        """Bytes of keys and values that the token at a position attends to, itself included."""
        return sum(
            layer.bytes_per_position * (position + 1 if layer.window is None else min(position + 1, layer.window))
            for layer in self.kv
        )

    def bytes_per_token(self, test: Case) -> float:
        """Average over the tokens that a test decodes."""
        first = test.n_depth + test.n_prompt
        return self.weight_bytes + sum(self.kv_bytes(first + index) for index in range(test.n_gen)) / test.n_gen


@dataclass(frozen=True)
class Roofline:
    """`bandwidth` is None where it cannot be measured; then there is no bound."""

    traffic: Traffic
    bandwidth: Bandwidth | None

    def bound(self, test: Case) -> float | None:
        """Tokens per second that decoding cannot exceed; None for tests that decode nothing."""
        if self.bandwidth is None or not test.n_gen:
            return None
        return self.bandwidth.best / self.traffic.bytes_per_token(test)

    def to_json(self) -> dict[str, Any]:
        return {
            "weight_bytes_per_token": self.traffic.weight_bytes,
            "kv": [asdict(layer) for layer in self.traffic.kv],
            "bandwidth": None if self.bandwidth is None else asdict(self.bandwidth),
        }


def bundle_traffic(bundle: Bundle) -> Traffic:
    """Read off a bundle what its `decode` must read; opens headers only."""
    from gemma4cli.inspection.ptd import read_data_file

    entries = [
        ((path, entry.span), name.rpartition(":")[2])  # delegates put their own prefix before the name
        for path in bundle.weights
        for name, entry in read_data_file(path).entries.items()
    ]
    weight_bytes = sum_weights(entries, bundle.contract.vocab_size)
    kv = tuple(
        KVTraffic(record.bytes // record.slots, bundle.contract.window if kind == "sliding" else None)
        for kind, record in bundle.manifest.kv.items()
    )
    return Traffic(weight_bytes, kv)


def sum_weights(entries: Iterable[tuple[tuple[Path, Span], str]], vocab_size: int) -> int:
    """Add up stored bytes, given where they lie and what they are called.

    Bytes with several names (a head tied to the embedding) count once, caches not at all, and of a table that only
    embeds tokens, because the head is another matrix, one row.
    """
    stored: dict[tuple[Path, Span], list[str]] = {}
    for place, name in entries:
        stored.setdefault(place, []).append(name)
    has_head = any(_HEAD in name for names in stored.values() for name in names)
    total = 0
    for (_, span), names in stored.items():
        if any(_CACHE in name for name in names):
            continue
        is_lookup = has_head and all(name.startswith(_EMBEDDING) for name in names)
        total += span.size // vocab_size if is_lookup else span.size
    return total


def model_traffic(model: Gemma4) -> Traffic:
    """Account for a loaded PyTorch model: weights as they are held, caches of its dtype."""
    embedding = model.model.embed_tokens.weight
    tensors = {id(parameter): parameter for parameter in model.parameters()}
    weight_bytes = sum(_nbytes(parameter) for parameter in tensors.values())
    if model.lm_head.weight is not embedding:
        weight_bytes -= _nbytes(embedding) - _nbytes(embedding) // model.config.vocab_size
    kv: dict[int | None, int] = {}
    for layer in model.model.layers:
        cache, window = layer.self_attn.kv_cache, layer.self_attn.window or None
        kv[window] = kv.get(window, 0) + (cache.k.nbytes + cache.v.nbytes) // cache.slots
    return Traffic(weight_bytes, tuple(KVTraffic(size, window) for window, size in kv.items()))


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the parts that a torchao tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
