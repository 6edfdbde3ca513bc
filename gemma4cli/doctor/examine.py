"""All checks in order, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4cli.doctor import gpu, machine, software
from gemma4cli.doctor.check import Check, Purpose, ok
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import open_bundle


@dataclass(frozen=True)
class Report:
    """What was found; `bundle` is the folder that the machine was looked at for, None when there was none."""

    bundle: Path | None
    targets: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def failing(self) -> list[Check]:
        return [check for check in self.checks if check.fails]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.failing,
            "bundle": None if self.bundle is None else str(self.bundle),
            "targets": list(self.targets),
            "checks": [check.to_json() for check in self.checks],
        }


def examine(bundle: Path | None, targets: tuple[str, ...], workspace: Path) -> Report:
    """Look at the machine with a bundle to run, targets to export for, both, or neither in mind."""
    checks: list[Check] = []
    purpose = Purpose(targets=targets)
    if bundle is not None:
        try:
            purpose = Purpose(open_bundle(bundle), targets)
            checks.append(ok("bundle", f"whole; for {', '.join(purpose.bundle.manifest.targets)}", needed=True))
        except G4Error as error:
            checks.append(Check("bundle", "missing", error.message, needed=True, do=error.hint))
    on_gpu, card = gpu.check_gpu(purpose)
    checks += [
        software.check_runner(),
        machine.check_memory(purpose),
        machine.check_disk(workspace),
        machine.check_shared_memory(),
        gpu.check_driver(purpose),
        on_gpu,
        gpu.check_gpu_memory(purpose, card),
        software.check_delegate(purpose),
        gpu.check_cdi(card),
        software.check_torch(purpose),
        software.check_compilers(purpose),
        software.check_compiler(purpose),
        software.check_headers(purpose),
        software.check_driver_stub(purpose),
    ]
    return Report(bundle, targets, tuple(checks))
