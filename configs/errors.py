"""One line for whatever is wrong with a recipe: its file, the place, what, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.fields import nearest, parse_choice
from configs.schema import Quant, Recipe
from configs.special_keys import SPECIAL_KEYS, NoSpecial
from configs.vocabulary import Method

__all__ = ["RecipeError", "describe"]

Location = tuple[int | str, ...]

_KINDS = {
    "bool": "is neither true nor false",
    "int": "is not a whole number",
    "float": "is not a number",
    "finite": "is not a finite number",
    "string": "is not text; put it in quotes",
    "tuple": "is not a list; write it as [a, b]",
    "model": "is not a section; write its keys below it, indented",
    "dict": "is not a section; write its keys below it, indented",
}
# YAML reads a key like 1 or yes as a number or a switch: invalid_key.
_UNKNOWN = ("extra_forbidden", "invalid_key")
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class RecipeError(ValueError):
    """A recipe that cannot be used; the text is one line, for the user."""


def describe(error: ValidationError, data: Any, root: type[BaseModel] = Recipe) -> tuple[str, str]:
    """Return the place (dotted path) and the text of the error to report.

    An unknown key goes first: what else is missing is most often what it was meant to be.

    Args:
        error: what pydantic found.
        data: what was read.
        root: the section that ``data`` was to be.
    """
    # A default that could not be computed only repeats an error that is listed too.
    found = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    found.sort(key=lambda e: e["type"] not in _UNKNOWN)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first = found[0]
    return ".".join(str(part) for part in first["loc"]), _text(first, data, root) + more


def _text(error: ErrorDetails, data: Any, root: type[BaseModel]) -> str:
    kind, location, context = error["type"], error["loc"], error.get("ctx", {})
    if kind in _UNKNOWN:
        return _unknown_key(location, data, root)
    if kind == "missing":
        return f"missing{_give(location, data, root)}"
    if error["input"] is None:
        return f"has no value{_give(location, data, root) or '; give one, or remove the key'}"
    if kind == "value_error":
        return str(context["error"])
    for limit, words in _LIMITS.items():
        if limit in context:
            return f"{error['input']!r} is out of range; give {words} {context[limit]}"
    for start, words in _KINDS.items():
        if kind.startswith(start):
            return f"{_shown(error['input'])} {words}"
    # Kinds that no field of today can have: pydantic's own words serve.
    return error["msg"][:1].lower() + error["msg"][1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _unknown_key(location: Location, data: Any, root: type[BaseModel]) -> str:
    key, section = str(location[-1]), _section(location[:-1], data, root)
    known = list(section.model_fields) if section is not None else []
    if section is NoSpecial:
        return "unknown key; the method takes no special keys: remove it"
    if not known:
        return "unknown key; remove it"
    best, likeness = nearest(key, known)
    if likeness >= 0.6:
        return f"unknown key; did you mean '{best}'?"
    return f"unknown key; the nearest valid key is '{best}' of {', '.join(known)}"


def _give(location: Location, data: Any, root: type[BaseModel]) -> str:
    section = _section(location[:-1], data, root)
    field = section.model_fields.get(str(location[-1])) if section is not None else None
    return f"; give {field.description}" if field is not None and field.description else ""


def _section(
    location: Sequence[int | str], data: Any, root: type[BaseModel]
) -> type[BaseModel] | None:
    """Follow a location through the schema to the section that lies there."""
    section: type[BaseModel] | None = root
    node = data
    for part in location:
        if isinstance(part, str):
            if section is None or part not in section.model_fields:
                return None
            if section is Quant and part == "special":
                section = _special_section(node)
            else:
                section = _section_of(section.model_fields[part])
        node = _inside(node, part)
    return section


def _inside(node: Any, part: int | str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def _special_section(quant: Any) -> type[BaseModel] | None:
    try:
        return SPECIAL_KEYS[parse_choice(Method, _inside(quant, "method"))]
    except ValueError:
        return None


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the one section in a field's type, be it optional or a tuple's item."""
    waiting = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        waiting.extend(get_args(kind))
    return None
