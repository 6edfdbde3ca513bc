"""The one door to torchao: the two tensor classes of our checkpoints and its safetensors flattening.

Importing torchao prints a warning for each of its extension libraries built for other GPUs and one about an enum;
none concerns the user, so they are held back while it is imported.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# torch configures its own loggers when it is imported, so that comes first.
import torch  # noqa: E402, F401

with _quiet("torchao", "torch.utils._pytree"):
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_CLASSES, ALLOWED_TENSORS_SUBCLASSES
    from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor

__all__ = [
    "ALLOWED_CLASSES",
    "ALLOWED_TENSORS_SUBCLASSES",
    "Int4Tensor",
    "IntxUnpackedToInt8Tensor",
    "flatten_tensor_state_dict",
    "unflatten_tensor_state_dict",
]
