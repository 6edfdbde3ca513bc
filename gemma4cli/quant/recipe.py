"""Recipes: which tensor is quantized how, as data.

A recipe is an ordered list of rules. A rule names tensors by a regular expression that must match the whole canonical
name, may be narrowed to some layers, and says either `keep` or how to quantize. The first rule that matches a tensor
decides; a tensor that no rule matches is an error, so nothing is ever quantized or kept by accident.

A tied embedding plays two roles, `model.embed_tokens.weight` (a lookup) and `lm_head.weight` (a matrix product). Both
are asked of the rules. Equal answers, or `tie = true`, store one tensor; different answers store two.

This module imports no torch: the command line reads recipes for its help and its checks.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from gemma4cli.errors import G4Error
from gemma4cli.model.config import FULL, SLIDING, Gemma4Config, LayerConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
BUILT_IN = ("default", "sensitive")

Method = Literal["min-max", "hqq"]
Attention = Literal["sliding", "full", "k_eq_v"]

_METHODS = ("min-max", "hqq")
_ATTENTION = ("sliding", "full", "k_eq_v")
_SPEC_KEYS = ("bits", "group_size", "symmetric", "method")
_RULE_KEYS = ("match", "layers", "attention", "keep", *_SPEC_KEYS)
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\..+")
_END = re.compile(r"(first|last)-(half|third|quarter|eighth|[1-9]\d?%)")
_RANGE = re.compile(r"(\d+)-(\d+)")
_SHARES = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4), "eighth": Fraction(1, 8)}


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. `group_size` counts the weights of a row that share a scale; 0 means all of them."""

    bits: int
    group_size: int
    symmetric: bool
    method: Method

    def __post_init__(self) -> None:
        _require("bits", self.bits, _is_int(self.bits) and self.bits in (4, 8), "4 or 8")
        groups = _is_int(self.group_size) and (self.group_size == 0 or self.group_size >= 2)
        _require("group_size", self.group_size, groups, "0 (one scale per row) or a number of weights from 2")
        _require("symmetric", self.symmetric, isinstance(self.symmetric, bool), "true or false")
        _require("method", self.method, self.method in _METHODS, '"min-max" or "hqq"')

    def group_of(self, columns: int) -> int:
        """Return the number of weights that share a scale in a row of `columns`."""
        return self.group_size or columns

    def problem_with(self, shape: tuple[int, ...]) -> str | None:
        """Say why a tensor of this shape cannot be quantized so, or None when it can."""
        if len(shape) != 2:
            return f"it has shape {list(shape)}, and only matrices are quantized"
        group = self.group_of(shape[1])
        if shape[1] % group:
            return f"its rows of {shape[1]} weights do not divide into groups of {group}"
        if self.bits == 4 and shape[1] % 2:
            return f"its rows of {shape[1]} weights do not fill whole bytes at 4 bits"
        return None

    def describe(self) -> str:
        """Return e.g. "int4 g32 asymmetric hqq"."""
        group = f"g{self.group_size}" if self.group_size else "per-row"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'} {self.method}"

    def to_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _SPEC_KEYS}


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Args:
        match: regular expression on the whole canonical tensor name.
        layers: union of layer numbers (5), ranges ("10-20", both ends included) and shares ("first-quarter",
            "last-10%"); empty means every tensor, in a layer or not. A share is rounded up to whole layers.
        attention: only layers of this kind; "k_eq_v" are the full layers without a v_proj.
        spec: how to quantize; None keeps the tensor as it is.
    """

    match: str
    layers: tuple[int | str, ...] = ()
    attention: Attention | None = None
    spec: QuantSpec | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise G4Error(f"match = {self.match!r} is not a regular expression: {error}.") from None
        for item in self.layers:
            _check_layers_item(item)
        good = self.attention is None or self.attention in _ATTENTION
        _require("attention", self.attention, good, '"sliding", "full" or "k_eq_v"')

    def matches(self, name: str, config: Gemma4Config) -> bool:
        """Tell whether this rule decides about the tensor `name` (if no earlier rule does)."""
        if not re.fullmatch(self.match, name):
            return False
        if not self.layers and self.attention is None:
            return True
        in_layer = _LAYER_NAME.fullmatch(name)
        if in_layer is None:
            return False
        index = int(in_layer[1])
        chosen = not self.layers or any(_selects(item, index, config.num_hidden_layers) for item in self.layers)
        return chosen and (self.attention is None or _is_kind(config.layer(index), self.attention))

    def describe(self) -> str:
        """Return what the rule does: "keep" or the spec."""
        return "keep" if self.spec is None else self.spec.describe()

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"match": self.match}
        if self.layers:
            document["layers"] = list(self.layers)
        if self.attention:
            document["attention"] = self.attention
        return document | ({"keep": True} if self.spec is None else self.spec.to_json())


@dataclass(frozen=True)
class Assignment:
    """What a recipe decided for one stored tensor: read `source`, store it as `name`."""

    name: str
    source: str
    shape: tuple[int, ...]
    rule: int
    spec: QuantSpec | None


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; rule numbers in messages count from 1."""

    name: str
    description: str
    tie: bool
    rules: tuple[Rule, ...]

    def assign(self, config: Gemma4Config, *, separate_head: bool) -> list[Assignment]:
        """Decide about every tensor of a model, in the model's order.

        Args:
            separate_head: the checkpoint has an `lm_head.weight` of its own; otherwise the embedding plays its role.

        Raises: G4Error naming the tensor that no rule matches, or that the deciding rule cannot quantize.
        """
        if self.tie and separate_head:
            raise G4Error(
                f"Recipe {self.name} says tie = true, but this model's {LM_HEAD} is not its embedding.",
                hint="Remove `tie` from the recipe and give lm_head a rule.",
            )
        shapes = config.parameter_shapes()
        shapes[LM_HEAD] = shapes[EMBEDDING]
        if self.tie:
            del shapes[LM_HEAD]
        assignments = {name: self._assign(name, shape, config) for name, shape in shapes.items()}
        if not separate_head and not self.tie:
            head = assignments.pop(LM_HEAD)
            if head.spec != assignments[EMBEDDING].spec:
                assignments[LM_HEAD] = replace(head, source=EMBEDDING)
        return list(assignments.values())

    def unused_rules(self, assignments: list[Assignment]) -> list[int]:
        """Return the numbers of the rules that decided about nothing."""
        return sorted(set(range(1, len(self.rules) + 1)) - {assignment.rule for assignment in assignments})

    def _assign(self, name: str, shape: tuple[int, ...], config: Gemma4Config) -> Assignment:
        for number, rule in enumerate(self.rules, start=1):
            if not rule.matches(name, config):
                continue
            problem = rule.spec.problem_with(shape) if rule.spec else None
            if problem:
                raise G4Error(
                    f"Recipe {self.name}, rule {number} ({rule.describe()}) cannot quantize {name}: {problem}.",
                    hint="Give this tensor a rule of its own before that one.",
                )
            return Assignment(name, name, shape, number, rule.spec)
        raise G4Error(
            f"Recipe {self.name} has no rule for {name}.",
            hint="Add a rule for it; `keep = true` leaves a tensor as it is.",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the whole recipe as it goes into manifests and --json."""
        return {
            "name": self.name,
            "description": self.description,
            "tie": self.tie,
            "rules": [rule.to_json() for rule in self.rules],
        }

    def to_toml(self, comments: list[str | None]) -> str:
        """Return the file that `parse_recipe` reads back as this recipe, with a comment above each rule, or None."""
        lines = [f"{key} = {_toml(value)}" for key, value in self.to_json().items() if key != "rules"]
        for rule, comment in zip(self.rules, comments, strict=True):
            lines += ["", *([f"# {comment}"] if comment else []), "[[rule]]"]
            lines += [f"{key} = {_toml(value)}" for key, value in rule.to_json().items()]
        return "\n".join(lines)


def load_recipe(name_or_path: str) -> Recipe:
    """Return a built-in recipe by name, or read a TOML file.

    Raises: G4Error naming the file, the rule number and the key of the first mistake.
    """
    if name_or_path in BUILT_IN:
        text = (resources.files("gemma4cli.quant") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse_recipe(text, f"built-in recipe {name_or_path}")
    path = Path(name_or_path).expanduser()
    if path.suffix != ".toml":
        raise G4Error(
            f"{name_or_path!r} is not a built-in recipe ({', '.join(BUILT_IN)}), nor the path of a .toml file.",
            hint="g4 quantize --recipe show prints the built-in ones, to start a file from.",
        )
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise G4Error(f"The recipe {path} does not exist.", hint="Check the path given to --recipe.") from None
    except UnicodeDecodeError:
        raise G4Error(f"{path} is not UTF-8 text.", hint="A recipe is a TOML file.") from None


def parse_recipe(text: str, where: str) -> Recipe:
    """Read a recipe from TOML; `where` begins every message."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise G4Error(f"{where} is not valid TOML: {error}.", hint="Write regular expressions in '…'.") from None
    _known_keys(document, ("name", "description", "tie", "rule"), where)
    for key in ("name", "description"):
        if not isinstance(document.get(key), str) or not document[key]:
            raise G4Error(f"{where}: {key} is missing or not text.")
    if not isinstance(document.get("tie", False), bool):
        raise G4Error(f"{where}: tie is {document['tie']!r}; it must be true or false.")
    rules = document.get("rule")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise G4Error(f"{where} has no rules.", hint="Write each one under its own [[rule]].")
    return Recipe(
        document["name"],
        document["description"],
        document.get("tie", False),
        tuple(_parse_rule(rule, f"{where}, rule {number}") for number, rule in enumerate(rules, start=1)),
    )


def _parse_rule(section: dict[str, Any], where: str) -> Rule:
    _known_keys(section, _RULE_KEYS, where)
    match = section.get("match")
    if not isinstance(match, str):
        raise G4Error(f"{where}: match is missing or not text.")
    layers = section.get("layers", [])
    given = [key for key in _SPEC_KEYS if key in section]
    if "keep" in section:
        if section["keep"] is not True:
            raise G4Error(f"{where}: keep is {section['keep']!r}; it can only be true.")
        if given:
            raise G4Error(f"{where}: keep = true and {given[0]} contradict each other.")
    elif missing := [key for key in _SPEC_KEYS if key not in section]:
        raise G4Error(f"{where}: {missing[0]} is missing.", hint="A rule says keep = true, or " + ", ".join(_SPEC_KEYS))
    try:
        spec = None if "keep" in section else QuantSpec(**{key: section[key] for key in _SPEC_KEYS})
        return Rule(match, tuple(layers) if isinstance(layers, list) else (layers,), section.get("attention"), spec)
    except G4Error as error:
        raise G4Error(f"{where}: {error.message}", hint=error.hint) from None


def _toml(value: object) -> str:
    """Write a value; regular expressions stay readable in '…', where TOML has no escapes."""
    if isinstance(value, str) and "\\" in value and "'" not in value:
        return f"'{value}'"
    # JSON's texts, numbers, booleans and lists are TOML's too.
    return json.dumps(value, ensure_ascii=False)


def _known_keys(section: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in section:
        if key not in known:
            raise G4Error(f"{where}: unknown key {key}.", hint=f"Known keys: {', '.join(known)}.")


def _require(key: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise G4Error(f"{key} is {value!r}; it must be {allowed}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_layers_item(item: object) -> None:
    if _is_int(item) and item >= 0:
        return
    if isinstance(item, str):
        if _END.fullmatch(item):
            return
        if (bounds := _RANGE.fullmatch(item)) and int(bounds[1]) <= int(bounds[2]):
            return
    raise G4Error(
        f"layers has {item!r}, which is no layer, range or share.",
        hint='Write 5, "10-20", "first-quarter", "last-half" or "first-10%".',
    )


def _selects(item: int | str, index: int, count: int) -> bool:
    if isinstance(item, int):
        return index == item
    if bounds := _RANGE.fullmatch(item):
        return int(bounds[1]) <= index <= int(bounds[2])
    end, share = _END.fullmatch(item).groups()
    fraction = Fraction(int(share[:-1]), 100) if share.endswith("%") else _SHARES[share]
    from_end = index if end == "first" else count - 1 - index
    return from_end < fraction * count


def _is_kind(layer: LayerConfig, attention: Attention) -> bool:
    if attention == "k_eq_v":
        return layer.k_eq_v
    return layer.kind == (SLIDING if attention == "sliding" else FULL)
