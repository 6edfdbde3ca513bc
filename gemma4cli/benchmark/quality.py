"""What quantization cost: perplexity, KL divergence and agreement of a model with the unquantized one it came from.

Both read the same passages; for every counted token their whole distributions are compared. Two ways of computing one
and the same model differ, too, by rounding alone. That is the floor: a difference as small as that says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemma4cli.benchmark.device import describe_environment
from gemma4cli.benchmark.passages import WINDOW, Passage, read_text
from gemma4cli.benchmark.samples import percentile
from gemma4cli.benchmark.subject import Subject
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat
from gemma4cli.model.config import Gemma4Config
from gemma4cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from gemma4cli.engine.eager import EagerEngine

_ROWS = 64  # positions whose distributions are compared at once
_OTHER_CHUNK = 64


class Scorer(Protocol):
    """An engine that gives the logits after every token, in blocks [n, V]."""

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray]: ...


@dataclass
class Tally:
    """Adds up how one model's predictions differ from another's, over counted tokens; nats."""

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    agreed: int = 0

    def add(self, passage: Passage, reference: np.ndarray, other: np.ndarray) -> None:
        """Take the logits [n - 1, V] after each but the last of a passage's n tokens."""
        positions = np.flatnonzero(passage.counted) - 1
        targets = np.array(passage.ids)[positions + 1]
        for start in range(0, len(positions), _ROWS):
            rows, wanted = positions[start : start + _ROWS], targets[start : start + _ROWS]
            p, q = log_softmax(reference[rows]), log_softmax(other[rows])
            each = np.arange(len(rows))
            self.kl += (np.exp(p) * (p - q)).sum(-1).tolist()
            self.nll += (-q[each, wanted]).tolist()
            self.reference_nll += (-p[each, wanted]).tolist()
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())

    def to_json(self) -> dict[str, Any]:
        count = len(self.kl)
        ratio = np.array(self.nll) - np.array(self.reference_nll)
        return {
            "perplexity": math.exp(sum(self.nll) / count),
            "reference_perplexity": math.exp(sum(self.reference_nll) / count),
            "perplexity_ratio": math.exp(ratio.mean()),
            "kl": {
                "mean": sum(self.kl) / count,
                "mean_error": float(np.std(self.kl, ddof=1) / math.sqrt(count)) if count > 1 else None,
                "median": percentile(self.kl, 50),
                "p99": percentile(self.kl, 99),
                "max": max(self.kl),
            },
            "top1_agreement": self.agreed / count,
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities [n, V] in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def judge_quality(
    subject: Subject,
    original: Path,
    text_file: Path,
    *,
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare a bundle or checkpoint with the unquantized model on a text.

    Returns: `environment`, `model`, `text`, `reference`, `result`, `floor`.
    Raises: G4Error when the two have different vocabularies, or the text gives nothing to count.
    """
    if Gemma4Config.from_dir(original).vocab_size != subject.config.vocab_size:
        raise G4Error(f"{original} and {subject.path} have different vocabularies: they are different models.")
    window = min(WINDOW, subject.context_length)
    text = read_text(text_file, Chat.from_dir(original), limit=limit, window=window)
    result, floor = Tally(), Tally()
    with ExitStack() as stack:
        loaded = subject.load(threads, progress)
        stack.enter_context(loaded.engine)
        reference, dtype = _load_reference(original, subject.device, progress)
        other, method = _load_floor(original, reference, progress)
        with progress.phase("read", text.tokens, "tokens") as task:
            for passage in text.passages:
                ids = passage.ids[:-1]
                truth = _joined(reference.logits(ids))
                result.add(passage, truth, _joined(loaded.engine.logits(ids)))
                floor.add(passage, truth, _joined(other(ids)))
                task.advance(len(passage.ids))
    return {
        "environment": describe_environment(None),
        "model": subject.describe(),
        "text": {"name": text.name, "sha256": text.sha256, "tokens": text.tokens, "counted": text.counted,
                 "passages": len(text.passages)},
        "reference": {"name": original.resolve().name, "dtype": dtype},
        "result": result.to_json(),
        "floor": {"method": method, **floor.to_json()},
    }  # fmt: skip


def _load_reference(original: Path, device: str, progress: Progress) -> tuple[EagerEngine, str]:
    engine = _eager(original, device, None, progress)
    return engine, str(engine.model.cache.dtype).removeprefix("torch.")


def _load_floor(original: Path, reference: EagerEngine, progress: Progress) -> tuple[Any, str]:
    """Another way to compute the reference: in bfloat16 where that is not what it has, else in other chunks."""
    import torch

    if reference.model.cache.dtype == torch.float32:
        return _eager(original, "cpu", torch.bfloat16, progress).logits, "the original computed in bfloat16"
    return (
        lambda ids: reference.logits(ids, chunk=_OTHER_CHUNK),
        f"the original read in chunks of {_OTHER_CHUNK}",
    )


def _eager(original: Path, device: str, dtype: Any, progress: Progress) -> EagerEngine:
    from gemma4cli.engine.eager import EagerEngine

    context = min(WINDOW, Gemma4Config.from_dir(original).max_position_embeddings)
    return EagerEngine.from_checkpoint(original, context_length=context, device=device, dtype=dtype, progress=progress)


def _joined(blocks: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(blocks))
