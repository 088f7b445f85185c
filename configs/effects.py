"""Which keys of a recipe change nothing here."""

from __future__ import annotations

from collections.abc import Iterator

from configs.fields import NoEffect, Section
from configs.methods import needs_calibration
from configs.schema import Quant, Recipe
from configs.special_keys import OmniQuantSpecial
from configs.vocabulary import WeightAlgorithm

__all__ = ["ineffective_keys", "ineffective_reasons"]


def ineffective_keys(recipe: Recipe) -> list[str]:
    """Return the dotted paths of the given keys that are accepted and have no effect."""
    return list(ineffective_reasons(recipe))


def ineffective_reasons(recipe: Recipe) -> dict[str, str]:
    """Return those paths, each with the reason in a few words."""
    return {**dict(_marked(recipe, "")), **dict(_unused(recipe))}


def _marked(section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    """Walk the given keys in the schema's order; those left at their default are not named."""
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        path, value = f"{prefix}{name}", getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, NoEffect):
                yield path, mark.reason
        if isinstance(value, Section):
            yield from _marked(value, f"{path}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from _marked(item, f"{path}.{index}.")


def _unused(recipe: Recipe) -> Iterator[tuple[str, str]]:
    reason = "no calibration text passes through the blocks"
    quants = [("quant", recipe.quant)] if recipe.quant is not None else []
    quants += [(f"steps.{i}.quant", step.quant) for i, step in enumerate(recipe.steps or ())]
    for path, quant in quants:
        if quant.weight.calib_algo is WeightAlgorithm.LEARNABLE:
            yield f"{path}.weight.calib_algo", "the method decides what is learned"
        if quant.weight.is_float and _searches_clip_init(quant):
            yield f"{path}.special.search_clip_init", "clips of floats are learned from 1"
        if "quant_out" in quant.model_fields_set and not needs_calibration(quant):
            yield f"{path}.quant_out", reason
        if quant.act is not None and not quant.act.static:
            for key in ("calib_algo", "percentile"):
                if key in quant.act.model_fields_set:
                    yield f"{path}.act.{key}", "a dynamic scale covers the values at hand"
    for i, step in enumerate(recipe.steps or ()):
        if step.calib is not None and not needs_calibration(step.quant):
            yield f"steps.{i}.calib", f"method {step.quant.method} reads no calibration text"
    # The top-level section is read by the steps that need text and have none of their own.
    readers = [step for step in recipe.steps or () if step.calib is None]
    read = [recipe.quant] if recipe.quant is not None else [step.quant for step in readers]
    if recipe.calib is not None and not any(needs_calibration(quant) for quant in read):
        yield "calib", "no step reads it"


def _searches_clip_init(quant: Quant) -> bool:
    return isinstance(quant.special, OmniQuantSpecial) and quant.special.search_clip_init
