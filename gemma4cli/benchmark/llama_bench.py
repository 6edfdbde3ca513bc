"""llama.cpp's llama-bench on the same tests, one round at a time.

Every round is a process of its own with `-r 1`, so that it alternates with ours; it loads the model again and warms up
by itself. Its results are read from `-o json`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4cli.benchmark.plan import Case
from gemma4cli.benchmark.samples import percentile, spread
from gemma4cli.errors import G4Error

_MAGIC = b"GGUF"
_KEPT = (
    "build_commit", "build_number", "backends", "cpu_info", "gpu_info", "model_type", "model_size", "model_n_params",
    "n_batch", "n_ubatch", "n_threads", "n_gpu_layers", "flash_attn", "type_k", "type_v",
)  # fmt: skip
_ALL_LAYERS = 999


@dataclass
class LlamaBench:
    """The other side of a comparison.

    rates: tokens per second by test, one value per round.
    settings: what it said about its build and how it ran.
    """

    program: Path
    gguf: Path
    tests: tuple[Case, ...]
    device: str
    threads: int | None
    rates: dict[Case, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is measured."""
        if self.program.is_dir() or not os.access(self.program, os.X_OK):
            raise G4Error(
                f"{self.program} is not an executable file.", hint="Name llama.cpp's llama-bench: --vs llama-bench=PATH"
            )
        if not self.gguf.is_file():
            raise G4Error(f"{self.gguf} does not exist.", hint="Check the path given to --gguf.")
        with open(self.gguf, "rb") as file:
            if file.read(4) != _MAGIC:
                raise G4Error(f"{self.gguf} is not a GGUF file.", hint="--gguf takes the file that llama.cpp runs.")

    def command(self) -> list[str]:
        """The command line of one round."""

        def joined(values: Sequence[int]) -> str:
            return ",".join(str(value) for value in sorted(set(values)) if value) or "0"

        tests = [test for test in self.tests if test.path == "model"]
        depths = ",".join(str(depth) for depth in sorted({test.n_depth for test in tests}))
        return [
            str(self.program), "-m", str(self.gguf), "-r", "1", "-o", "json",
            "-p", joined([test.n_prompt for test in tests]), "-n", joined([test.n_gen for test in tests]),
            *(("-d", depths) if depths != "0" else ()),
            "-ngl", "0" if self.device == "cpu" else str(_ALL_LAYERS),
            *(("-t", str(self.threads)) if self.threads is not None else ()),
        ]  # fmt: skip

    def run_round(self) -> None:
        """Time every test once.

        Raises: G4Error with the program's last words, or saying what its output lacks.
        """
        done = subprocess.run(self.command(), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise G4Error(
                f"llama-bench ended with exit status {done.returncode}{': ' + words[-1] if words else '.'}",
                hint="Both models are loaded at the same time; is there enough memory?",
            )
        for result in self._parse(done.stdout):
            test = Case(result.get("n_depth", 0), result["n_prompt"], result["n_gen"])
            if test in self.tests:
                self.rates.setdefault(test, []).extend(float(rate) for rate in result["samples_ts"])
                self.settings = {name: result.get(name) for name in _KEPT}
        missing = [test.name for test in self.tests if test.path == "model" and test not in self.rates]
        if missing:
            raise G4Error(
                f"llama-bench gave no result for {', '.join(missing)}.", hint="Is it too old to know -d (--n-depth)?"
            )

    def to_json(self, ours: dict[Case, float]) -> dict[str, Any]:
        """Both medians and their ratio, above 1 where g4 is faster."""
        tests = []
        for test, rates in sorted(self.rates.items()):
            theirs = percentile(rates, 50)
            mine = ours.get(test)
            ratio = None if mine is None else mine / theirs
            tests.append({"test": test.name, "g4_ts": mine, "ratio": ratio, "samples_ts": rates, **spread(rates)})
        return {"program": "llama-bench", "gguf": self.gguf.name, **self.settings, "tests": tests}

    def _parse(self, text: str) -> list[dict[str, Any]]:
        needed = ("n_prompt", "n_gen", "samples_ts")
        try:
            results = json.loads(text)
        except ValueError:
            results = None
        whole = isinstance(results, list) and all(
            isinstance(result, dict) and all(name in result for name in needed) for result in results
        )
        if not whole:
            raise G4Error(
                f"{self.program} did not print llama-bench's JSON: {text.strip()[:60]!r}.",
                hint="Name llama.cpp's llama-bench: --vs llama-bench=PATH",
            )
        return results


def parse_rival(text: str) -> Path:
    """Read `--vs llama-bench=PATH`."""
    name, found, path = text.partition("=")
    if name != "llama-bench" or not found or not path:
        raise G4Error(f"{text!r} is not a program to compare with.", hint="Write --vs llama-bench=PATH.", exit_code=2)
    return Path(path).expanduser().absolute()  # a bare name would be looked for on the PATH
