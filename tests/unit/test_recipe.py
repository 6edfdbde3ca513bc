"""Recipes: which rule decides, what the built-in ones do, and every sentence about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gemma4cli.errors import G4Error
from gemma4cli.quant.recipe import BUILT_IN, QuantSpec, Recipe, Rule, load_recipe, parse_recipe
from tests.support.tiny import tiny_config

INT4 = QuantSpec(4, 32, False, "min-max")
INT8 = QuantSpec(8, 0, True, "min-max")
HQQ4 = QuantSpec(4, 32, False, "hqq")
LINEARS = r"model\.layers\..*_proj\.weight|lm_head\.weight"


def recipe(*rules: Rule, tie: bool = False) -> Recipe:
    return Recipe("test", "for tests", tie, rules)


def specs(built: Recipe, separate_head: bool = False, **overrides: object) -> dict[str, QuantSpec | None]:
    assignments = built.assign(tiny_config(**overrides), separate_head=separate_head)
    return {assignment.name: assignment.spec for assignment in assignments}


def test_default_quantizes_every_matrix_and_keeps_the_rest() -> None:
    found = specs(load_recipe("default"))
    assert found.pop("model.embed_tokens.weight") == INT8
    assert set(found) == {*tiny_config().parameter_shapes(), "lm_head.weight"} - {"model.embed_tokens.weight"}
    for name, spec in found.items():
        assert spec == (INT4 if name.endswith("_proj.weight") or name == "lm_head.weight" else None), name


def test_sensitive_protects_values_and_down_proj_in_the_outer_quarters_of_the_31b_layout() -> None:
    """Quarters of 60 layers are 0 to 14 and 45 to 59; where K = V, k_proj holds the values."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 10
    found = specs(load_recipe("sensitive"), num_hidden_layers=60, layer_types=kinds)
    outer = [*range(15), *range(45, 60)]
    protected = {f"model.layers.{i}.mlp.down_proj.weight" for i in outer}
    protected |= {f"model.layers.{i}.self_attn.{'k' if i % 6 == 5 else 'v'}_proj.weight" for i in outer}
    assert {name for name, spec in found.items() if spec == INT8} == protected | {"model.embed_tokens.weight"}
    assert all(spec in (INT8, HQQ4) for name, spec in found.items() if name.endswith("_proj.weight"))
    assert found["lm_head.weight"] == HQQ4


def test_first_match_wins() -> None:
    first = Rule(r".*\.q_proj\.weight", spec=INT8)
    built = recipe(first, Rule(".*_proj.*", spec=INT4), Rule(".*"))
    assignments = {a.name: a for a in built.assign(tiny_config(), separate_head=False)}
    assert assignments["model.layers.0.self_attn.q_proj.weight"].spec == INT8
    assert assignments["model.layers.0.self_attn.q_proj.weight"].rule == 1
    assert assignments["model.layers.0.self_attn.o_proj.weight"].rule == 2
    assert assignments["model.norm.weight"].rule == 3


def test_a_pattern_must_match_the_whole_name() -> None:
    with pytest.raises(G4Error, match=r"Recipe test has no rule for model\.embed_tokens\.weight\."):
        specs(recipe(Rule("embed_tokens")))


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ((3,), {3}),
        (("2-4",), {2, 3, 4}),
        ((0, "9-30"), {0, 9, 10, 11}),
        (("first-quarter",), {0, 1, 2}),
        (("last-quarter",), {9, 10, 11}),
        (("first-half",), {0, 1, 2, 3, 4, 5}),
        (("last-third",), {8, 9, 10, 11}),
        (("first-eighth",), {0, 1}),  # 1.5 layers: rounded up
        (("last-10%",), {10, 11}),  # 1.2 layers
        (("first-1%", "last-1%"), {0, 11}),
    ],
)
def test_layer_filters(layers: tuple[int | str, ...], chosen: set[int]) -> None:
    found = specs(recipe(Rule(r".*\.o_proj\.weight", layers, spec=INT8), Rule(".*")))
    assert {int(name.split(".")[2]) for name, spec in found.items() if spec} == chosen


@pytest.mark.parametrize(
    ("attention", "k_eq_v", "chosen"),
    [
        ("full", True, {5, 11}),
        ("sliding", True, {0, 1, 2, 3, 4, 6, 7, 8, 9, 10}),
        ("k_eq_v", True, {5, 11}),
        ("k_eq_v", False, set()),
    ],
)
def test_attention_filters(attention: str, k_eq_v: bool, chosen: set[int]) -> None:
    rules = (Rule(r".*\.o_proj\.weight", attention=attention, spec=INT8), Rule(".*"))
    found = specs(recipe(*rules), attention_k_eq_v=k_eq_v, num_global_key_value_heads=2)
    assert {int(name.split(".")[2]) for name, spec in found.items() if spec} == chosen


def test_a_filtered_rule_does_not_reach_tensors_outside_layers() -> None:
    found = specs(recipe(Rule(".*weight", ("first-half",), spec=None), Rule(".*embed.*", spec=INT8), Rule(".*")))
    assert found["model.embed_tokens.weight"] == INT8


def test_a_tied_head_is_stored_once_when_both_roles_agree() -> None:
    assert "lm_head.weight" not in specs(recipe(Rule(".*embed.*|lm_head.*", spec=INT8), Rule(".*")))
    assert "lm_head.weight" not in specs(recipe(Rule(".*")))


def test_a_tied_head_is_stored_apart_when_the_roles_differ() -> None:
    built = recipe(Rule("lm_head.*", spec=INT4), Rule(".*embed.*", spec=INT8), Rule(".*"))
    head = built.assign(tiny_config(), separate_head=False)[-1]
    assert (head.name, head.source, head.spec) == ("lm_head.weight", "model.embed_tokens.weight", INT4)


def test_tie_needs_no_rule_for_the_head() -> None:
    built = recipe(Rule(r"model\.embed.*", spec=INT8), Rule(r"model\.(layers|norm).*"), tie=True)
    assert specs(built)["model.embed_tokens.weight"] == INT8


def test_tie_is_refused_for_a_separate_head() -> None:
    with pytest.raises(G4Error, match=r"tie = true, but this model's lm_head\.weight is not its embedding"):
        specs(recipe(Rule(".*"), tie=True), separate_head=True)


@pytest.mark.parametrize("tied_in_config", [True, False])
def test_a_separate_head_is_its_own_tensor_even_when_the_roles_agree(tied_in_config: bool) -> None:
    built = recipe(Rule(".*embed.*|lm_head.*", spec=INT8), Rule(".*"))
    head = built.assign(tiny_config(tie_word_embeddings=tied_in_config), separate_head=True)[-1]
    assert (head.name, head.source) == ("lm_head.weight", "lm_head.weight")


def test_unused_rules_are_found() -> None:
    built = recipe(Rule("typo.*", spec=INT8), Rule(".*"), Rule(".*"))
    assert built.unused_rules(built.assign(tiny_config(), separate_head=False)) == [1, 3]


@pytest.mark.parametrize(
    ("match", "spec", "problem"),
    [
        (
            r"model\.norm\.weight",
            INT8,
            r"rule 1 \(int8 per-row symmetric min-max\) cannot quantize model\.norm\.weight: it has shape \[64\]",
        ),
        (r".*\.q_proj\.weight", QuantSpec(4, 48, False, "hqq"), "rows of 64 weights do not divide into groups of 48"),
    ],
)
def test_what_a_rule_cannot_quantize_is_named(match: str, spec: QuantSpec, problem: str) -> None:
    with pytest.raises(G4Error, match=problem):
        specs(recipe(Rule(match, spec=spec), Rule(".*")))


def test_odd_rows_do_not_fit_4_bits() -> None:
    assert QuantSpec(4, 0, True, "min-max").problem_with((8, 7)) == (
        "its rows of 7 weights do not fill whole bytes at 4 bits"
    )


HEAD = 'name = "x"\ndescription = "y"\n'
SPEC = "bits = 4\ngroup_size = 32\nsymmetric = false\nmethod = 'hqq'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "recipe.toml is not valid TOML"),
        ('description = "y"', "recipe.toml: name is missing or not text"),
        ('name = "x"', "recipe.toml: description is missing or not text"),
        (HEAD + "[[rules]]\n", "recipe.toml: unknown key rules"),
        (HEAD, "recipe.toml has no rules"),
        (HEAD + "rule = 3", "recipe.toml has no rules"),
        (HEAD + "tie = 1\n[[rule]]\nmatch='.*'\nkeep=true", "recipe.toml: tie is 1; it must be true or false"),
        (HEAD + "[[rule]]\nkeep = true", "recipe.toml, rule 1: match is missing or not text"),
        (HEAD + "[[rule]]\nmatch = '('\nkeep = true", r"rule 1: match = '\(' is not a regular expression"),
        (HEAD + "[[rule]]\nmatch='a'\nkeep=true\n[[rule]]\nmatch='b'\nbitz=4", "rule 2: unknown key bitz"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = false", "rule 1: keep is False; it can only be true"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nbits = 4", "rule 1: keep = true and bits contradict each other"),
        (HEAD + "[[rule]]\nmatch = 'a'\nbits = 4\nsymmetric = true\nmethod='hqq'", "rule 1: group_size is missing"),
        (HEAD + "[[rule]]\nmatch = 'a'\n" + SPEC.replace("4", "5"), "rule 1: bits is 5; it must be 4 or 8"),
        (HEAD + "[[rule]]\nmatch = 'a'\n" + SPEC.replace("4", "true"), "rule 1: bits is True"),
        (HEAD + "[[rule]]\nmatch = 'a'\n" + SPEC.replace("32", "-1"), "rule 1: group_size is -1"),
        (HEAD + "[[rule]]\nmatch = 'a'\n" + SPEC.replace("false", "0"), "rule 1: symmetric is 0"),
        (HEAD + "[[rule]]\nmatch = 'a'\n" + SPEC.replace("hqq", "gptq"), "rule 1: method is 'gptq'"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nattention = 'local'", "rule 1: attention is 'local'"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = ['middle']", "rule 1: layers has 'middle'"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = ['9-3']", "rule 1: layers has '9-3'"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = [-1]", "rule 1: layers has -1"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = [true]", "rule 1: layers has True"),
        (HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = ['last-0%']", "rule 1: layers has 'last-0%'"),
    ],
)
def test_every_mistake_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(G4Error, match=message):
        load_recipe(str(path))


def test_a_single_layers_item_needs_no_list() -> None:
    built = parse_recipe(HEAD + "[[rule]]\nmatch = 'a'\nkeep = true\nlayers = 'first-half'", "here")
    assert built.rules[0].layers == ("first-half",)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(G4Error, match=r"'fast' is not a built-in recipe \(default, sensitive\), nor the path of"):
        load_recipe("fast")
    with pytest.raises(G4Error, match=r"The recipe .*gone\.toml does not exist"):
        load_recipe(str(tmp_path / "gone.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(G4Error, match=r"latin\.toml is not UTF-8 text"):
        load_recipe(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_printed_recipe_reads_back_as_itself(name: str) -> None:
    built = load_recipe(name)
    comments = ["a comment"] + [None] * (len(built.rules) - 1)
    assert parse_recipe(built.to_toml(comments), "printed") == built


def test_printing_survives_quotes_and_other_alphabets() -> None:
    built = Recipe("é", 'say "no" \\ 数', True, (Rule(r"it's\.here", (1, "2-3"), "full", INT4), Rule(r"\w'\"")))
    assert parse_recipe(built.to_toml([None, None]), "printed") == built


def test_the_recipe_in_the_documentation_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    built = parse_recipe(page.split("```toml\n")[1].split("```")[0], "docs/quantization.md")
    found = specs(built, num_hidden_layers=36, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 6)
    protected = {name for name, spec in found.items() if spec == INT8}
    assert {int(name.split(".")[2]) for name in protected} == {*range(9), 20, *range(30, 36)}
    assert found["lm_head.weight"] == HQQ4
    assert found["model.embed_tokens.weight"] is None


def test_reading_recipes_imports_no_torch() -> None:
    code = "import sys, gemma4cli.quant.recipe as r; r.load_recipe('default'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
