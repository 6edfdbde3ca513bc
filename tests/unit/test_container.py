"""The Containerfile, the CI examples and docs/container.md agree with each other and with the command line."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.test_help import assert_parses

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "Containerfile").read_text()
PAGE = (ROOT / "docs" / "container.md").read_text()
EXAMPLES = sorted((ROOT / "ci").glob("*.yml"))
TARGETS = {"full", "runtime"}


def scripts(document: object) -> list[str]:
    """Return every shell script of a pipeline: GitHub's `run`, GitLab's `script`."""
    if isinstance(document, dict):
        found = [document[key] for key in ("run",) if key in document] + list(document.get("script", []))
        return found + [script for value in document.values() for script in scripts(value)]
    return [script for item in document for script in scripts(item)] if isinstance(document, list) else []


def test_every_argument_is_documented_and_exists() -> None:
    declared = set(re.findall(r"^ARG (\w+)", CONTAINERFILE, re.MULTILINE))
    assert declared == set(re.findall(r"^\| `([A-Z0-9_]+)` \|", PAGE, re.MULTILINE))
    assert set(re.findall(r"^FROM \S+ AS (\w+)", CONTAINERFILE, re.MULTILINE)) >= TARGETS
    for target in TARGETS:
        assert f"--target {target}" in PAGE


def test_every_lock_is_documented_and_used() -> None:
    for path in (ROOT / "container").glob("*.lock"):
        assert f"`{path.name}`" in PAGE
        assert path.name in CONTAINERFILE.replace("torch-${VARIANT}", path.stem), path.name


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_the_ci_examples_are_valid_and_their_commands_parse(page: Path) -> None:
    found = scripts(yaml.safe_load(page.read_text()))
    assert any("--device nvidia.com/gpu=all" in script and "--baseline" in script for script in found)
    calls = 0
    for script in found:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for name in re.findall(r"--build-arg \"?(\w+)=", script):
            assert f"ARG {name}" in CONTAINERFILE
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            image = next((index for index, word in enumerate(words) if word.startswith("g4:$")), None)
            if "run" in words and image is not None:
                arguments = [word for word in words[image + 1 :] if not word.startswith("${")]
                assert_parses(arguments[: arguments.index(">")] if ">" in arguments else arguments)
                calls += 1
    assert calls == 2


def test_the_ci_script_is_valid_shell() -> None:
    for script in (ROOT / "ci" / "container.sh", ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", script], check=True)
