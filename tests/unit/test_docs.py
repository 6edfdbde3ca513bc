"""What the documentation says exists: commands parse, paths and links are there, nothing goes unexecuted unsaid."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest

from gemma4cli import cli
from tests.cli.test_help import assert_parses
from tests.support.markdown import ROOT, Block, shell_blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in shell_blocks(page)]
# tests/pipeline/test_readme.py runs every block of the README that gives none of these reasons; ci/container.sh those of
# the README and of container.md that name it.
REASONS = {"run by .ci/run", "run by ci/container.sh", "needs a GPU", "needs a large download"}


def commands(block: Block, program: str) -> list[list[str]]:
    """Return the arguments of every call of `program` in a block."""
    calls = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        parts = [
            list(group) for end, group in itertools.groupby(words, lambda w: w in ("|", "&&", ";", ">")) if not end
        ]
        calls += [part[1:] for part in parts if part[:1] == [program]]
    return calls


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_g4_command_parses(block: Block) -> None:
    for arguments in commands(block, "g4"):
        assert_parses(arguments)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_make_target_exists(block: Block) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for arguments in commands(block, "make"):
        assert arguments[0] in targets


def test_reasons_for_not_running_a_block_are_known() -> None:
    assert {block.reason for block in shell_blocks(ROOT / "README.md") if block.reason} <= REASONS
    assert {block.reason for block in shell_blocks(ROOT / "docs" / "container.md")} <= REASONS


def test_blocks_that_build_or_run_a_container_are_run_by_its_script() -> None:
    for block in BLOCKS:
        if "podman" in block.text and block.reason != "needs a GPU":
            assert block.page in ("README.md", "container.md") and block.reason == "run by ci/container.sh", block
    script = (ROOT / "ci" / "container.sh").read_text(encoding="utf-8")
    assert "README.md docs/container.md" in script and 'block.reason == "run by ci/container.sh"' in script


def test_the_table_has_every_command_in_order() -> None:
    listed = re.findall(r"^\| `g4 ([a-z-]+)` \|", README, re.MULTILINE)
    assert listed == [name.replace("_", "-") for name in cli.COMMANDS]


def test_every_sentence_of_the_troubleshooting_table_is_said_somewhere() -> None:
    table = README.partition("## When something is wrong")[2].partition("## Layout")[0]
    sentences = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(sentences) > 8
    files = [*(ROOT / "gemma4cli").rglob("*.py"), *(ROOT / "runner").glob("*.cpp")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # Names of packages, backends, targets and folders are filled in when the sentence is said.
    names = r"…|\b(?:CudaBackend|GPU|libcuda\.so\.1|sm_\d+|exported|bundle|torch(?: [\d.]+)?|g4-runner)\b"
    for sentence in sentences:
        for part in re.split(names, sentence):
            assert part.strip(" .:();") in said, sentence


def test_every_path_of_the_layout_exists() -> None:
    layout = README.partition("## Layout")[2].split("```")[1]
    paths = [line.split()[0] for line in layout.strip().splitlines()]
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).is_dir() == path.endswith("/"), path
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
