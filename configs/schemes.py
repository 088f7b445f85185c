"""What a recipe's numbers are called, and what SGLang would not serve of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.fields import effective
from configs.schema import Act, Quant, Recipe, Weight
from configs.special_keys import GptqSpecial
from configs.vocabulary import (
    ActAlgorithm,
    ActGranularity,
    FloatFormat,
    WeightGranularity,
)

__all__ = ["MARLIN_GROUP_SIZES", "export_problems", "not_implemented", "scheme_name", "unserved"]

MARLIN_GROUP_SIZES = (32, 64, 128)
_FP8_BLOCK = 128
_STATIC_RANGES = (
    None,
    ActAlgorithm.MINMAX,
    ActAlgorithm.STATIC_MINMAX,
    ActAlgorithm.STATIC_PERCENTILE,
)
_NEED_PACK = "need_pack: packing is for integer weights without act: remove it"


def scheme_name(quant: Quant) -> str:
    """Return the scheme's usual name.

    W4A16, W4A16 asym, W8A16, W8A8, FP8 dynamic, FP8 static, FP8 block; what SGLang does not
    serve has a name of the same kind (W3A16, FP8 weights, FP8 dynamic e5m2).
    """
    weight, act = quant.weight, quant.act
    if not weight.is_float or (act is not None and not act.is_float):
        asymmetric = "" if weight.symmetric else " asym"
        return f"W{_width(weight)}A{16 if act is None else _width(act)}{asymmetric}"
    kind = "weights" if act is None else "static" if act.static else "dynamic"
    if weight.granularity is WeightGranularity.PER_BLOCK and kind == "dynamic":
        kind = "block"
    e5m2 = FloatFormat.E5M2 in (weight.bit, act.bit if act is not None else None)
    return f"FP8 {kind}{' e5m2' if e5m2 else ''}"


def _width(numbers: Weight | Act) -> str:
    return "FP8" if numbers.is_float else str(numbers.bit)


def _format(numbers: Weight | Act) -> str:
    return str(numbers.bit) if numbers.is_float else f"int{numbers.bit}"


def not_implemented(recipe: Recipe) -> list[str]:
    """Return one line for each thing the schema knows and no code computes yet."""
    lines = []
    for place, quant in _quants(recipe):
        act = quant.act
        if act is not None and act.static and act.calib_algo not in _STATIC_RANGES:
            known = ", ".join(str(algorithm) for algorithm in _STATIC_RANGES if algorithm)
            lines.append(
                f"{place}.act.calib_algo: {act.calib_algo} is not implemented; write one of {known}"
            )
    return lines


def export_problems(recipe: Recipe) -> list[str]:
    """Return why SGLang would not serve an export of this recipe, one line per reason.

    These are the rules that the recipe alone decides (SGLang 0.5.15, compressed-tensors 0.20);
    shapes are another matter. An empty list means that the format is served.
    """
    quants = _quants(recipe)
    place, last = quants[-1]
    return [*_disagreements(quants), *(f"{place}.{problem}" for problem in _problems(last))]


def unserved(recipe: Recipe) -> str | None:
    """Say why an export that is good for something else is not for SGLang, or None if it is."""
    place, quant = _quants(recipe)[-1]
    if quant.act is None and not quant.weight.is_float and not quant.weight.need_pack:
        return (
            f"{place}.weight.need_pack: false: unpacked codes are read by transformers only, not "
            "by SGLang; write need_pack: true to serve the export"
        )
    return None


def _quants(recipe: Recipe) -> list[tuple[str, Quant]]:
    if recipe.quant is not None:
        return [("quant", recipe.quant)]
    return [(f"steps.{i}.quant", step.quant) for i, step in enumerate(recipe.steps or ())]


def _disagreements(quants: list[tuple[str, Quant]]) -> Iterator[str]:
    """Every step searches for the same codes: those that the last one writes."""
    last_place, last = quants[-1]
    for place, quant in quants[:-1]:
        for name in ("weight", "act"):
            if _numbers(getattr(quant, name)) != _numbers(getattr(last, name)):
                yield (
                    f"{place}.{name}: differs from {last_place}.{name}; all steps of a recipe "
                    f"share one {name} section: write the same"
                )


def _numbers(section: Weight | Act | None) -> dict[str, Any] | None:
    # Only the last step packs, and only one that rounds looks for ranges.
    same = {"need_pack": None, "calib_algo": None}
    return None if section is None else effective(section) | same


def _problems(quant: Quant) -> Iterator[str]:
    weight, act = quant.weight, quant.act
    e5m2 = [n for n, s in (("weight", weight), ("act", act)) if s and s.bit is FloatFormat.E5M2]
    if e5m2:
        for name in e5m2:
            yield f"{name}.bit: SGLang loads no e5m2: write e4m3"
    elif act is not None and weight.is_float != act.is_float:
        yield (
            f"act.bit: {_format(act)} activations do not go with {_format(weight)} weights: "
            + ("write bit: e4m3" if weight.is_float else "remove act, or write bit: 8 in both")
        )
    elif weight.is_float:
        yield from _float_problems(weight, act)
    elif act is None:
        yield from _weight_only_problems(weight)
    else:
        yield from _int8_problems(weight, act)
    yield from _order_problems(quant)


def _weight_only_problems(weight: Weight) -> Iterator[str]:
    """Integer weights, 16 bit activations: ``pack-quantized``, read by Marlin."""
    if weight.bit not in (4, 8):
        yield f"weight.bit: SGLang serves 4 and 8 bit weights, not {weight.bit}: write bit: 4"
    if weight.granularity in (WeightGranularity.PER_TENSOR, WeightGranularity.PER_BLOCK):
        yield (
            f"weight.granularity: {weight.granularity} is not served without act: write "
            "per_group with group_size: 128, or per_channel"
        )
    if weight.group_size is not None and weight.group_size not in MARLIN_GROUP_SIZES:
        yield (
            f"weight.group_size: Marlin takes 32, 64, 128 or -1 (a whole row), "
            f"not {weight.group_size}: write group_size: 128"
        )
    if weight.bit == 8 and not weight.symmetric:
        # Loads, then fails in the kernel: Marlin has zero points for 4 bits only.
        yield "weight.symmetric: asymmetric 8 bit weights are not served: write symmetric: true"


def _int8_problems(weight: Weight, act: Act) -> Iterator[str]:
    """Integer weights and activations: ``int-quantized``, always dynamic per token."""
    if weight.bit != 8:
        yield (
            f"weight.bit: {weight.bit} bit weights are served with 16 bit activations only: "
            "remove act, or write bit: 8"
        )
    if weight.granularity is not WeightGranularity.PER_CHANNEL:
        yield (
            f"weight.granularity: int8 weights are served per_channel, not {weight.granularity}: "
            "write per_channel"
        )
    if not weight.symmetric:
        yield "weight.symmetric: int8 weights are served symmetric only: write symmetric: true"
    if weight.need_pack:
        yield f"weight.{_NEED_PACK}"
    if act.bit != 8:
        yield f"act.bit: SGLang quantizes activations to 8 bits, not {act.bit}: write bit: 8"
    if not act.symmetric:
        yield "act.symmetric: SGLang ignores asymmetric activations: write symmetric: true"
    if act.static:
        yield "act.static: SGLang ignores static int8 scales: write per_token and static: false"
    elif act.granularity is not ActGranularity.PER_TOKEN:
        yield (
            f"act.granularity: SGLang quantizes int8 activations per token, "
            f"not {act.granularity}: write per_token"
        )


def _float_problems(weight: Weight, act: Act | None) -> Iterator[str]:
    """e4m3 weights and activations: ``float-quantized``, in the three ways that are served.

    With per_block weights, SGLang quantizes each token in groups of 128 whatever the export's
    ``input_activations`` say, and the preset FP8_BLOCK of compressed-tensors says so too
    (strategy group, group_size 128, dynamic). A recipe that says per_token would be evaluated
    with other activations than it is served with.
    """
    if weight.need_pack:
        yield f"weight.{_NEED_PACK}"
    wanted = {
        WeightGranularity.PER_CHANNEL: (ActGranularity.PER_TOKEN, False, None),
        WeightGranularity.PER_TENSOR: (ActGranularity.PER_TENSOR, True, None),
        WeightGranularity.PER_BLOCK: (ActGranularity.PER_GROUP, False, _FP8_BLOCK),
    }.get(weight.granularity)
    if wanted is None:
        yield (
            f"weight.granularity: e4m3 weights are not served {weight.granularity}: "
            "write per_channel, per_block or per_tensor"
        )
        return
    if weight.block_size not in (None, _FP8_BLOCK):
        yield f"weight.block_size: FP8 blocks are 128 wide, not {weight.block_size}: write 128"
    granularity, static, group_size = wanted
    mend = f"bit: e4m3, granularity: {granularity}"
    mend += f", group_size: {group_size}" if group_size else ""
    mend += ", static: true" if static else ""
    if act is None:
        yield f"act: missing; e4m3 weights are served with e4m3 activations: write act: {{{mend}}}"
    elif (act.granularity, act.static, act.group_size) != wanted:
        yield f"act: does not go with {weight.granularity} e4m3 weights: write act: {{{mend}}}"


def _order_problems(quant: Quant) -> Iterator[str]:
    special, weight = quant.special, quant.weight
    if (
        isinstance(special, GptqSpecial)
        and special.actorder
        and not special.static_groups
        and weight.granularity is WeightGranularity.PER_GROUP
    ):
        yield (
            "special.static_groups: groups in activation order need weight_g_idx, which "
            "compressed-tensors no longer has: write static_groups: true"
        )
