"""The sweep: recipes x models x sets of overrides, as one frozen model, checked as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from configs.errors import RecipeError, describe
from configs.fields import Section
from configs.loading import SWEEPS, read_yaml, shipped_names

__all__ = ["OverrideSet", "Sweep", "SweepModel", "load_sweep", "shipped_sweeps"]

_SHIPPED = Path(__file__).resolve().parent / SWEEPS


def _slug(text: str) -> str:
    """What is left of a text in a name: letters, digits, points, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def _under(key: str) -> BeforeValidator:
    """A plain value reads as a section with only this key."""
    return BeforeValidator(lambda value: value if isinstance(value, Mapping) else {key: value})


class _Named(Section):
    """What may have a name, which is a part of a folder's name."""

    name: str | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str | None) -> str | None:
        if name is not None and (not name or _slug(name) != name):
            raise ValueError(
                f"{name!r} is no name of a folder; write letters, digits, dashes and points"
            )
        return name


class SweepModel(_Named):
    """A source checkpoint: a folder or a hub id."""

    path: str = Field(min_length=1, description="a folder or a hub id")

    @property
    def label(self) -> str:
        """Its name, by default the last part of its path."""
        return self.name or _slug(Path(self.path).expanduser().absolute().name) or "model"


class SweepRecipe(_Named):
    """A recipe: a file, or the name of a shipped one."""

    path: str = Field(min_length=1, description="a recipe's file, or the name of a shipped one")

    @property
    def label(self) -> str:
        """Its name, by default that of the shipped one or of the file."""
        shipped = self.path in shipped_names() and not Path(self.path).is_file()
        return self.name or _slug(self.path if shipped else Path(self.path).stem) or "recipe"


class OverrideSet(_Named):
    """``key.path=value`` each, over the recipe."""

    set: tuple[str, ...] = ()

    @field_validator("set", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """Its name, by default its keys' last parts with their values; none for no overrides."""
        parts = (text.partition("=") for text in self.set)
        return self.name or "-".join(_slug(f"{p.rpartition('.')[2]}-{v}") for p, _, v in parts)


class Sweep(_Named):
    """Every recipe on every model with every set of overrides."""

    output: str | None = None
    models: tuple[Annotated[SweepModel, _under("path")], ...] = Field(
        description="a list of folders or hub ids"
    )
    recipes: tuple[Annotated[SweepRecipe, _under("path")], ...] = Field(
        description="a list of recipes"
    )
    overrides: tuple[Annotated[OverrideSet, _under("set")], ...] = (OverrideSet(),)
    # for every child, before its own overrides
    set: tuple[str, ...] = ()

    @field_validator("set", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("models", "recipes", "overrides")
    @classmethod
    def _some(cls, values: tuple[Section, ...]) -> tuple[Section, ...]:
        if not values:
            raise ValueError("is an empty list; write at least one")
        return values


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a file, or a shipped one by its name; its own name is that of the file.

    Models of a shipped one that lie beside the code are found there, wherever it is run from.

    Args:
        path: a file, or a shipped name such as ``demo``; a file wins.

    Raises:
        RecipeError: whatever is wrong, in one line.
    """
    source = str(path)
    file = _find(source)
    data = read_yaml(file, source)
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source}: holds no sweep; it needs lists models: and recipes:")
    try:
        parsed = Sweep.model_validate(dict(data))
    except ValidationError as error:
        place, text = describe(error, data, Sweep)
        line = ": ".join(part for part in (source, place, text) if part)
        raise RecipeError(" ".join(line.splitlines())) from None
    name = parsed.name or _slug(Path(source).stem) or "sweep"
    models = parsed.models
    if file.resolve().parent == _SHIPPED:
        models = tuple(_beside_the_code(model) for model in models)
    return parsed.model_copy(update={"name": name, "models": models})


def shipped_sweeps() -> list[str]:
    """Return the names of the sweeps that come with the package, sorted."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yml"))


def _beside_the_code(model: SweepModel) -> SweepModel:
    there = _SHIPPED.parent.parent / model.path
    return model.model_copy(update={"path": str(there)}) if there.is_dir() else model


def _find(source: str) -> Path:
    given = Path(source)
    try:
        if given.is_file():
            return given
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    name = source.removeprefix("./").removeprefix("configs/").removeprefix(f"{SWEEPS}/")
    if (name := name.removesuffix(".yml")) in shipped_sweeps():
        return _SHIPPED / f"{name}.yml"
    raise RecipeError(
        f"{source}: no such file or shipped sweep; shipped sweeps: {', '.join(shipped_sweeps())}"
    )


def as_given(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON types, to be kept."""
    return sweep.model_dump(mode="json", exclude_defaults=True)
