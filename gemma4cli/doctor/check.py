"""One thing looked at, and what the machine is wanted for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma4cli.export.bundle import Bundle

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """What was found, and what to do about it.

    Attributes:
        state: warning means that it works, but not for everything or not for long.
        needed: whether the purpose fails without it; only then is a missing thing a failure.
        do: what to do, in a sentence or a command; None when it is ok.
    """

    name: str
    state: State
    found: str
    needed: bool = False
    do: str | None = None

    @property
    def fails(self) -> bool:
        return self.needed and self.state == "missing"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Purpose:
    """What the machine is wanted for: to run a bundle, to export for targets, or (neither) just to work."""

    bundle: Bundle | None = None
    targets: tuple[str, ...] = ()

    @property
    def runs_on_gpu(self) -> bool:
        return self.bundle is not None and self.bundle.manifest.backend == "cuda"

    @property
    def exports(self) -> bool:
        return bool(self.targets)

    @property
    def compiles_for_gpu(self) -> bool:
        return any(target != "cpu" for target in self.targets)

    @property
    def memory_bytes(self) -> int:
        """What the bundle takes while it runs, on whatever it runs on; 0 without one."""
        return 0 if self.bundle is None else self.bundle.manifest.memory.total_bytes


def ok(name: str, found: str, *, needed: bool = False) -> Check:
    """A check that found what it looked for."""
    return Check(name, "ok", found, needed)
