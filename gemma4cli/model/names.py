"""Names and shapes of the tensors of a checkpoint: the text model's, and as the config has them. Imports no torch.

Published checkpoints say `model.language_model.layers.3.…` (multimodal) or `model.layers.3.…` (text only); ours are the
latter. Tensors of the other modalities are left out everywhere: not fetched, not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config

LM_HEAD = "lm_head.weight"
OTHER_MODALITIES = ("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.")
# safetensors' names of the dtypes of plain checkpoints, and PyTorch's.
FLOAT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_TEXT_PREFIX = "model.language_model."


def is_text(key: str) -> bool:
    """Whether a tensor of a published checkpoint belongs to the text model."""
    return not key.startswith(OTHER_MODALITIES)


def our_name(key: str) -> str:
    """Return our name of a text tensor."""
    return "model." + key.removeprefix(_TEXT_PREFIX) if key.startswith(_TEXT_PREFIX) else key


def expected_shapes(config: Gemma4Config, *, untied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes a checkpoint must have, with `lm_head.weight` when it has one of its own."""
    shapes = config.parameter_shapes()
    if untied:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...] | None], *, where: str
) -> None:
    """Compare a checkpoint's tensors with a config's; a found shape of None is not compared.

    Raises: G4Error naming the first tensors that are unmatched, missing or misshaped.
    """
    hint = "config.json and the weights belong to different models, or the download is incomplete: g4 pull"
    if unmatched := [name for name in found if name not in expected]:
        raise G4Error(f"{where}: {some(unmatched)} does not belong to the model that config.json describes.", hint=hint)
    if missing := [name for name in expected if name not in found]:
        raise G4Error(f"{where}: {some(missing)} is missing.", hint=hint)
    for name, shape in found.items():
        if shape is not None and shape != expected[name]:
            raise G4Error(
                f"{where}: {name} has shape {list(shape)}, but config.json makes it {list(expected[name])}.", hint=hint
            )


def some(names: list[str]) -> str:
    """Name the first of several, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
