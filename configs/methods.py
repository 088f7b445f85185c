"""What a recipe's quantization does with a block, and what it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.special_keys import AwqSpecial, GptqSpecial, OmniQuantSpecial
from configs.vocabulary import METHODS_WITHOUT_CALIBRATION, Method, WeightGranularity

if TYPE_CHECKING:
    from configs.schema import Quant

__all__ = [
    "finds_scales_on_the_way",
    "has_clip",
    "has_learned_clip",
    "has_learned_transform",
    "has_learning",
    "has_transform",
    "needs_calibration",
]

_TRANSFORMING = frozenset({Method.IDENTITY, Method.AWQ, Method.SMOOTHQUANT, Method.OSPLUS})


def needs_calibration(quant: Quant) -> bool:
    """Whether a quantization reads calibration text: its method does, or static act scales."""
    static = quant.act is not None and quant.act.static
    return static or quant.method not in METHODS_WITHOUT_CALIBRATION


def has_transform(quant: Quant) -> bool:
    """Whether the method decides on channel scales; Identity on none."""
    trans = not isinstance(quant.special, AwqSpecial) or quant.special.trans
    return quant.method in _TRANSFORMING and trans


def has_clip(quant: Quant) -> bool:
    """Whether the method clips weights."""
    return isinstance(quant.special, AwqSpecial | GptqSpecial) and quant.special.weight_clip


def has_learning(quant: Quant) -> bool:
    """Whether the method learns."""
    return isinstance(quant.special, OmniQuantSpecial)


def has_learned_transform(quant: Quant) -> bool:
    """Whether channel scales are learned."""
    return isinstance(quant.special, OmniQuantSpecial) and quant.special.let


def has_learned_clip(quant: Quant) -> bool:
    """Whether clip factors are learned."""
    return isinstance(quant.special, OmniQuantSpecial) and quant.special.lwc


def finds_scales_on_the_way(quant: Quant) -> bool:
    """Whether a group's scale is found when its first column is rounded: no range is known before.

    As GPTQ does, unless its groups are static.
    """
    grouped = quant.weight.granularity is WeightGranularity.PER_GROUP
    return isinstance(quant.special, GptqSpecial) and not quant.special.static_groups and grouped
