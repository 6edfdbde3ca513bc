"""Programs built ahead are those that an export of such a model asks for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gemma4cli.export.cuda import compile
from gemma4cli.export.cuda.model import Signature
from gemma4cli.kernels.targets import Target
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import BUILT_IN, load_recipe
from tests.support.gemma4_31b import config_dict
from tests.support.tiny import write_checkpoint


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "prebuild_programs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", BUILT_IN)
def test_a_recipes_formats_are_those_of_its_checkpoint(tool: ModuleType, recipe: str, tmp_path: Path) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "plain"), tmp_path / "quantized", load_recipe(recipe))
    reader = open_checkpoint(tmp_path / "quantized")
    signature = Signature.of(reader, CacheSpec(64, 8, torch.bfloat16), "folded")
    assert tool.formats_of(reader.config, recipe) == signature.formats


def test_the_mix_of_a_full_size_file(tool: ModuleType) -> None:
    """Of the 60 down projections 30 have more bits, of the 50 v projections 25, and the embedding."""
    formats = tool.formats_of(Gemma4Config.from_json(config_dict()), "q4_k_m")
    better = sorted(name for name, fmt in formats.items() if fmt.bits == 6)
    assert (len(formats), len(better)) == (411, 56)
    downs = sorted(int(name.split(".")[2]) for name in better if "down_proj" in name)
    assert downs == [*range(7), *range(9, 52, 3), *range(52, 60)]


def test_a_relative_folder_of_programs(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers run in folders of their own, where it would be another one."""
    places = []

    def compile_apart(signature: Signature, method: str, target: Target, cache: Path) -> compile.Library:
        places.append(cache)
        return compile.Library(b"code", (), {})

    monkeypatch.setattr(compile, "_compile_apart", compile_apart)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(config_dict()))
    arguments = ["config.json", "--mix", "q4_0", "--ctx", "1k", "--kv", "folded", "--target", "sm_90", "--out", "made"]
    monkeypatch.setattr("sys.argv", ["prebuild_programs.py", *arguments])
    tool.main()
    assert places == [tmp_path / "made"] * 2
    assert len(list(Path("made").glob("sm_90-*/decode.so"))) == 1


def test_a_programs_name_follows_the_kernels_and_the_model_it_is_made_of() -> None:
    """And not what merely lies beside them: the model that chooses configurations, say."""
    listing = (
        "import sys, gemma4cli.export.cuda.lower as _; print(*(m for m in sys.modules if m.startswith('gemma4cli.')))"
    )
    run = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    modules = {name.split(".", 1)[1] for name in run.stdout.split()}
    made_of = {name for name in modules if name.split(".")[0] in ("kernels", "model")}
    package = Path(compile.__file__).parents[2]
    covered = {path.relative_to(package) for pattern in compile._SOURCES for path in package.glob(pattern)}
    named = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in covered}
    assert made_of <= named
    assert not {"kernels.occupancy", "kernels.machine_code"} & named


@pytest.mark.parametrize(
    ("config", "ctx", "code", "sentence"),
    [
        ("none.json", "1k", 1, "none.json"),
        ("bad.json", "1k", 1, "model_type is missing"),
        ("bad.json", "abc", 2, "'abc'"),
    ],
)
def test_mistakes_get_a_sentence(
    tool: ModuleType, config: str, ctx: str, code: int, sentence: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bad.json").write_text('{"a": 1}')
    arguments = [str(tmp_path / config), "--mix", "q4_0", "--ctx", ctx, "--kv", "folded", "--target", "sm_90",
                 "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["prebuild_programs.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
