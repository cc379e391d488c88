"""A recipe's YAML before the command line's parser sees it: what that would misread or pass over is refused by name.

The parser lets the last of two equal keys win, and knows neither the file nor the remedy in its messages.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from data_prep.shard_format.files import read_file
from train.config import Config
from train.errors import UserError, one_line
from train.run_folder import YAML_ERRORS, flatten

KEYS: dict[str, list[str]] = {
    section: [field.name for field in dataclasses.fields(kind)]
    for section, kind in get_type_hints(Config).items()
}
"""Section -> its keys."""
BESIDE_SECTIONS = ("config", "profile")
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def found_recipe(word: str) -> str:
    """The path of the recipe that --config names: a file, or one of launch/recipes/ by its name, from any folder."""
    path = RECIPES / f"{word}.yaml"
    return str(path) if "/" not in word and not Path(word).exists() and path.is_file() else word


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The values of a recipe by "section.key".

    Raises:
        UserError: no UTF-8, no YAML, a key twice, a section that is no mapping, an unknown key, a number that is none;
            the message names the file, the key and the remedy.
    """
    try:
        tree = yaml.load(read_file(path).decode(), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, one_line(ValueError(error.problem or error.context))
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path}: {where}{what}; mend this line") from None
    except YAML_ERRORS as error:
        raise UserError(f"{path}: cannot be read as YAML ({one_line(error)}); mend it") from None
    try:
        return _checked(path, tree)
    except RecursionError:
        raise UserError(f"{path}: a value holds itself (&name, *name); write it out") from None


def _checked(path: Path, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no sections; give at least one ({', '.join(KEYS)}), or {{}}")
    for section, values in tree.items():
        _check_section(path, section, values)
    in_sections = {f"{name}.{key}" for name, keys in tree.items() if isinstance(keys, dict) for key in keys}
    for key in in_sections.intersection(tree):
        raise UserError(f"{path}: {key}: stands there twice, alone and in its section; remove one")
    values = flatten(tree)
    for key, value in values.items():
        for number in _numbers(value):
            if not math.isfinite(number):
                raise UserError(f"{path}: {key}={value!r}: give a finite number")
    return values


def _check_section(path: Path, section: Any, values: Any) -> None:
    name, dot, _ = str(section).partition(".")
    if dot or section in BESIDE_SECTIONS:
        if dot and (name not in KEYS or str(section) not in known_keys()):
            raise UserError(f"{path}: {section}: no such key; {nearest(str(section))}")
        return
    if section not in KEYS:
        raise UserError(f"{path}: {section}: no such section; {nearest(name)}")
    if not isinstance(values, dict):
        holds = "nothing" if values is None else repr(values)
        example = f"{section}: {{{KEYS[section][0]}: ...}}"
        raise UserError(f"{path}: {section}: holds {holds} in place of keys; write {example}, or remove it")
    for key in values:
        if key not in KEYS[section]:
            raise UserError(f"{path}: {section}.{key}: no such key; {nearest(f'{section}.{key}')}")


def known_keys() -> list[str]:
    """Every "section.key"."""
    return [f"{section}.{key}" for section, keys in KEYS.items() for key in keys]


def nearest(mistyped: str) -> str:
    """What a mistyped section or key may have meant, as the end of a message."""
    section, _, key = mistyped.rpartition(".")
    if not section and key not in KEYS:
        in_sections = [each for each in known_keys() if each.endswith(f".{key}")]
        found = in_sections or difflib.get_close_matches(key, [*KEYS, *known_keys()], 1)
        return f"did you mean {found[0]}?" if found else f"give one of {', '.join(KEYS)}"
    if section not in KEYS:
        sections = difflib.get_close_matches(section, list(KEYS), 1)
        section = sections[0] if sections else section
    elsewhere = [each for each in known_keys() if each.endswith(f".{key}")]
    close = [f"{section}.{each}" for each in difflib.get_close_matches(key, KEYS.get(section, []), 1)]
    found = close or elsewhere or difflib.get_close_matches(mistyped, known_keys(), 1, 0.8)
    if found:
        return f"did you mean {found[0]}?"
    return f"give one of {', '.join(KEYS.get(section, KEYS))}"


def explained(message: str) -> str:
    """A message of the parser with its remedy: what a mistyped flag may have meant, what a value must be."""
    if message.startswith("unrecognized arguments:"):
        key = message.split()[2].removeprefix("--").partition("=")[0].rstrip("+")
        return f"{message}: no such key; {nearest(key)}"
    ill_typed = re.match(r'Parser key "(\w+)\.(\w+)":.*(?:Given value|Got value): ?(.*)$', message)
    if ill_typed is None or ill_typed[2] not in KEYS.get(ill_typed[1], ()):
        return message
    section, key, value = ill_typed[1], ill_typed[2], ill_typed[3] or "an empty text"
    hint = get_type_hints(get_type_hints(Config)[section])[key]
    return f"{section}.{key}: give {_spelled(hint)}, not {value}"


def _spelled(hint: Any) -> str:
    """A type as a recipe's values are written: "int | auto | null"."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_spelled, get_args(hint)))
    if hint is NoneType:
        return "null"
    # On Python 3.10 list[float] is a type too, named list.
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers(each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _numbers(each)
