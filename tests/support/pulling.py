"""What the pull tests share: models small enough to serve, and `g4 pull` against a hub of their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from tests.support.hub_server import HubServer

REPO = "owner/model"
_ROOT = Path(__file__).resolve().parents[2]


def folder_files(folder: Path) -> dict[str, bytes]:
    """Read a folder as a repository's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small_gguf(
    path: Path,
    kinds: tuple[GGMLQuantizationType, ...] = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.F32),
    *,
    architecture: str = "gemma4",
    tokens: int = 10,
) -> bytes:
    """Write a GGUF of one tensor of each type and a vocabulary, and return its bytes."""
    writer = GGUFWriter(path, architecture)
    writer.add_token_list([f"token number {index} of a vocabulary" for index in range(tokens)])
    for index, kind in enumerate(kinds):
        block_bytes = GGML_QUANT_SIZES[kind][1]
        row = np.full((4, 8 * block_bytes), index + 1, np.uint8)
        writer.add_tensor(f"blk.{index}.attn_q.weight", row, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Machine:
    """A hub, and a home with an empty cache and workspace.

    `pull` runs in this process, which saves a second per call; what depends on signals, or on the environment when
    huggingface_hub is imported, runs in its own through `start` or `run`.
    """

    hub: HubServer
    home: Path
    monkeypatch: pytest.MonkeyPatch
    capture: Any

    @property
    def cache(self) -> Path:
        return self.home / "hf" / "hub"

    @property
    def repo_cache(self) -> Path:
        return self.cache / f"models--{REPO.replace('/', '--')}"

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "G4_"))}
        mine = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "G4_HOME": str(self.home / "g4"),
            "G4_HUB_RETRY_WAIT": "0.01",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return {**kept, **mine, **changes}

    def start(
        self, *arguments: str, limit_bytes: int = resource.RLIM_INFINITY, **changes: str
    ) -> subprocess.Popen[str]:
        """Start a pull; no file it writes may grow beyond `limit_bytes`."""
        return subprocess.Popen(
            [sys.executable, "-m", "gemma4cli", "pull", *arguments],
            cwd=_ROOT,
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
        )

    def run(self, *arguments: str, limit_bytes: int = resource.RLIM_INFINITY, **changes: str) -> Outcome:
        """Pull in a process of its own."""
        with self.start(*arguments, limit_bytes=limit_bytes, **changes) as process:
            out, err = process.communicate(timeout=60)
        return Outcome(process.returncode, out, err)

    def pull(self, *arguments: str, endpoint: str | None = None, **changes: str) -> Outcome:
        """Pull in this process. huggingface_hub read its settings when it was imported; they are set to what it would
        have read."""
        from huggingface_hub import close_session, constants

        from gemma4cli.cli import main

        close_session()  # it keeps the proxies of the environment it was opened in

        with self.monkeypatch.context() as patch:
            for key in [key for key in os.environ if key.startswith("HF_")]:
                patch.delenv(key)
            for key, value in self.environment(**changes).items():
                patch.setenv(key, value)
            address = endpoint or self.hub.endpoint
            patch.setattr(constants, "ENDPOINT", address)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_CACHE", os.environ.get("HF_HUB_CACHE", str(self.cache)))
            patch.setattr(constants, "HF_TOKEN_PATH", str(self.home / "no-token"))
            self.capture.readouterr()
            code = main(["pull", *arguments])
            captured = self.capture.readouterr()
        return Outcome(code, captured.out, captured.err)

    def state(self) -> dict[str, object]:
        file = self.home / "g4" / "state.json"
        return json.loads(file.read_text()) if file.exists() else {}
