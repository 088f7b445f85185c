"""What every section of a recipe is made of: its base, its markers and its kinds of fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.vocabulary import FloatFormat

__all__ = [
    "Bits",
    "Count",
    "Fraction",
    "Layers",
    "NoEffect",
    "NotHashed",
    "Section",
    "Seed",
    "choice",
    "effective",
    "nearest",
    "parse_choice",
    "suggestion",
]

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class NoEffect:
    """Marks a key that is accepted, changes nothing here, and is named once in the log."""

    reason: str


@dataclass(frozen=True)
class NotHashed:
    """Marks a key that may be used, but never changes what is computed."""

    reason: str


class Section(BaseModel):
    """A frozen mapping of a recipe; unknown keys are errors, an empty section has no keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, data: Any) -> Any:
        return {} if data is None else data


def effective(section: Section) -> dict[str, Any]:
    """Return a section as JSON types, defaults filled in, without what changes no result."""
    return {
        name: _plain(getattr(section, name))
        for name, field in type(section).model_fields.items()
        if not any(isinstance(mark, NoEffect | NotHashed) for mark in field.metadata)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return effective(value)
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def nearest(word: str, known: Iterable[str]) -> tuple[str, float]:
    """Return the known word most like the given one, and how alike they are (0 to 1)."""

    def alike(candidate: str) -> float:
        return difflib.SequenceMatcher(None, _letters(word), _letters(candidate)).ratio()

    best = max(known, key=alike)
    return best, alike(best)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` where a known word is close, else an empty text."""
    best, likeness = nearest(word, known)
    return f"; did you mean '{best}'?" if likeness >= 0.6 else ""


def _letters(text: str) -> str:
    """Spelling without case, dashes and underscores; OS+ is OsPlus."""
    return re.sub(r"[-_\s]", "", text.casefold().replace("+", "plus"))


def parse_choice(kind: type[Choice], value: object, noun: str = "") -> Choice:
    """Return the member that a value names, whatever its case, dashes and underscores.

    Raises:
        ValueError: it names none; the text lists them all and the nearest.
    """
    # torch.bfloat16 is what LLMC's files write for a dtype.
    wanted = _letters(str(value).removeprefix("torch."))
    for member in kind:
        if _letters(member.value) == wanted:
            return member
    known = [member.value for member in kind]
    listed = f"a known {noun} ({', '.join(known)})" if noun else f"one of {', '.join(known)}"
    raise ValueError(f"{value!r} is not {listed}{suggestion(str(value), known)}")


def choice(kind: type[Choice], noun: str = "") -> BeforeValidator:
    """Return a validator for one closed choice; None is left to the field's own type."""
    return BeforeValidator(lambda value: None if value is None else parse_choice(kind, value, noun))


def _bits(value: object) -> object:
    if isinstance(value, FloatFormat):
        return value
    text = str(value).strip().casefold()
    if text in set(FloatFormat):
        return FloatFormat(text)
    if not isinstance(value, bool) and text in {str(bits) for bits in range(2, 9)}:
        return int(text)
    raise ValueError(f"{value!r} is not a number of bits (2..8), e4m3 or e5m2")


def _not_a_switch(noun: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        # YAML's yes and true are 1 for Python.
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is not a {noun}")
        return value

    return check


def _layers(value: object) -> object:
    """Turn LLMC's mapping (blocks times names, and full names) into full names."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        return value
    keys = ("block_ids", "layer_names", "speical_names")
    for key, items in value.items():
        if key not in keys:
            raise ValueError(f"unknown key {key!r}; valid: {', '.join(keys)}")
        if not isinstance(items, list):
            raise ValueError(f"{key} is not a list")
    blocks = [index for item in value.get("block_ids", []) for index in _block_range(item)]
    names = value.get("layer_names", [])
    inside = [f"model.layers.{index}.{name}" for index in blocks for name in names]
    return [*inside, *value.get("speical_names", [])]


def _block_range(item: object) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
    if match is None:
        raise ValueError(f"{item!r} in block_ids is neither a block's number nor a range like 4-7")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"{item!r} in block_ids runs backwards; write {last}-{first}")
    return range(first, last + 1)


Bits = Annotated[int | FloatFormat, BeforeValidator(_bits)]
Count = Annotated[int, BeforeValidator(_not_a_switch("whole number"))]
# NumPy takes no larger seed.
Seed = Annotated[Count, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, BeforeValidator(_not_a_switch("number")), Field(allow_inf_nan=False)]
Layers = Annotated[tuple[str, ...], BeforeValidator(_layers)]
