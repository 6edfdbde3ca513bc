"""Check a CUDA bundle on a GPU: its compiled code must compute what the model computes uncompiled.

Both read the same packed weights, so that nothing is held twice; the caches are apart. The context is filled past
several turns of the sliding layers' rings, in chunks of the largest size and of odd ones, then tokens are decoded one
by one. Rounding differs (kernels are fused), so logits are compared by their angle, and a token may differ where two
are nearly as probable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4cli.engine.compiled import CompiledEngine
from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.model.settings import GREEDY
from gemma4cli.progress import SILENT, Progress

MIN_COSINE = 0.999
MIN_EQUAL = 0.9
DECODED_TOKENS = 64
_RING_TURNS = 3
_SESSION = "verify"
_HINT = "The bundle is not marked as verified. Please report the GPU, and the output of g4 --version."


@dataclass(frozen=True)
class Verification:
    """What was compared, and how close it was.

    Attributes:
        worst_cosine: of the logits of any step; at least MIN_COSINE.
        worst_error: largest difference of any logit.
        equal_tokens: of the decoded tokens; at least MIN_EQUAL of them.
    """

    gpu: str
    torch: str
    prefilled_tokens: int
    decoded_tokens: int
    equal_tokens: int
    worst_cosine: float
    worst_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_bundle(bundle: Path, signature: Signature, progress: Progress = SILENT) -> Verification:
    """Compare a bundle's compiled methods with the model as PyTorch runs it.

    Raises: G4Error without a GPU, or when they disagree, saying where and by how much.
    """
    engine = CompiledEngine.from_bundle(bundle, progress)
    contract = engine.contract
    with torch.no_grad():
        model = _uncompiled(engine, signature)
        count = min(contract.context_length - DECODED_TOKENS - 1, _RING_TURNS * (contract.ring_slots or 512))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, contract.vocab_size, (count,), generator=generator).tolist()
        steps: list[tuple[Tensor, Tensor]] = []

        def step(piece: list[int], position: int) -> int:
            _, ours = engine.step(_SESSION, piece, GREEDY)
            ours = ours[0].clone()
            where = torch.arange(position, position + len(piece), device=ours.device)
            theirs = model(torch.tensor([piece], device=ours.device), where)[0, -1]
            steps.append((ours, theirs))
            _compare(ours, theirs, position + len(piece))
            return int(theirs.argmax())

        with progress.phase("verify", count + DECODED_TOKENS, "tokens") as task:
            position, sizes = 0, cycle((contract.prefill_chunk, 37, contract.prefill_chunk - 1, 2, 1))
            while position < count:
                piece = tokens[position : position + next(sizes)]
                chosen = step(piece, position)
                position += len(piece)
                task.advance(len(piece))
            prefilled = len(steps)
            for _ in range(DECODED_TOKENS):
                chosen = step([chosen], position)
                position += 1
                task.advance(1)
    return _judge(steps, prefilled, count)


def _uncompiled(engine: CompiledEngine, signature: Signature) -> CudaModel:
    """Build the model on the engine's weights, with caches of its own."""
    weights = engine.weights
    with torch.device("meta"):
        model = CudaModel(signature).eval()
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                held = weights.get(f"model.{path}.{name}" if path else f"model.{name}")
                if held is None:
                    held = torch.zeros(tensor.shape, dtype=tensor.dtype, device=engine.device)
                store[name] = nn.Parameter(held, False) if isinstance(tensor, nn.Parameter) else held
    return model


def _compare(ours: Tensor, theirs: Tensor, position: int) -> None:
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
    if not cosine >= MIN_COSINE:  # NaN fails, too
        raise G4Error(
            f"The compiled program is wrong: after {position:,} tokens its logits have cosine {cosine:.6f} to the "
            f"uncompiled model's; at least {MIN_COSINE} was expected.",
            hint=_HINT,
        )


def _judge(steps: list[tuple[Tensor, Tensor]], prefilled: int, count: int) -> Verification:
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in steps]
    worst = max((a - b).abs().max().item() for a, b in steps)
    equal = sum(int(a.argmax()) == int(b.argmax()) for a, b in steps[prefilled:])
    if equal < MIN_EQUAL * (len(steps) - prefilled):
        raise G4Error(
            f"The compiled program is wrong: it chooses {equal} of {len(steps) - prefilled} tokens as the uncompiled "
            f"model does; at least {MIN_EQUAL:.0%} were expected.",
            hint=_HINT,
        )
    return Verification(
        torch.cuda.get_device_name(), torch.__version__, count, len(steps) - prefilled, equal, min(cosines), worst
    )
