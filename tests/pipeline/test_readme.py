"""The README's shell blocks, run as they stand by a shell; those that give a reason for not being run are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown import ROOT, Block, shell_blocks

BLOCKS = [block for block in shell_blocks(ROOT / "README.md") if block.reason is None]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_block_does_what_it_says(block: Block, tmp_path: Path) -> None:
    g4 = tmp_path / "bin" / "g4"
    g4.parent.mkdir()
    g4.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gemma4cli "$@"\n')
    g4.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{g4.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "G4_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "What is the capital of France?" in block.text:
        assert done.stdout.splitlines()[-1] == "Paris"
