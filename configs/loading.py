"""Reads recipes: files, shipped names, overrides; whatever is wrong is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.effects import ineffective_keys
from configs.errors import RecipeError, describe
from configs.schema import Recipe
from configs.schemes import scheme_name
from configs.vocabulary import DataName

__all__ = [
    "RecipeError",
    "ShippedRecipe",
    "ineffective_keys",
    "load_recipe",
    "parse_recipe",
    "read_yaml",
    "shipped_names",
    "shipped_recipes",
]

_SHIPPED = Path(__file__).resolve().parent
# a folder of sweeps, which are no recipes
SWEEPS = "sweeps"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package.

    Attributes:
        name: what load_recipe takes, like ``fp8/rtn_fp8``.
        path: its file.
        scheme: like ``W4A16`` or ``FP8 dynamic``.
        method: the method, or the methods in order (``Awq then OmniQuant``).
        needs: the texts it reads, like ``calibration text (pileval)``, or ``nothing``.
    """

    name: str
    path: Path
    scheme: str
    method: str
    needs: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or a shipped one by its name.

    Args:
        path: a file, or a shipped name, with or without ``configs/`` before it and ``.yml``
            after it; a file wins.
        overrides: ``key.path=value`` each, value in YAML, items of a list by their number
            (``steps.0.quant.weight.bit=8``); applied in order.

    Raises:
        RecipeError: whatever is wrong, in one line.
    """
    source = str(path)
    data = read_yaml(_find(source), source)
    changes = [_parse_override(text) for text in overrides]
    for text, keys, value in changes:
        data = _with_value(data, keys, value, text)
    return _validate(data, source, {".".join(keys): text for text, keys, _ in changes})


def parse_recipe(data: Mapping[str, Any], source: str) -> Recipe:
    """Check a recipe that is already a mapping; source names it in errors.

    Raises:
        RecipeError: whatever is wrong, in one line.
    """
    return _validate(data, source, {})


def shipped_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    files = (file.relative_to(_SHIPPED) for file in _SHIPPED.rglob("*.yml"))
    return sorted(f.with_suffix("").as_posix() for f in files if f.parts[0] != SWEEPS)


def shipped_recipes() -> list[ShippedRecipe]:
    """Return what each shipped recipe is and needs, sorted by name."""
    return [_described(name) for name in shipped_names()]


def _described(name: str) -> ShippedRecipe:
    recipe = load_recipe(name)
    steps = recipe.resolved_steps()
    return ShippedRecipe(
        name=name,
        path=_SHIPPED / f"{name}.yml",
        scheme=scheme_name(steps[-1].quant),
        method=" then ".join(step.quant.method for step in steps),
        needs=_needs(recipe),
    )


def _needs(recipe: Recipe) -> str:
    read = [("calibration", s.calib.name) for s in recipe.resolved_steps() if s.calib is not None]
    read.append(("evaluation", recipe.resolved_eval().name))
    texts = [f"{use} text ({name})" for use, name in read if name is not DataName.SELF_GENERATED]
    return ", ".join(dict.fromkeys(texts)) or "nothing"


def _find(source: str) -> Path:
    given = Path(source)
    try:
        if given.is_file():
            return given
        if given.is_dir() and source not in shipped_names():
            raise RecipeError(f"{source}: is a folder, not a recipe; {_offer(source)}")
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    name = _shipped_name(source)
    if name in shipped_names():
        return _SHIPPED / f"{name}.yml"
    raise RecipeError(f"{source}: no such file or shipped recipe; {_offer(source)}")


def _shipped_name(source: str) -> str:
    return source.removeprefix("./").removeprefix("configs/").removesuffix(".yml")


def _offer(source: str) -> str:
    names = shipped_names()
    close = get_close_matches(_shipped_name(source), names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"shipped recipes: {', '.join(names)}"


def read_yaml(file: Path, source: str) -> Any:
    """Read a YAML file in which no key stands twice; ``source`` names it in errors.

    Raises:
        RecipeError: it cannot be read, or is no YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: is not UTF-8 text, so not a recipe") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    return _yaml(text, source)


def _validate(data: Any, source: str, overridden: Mapping[str, str]) -> Recipe:
    if data is None:
        raise RecipeError(f"{source}: is empty; a recipe needs at least a section quant")
    if not isinstance(data, Mapping):
        kind = "a list" if isinstance(data, list) else f"the value {data!r}"
        raise RecipeError(f"{source}: holds {kind} instead of sections like quant:")
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        place, text = describe(error, data)
        for path, override in overridden.items():
            made_it = text.startswith("unknown key") and f"{path}.".startswith(f"{place}.")
            if made_it or f"{place}.".startswith(f"{path}."):
                source = f"override {override!r}"
        line = ": ".join(part for part in (source, place, text) if part)
        # A key or a value may hold a line break.
        raise RecipeError(" ".join(line.splitlines())) from None


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys as written, before what lies under << is merged in."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"key {key.value!r} is given twice; keep one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{source}: {place}{error.problem or 'is not YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{source}: is not YAML: {reason}") from None


def _parse_override(text: str) -> tuple[str, tuple[str, ...], Any]:
    path, equals, value = text.partition("=")
    keys = tuple(key.strip() for key in path.split("."))
    if not equals or not all(keys):
        raise RecipeError(f"override {text!r}: write it as key.path=value")
    return text, keys, _yaml(value, f"override {text!r}")


def _with_value(node: Any, keys: Sequence[str], value: Any, text: str) -> Any:
    """Return a copy of the node with one value set; sections on the way are made."""
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise RecipeError(
                f"override {text!r}: '{key}' is no item of a list of {len(node)}; "
                f"write 0 to {len(node) - 1}"
            )
        index = int(key)
        item = _with_value(node[index], rest, value, text) if rest else value
        return [*node[:index], item, *node[index + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise RecipeError(f"override {text!r}: '{key}' lies below {node!r}, which has no keys")
    if node is None and key.isdigit():
        raise RecipeError(f"override {text!r}: '{key}' is of a list that the recipe does not have")
    section = dict(node or {})
    section[key] = _with_value(section.get(key), rest, value, text) if rest else value
    return section
