"""What ExecuTorch and torch say about themselves while exporting, held back."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what ExecuTorch says about itself; each message is known and none concerns the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This API and all of .* related functionality are experimental")
        # Caches start empty by design: only their shape is stored.
        warnings.filterwarnings("ignore", "Mutation on a buffer in the model is detected", UserWarning)
        # ExecuTorch's own use of a torch name that is going away.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
        yield
