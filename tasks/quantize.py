"""Round a block's weights: codes and scales per linear, and how far they are from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs.fields import effective
from configs.schema import Quant, ResolvedStep
from configs.special_keys import CLIP_KEYS, GptqSpecial
from configs.vocabulary import WeightAlgorithm
from quantizers.channel_transform import transformed_gram
from quantizers.output_error import group_input_scale
from quantizers.rounding import QuantizedWeight, dequantize, round_group
from tasks.clip import rounding_ranges
from tasks.engine.architectures import LinearGroup
from tasks.engine.collect import block_statistics
from tasks.engine.draft import Draft
from tasks.engine.errors import RunError
from tasks.engine.feedback import RoundedBlock, asked_once, feed_back
from tasks.engine.folding import quantized_groups, scaled_together
from tasks.engine.job import Job, result_tensors, scheme_lineage
from tasks.engine.lineage import code_digest
from tasks.engine.precision import search_products
from tasks.engine.ranges import described, of_inputs, of_weight
from tasks.engine.sharing import errors_of_all, own_energies
from tasks.engine.source import tensor_digest
from tasks.engine.step import step
from tasks.engine.streams import Stream, Streams
from tasks.engine.values import Later
from tasks.engine.version import (
    SOURCE,
    Version,
    block_transforms,
    transformed_block,
    version_block,
)
from tasks.transform import GroupInputs, group_problem, input_lineage, no_transform

INPUT_SCALES = "input_scales.safetensors"
_DESCENT = "quantizers.coordinate_descent"


@dataclass(frozen=True)
class Origin:
    """Where a block's codes come from.

    Attributes:
        recipe_step: the recipe's step.
        stream: the hidden states that enter the block, where the method is calibrated.
        decision: key of the transforms' decision, where there is one.
        clipped: key of the clip's decision, where there is one.
        version: of the model before this step.
        floats: what would enter the block were nothing rounded, where the method asks.
    """

    recipe_step: ResolvedStep
    stream: Stream | None
    decision: str | None
    clipped: str | None = None
    version: Version = SOURCE
    floats: Stream | None = None


def _depends_on(job: Job, origin: Origin, block: int) -> dict[str, Any]:
    quant = origin.recipe_step.quant
    mse = quant.weight.calib_algo is WeightAlgorithm.MSE
    return {
        "method": str(quant.method),
        "scheme": scheme_lineage(job),
        "inputs": input_lineage(job, quant) if _static(job) or _rounds_inputs(quant) else None,
        "special": _rounding_keys(origin),
        "ranges": "mse" if mse else "minmax",
        "linears": list(job.plan.blocks[block].quantized),
        "weights": origin.version.lineage(job, block),
        "decision": origin.decision,
        "clip": origin.clipped,
        "stream": origin.stream.key if origin.stream else None,
        "floats": origin.floats.key if origin.floats else None,
    }


def _rounding_keys(origin: Origin) -> dict[str, Any] | None:
    """What of the method's keys decides how codes are found."""
    special = origin.recipe_step.quant.special
    if not isinstance(special, GptqSpecial):
        return None
    # recipes without descent keep the keys that they had before there was one
    unread = CLIP_KEYS if special.descend else (*CLIP_KEYS, "descend")
    found = {key: value for key, value in effective(special).items() if key not in unread}
    return found | ({"code": code_digest(_DESCENT)} if special.descend else {})


def _rounds_inputs(quant: Quant) -> bool:
    """Whether codes depend on how the inputs of a block's later linears are rounded."""
    return isinstance(quant.special, GptqSpecial) and quant.special.true_sequential


def makes_up(quant: Quant) -> bool:
    """Whether rounding looks at what would enter the block were nothing rounded."""
    return isinstance(quant.special, GptqSpecial) and quant.special.make_up > 0


@step(
    depends_on=_depends_on,
    version=2,
    code=(
        "quantizers.clipping",
        "quantizers.gptq",
        "quantizers.rounding_losses",
        "quantizers.scale_refit",
    ),
    kept=True,
)
def quantize(job: Job, draft: Draft, origin: Origin, block: int) -> dict[str, Any]:
    """Round a block and report the error of each linear; the codes themselves stay in memory.

    The value holds, per linear, the relative error of its weight, that of its output where inputs
    were collected, and a digest of codes and scales that :mod:`tasks.verify` compares; and how
    large weights and inputs are, before all changes and after. Static input scales are the entry's
    only file.
    """
    weights = transformed_block(job, block, origin.decision, origin.version)
    rounded = rounded_block(job, origin, block)
    codes = rounded.codes
    scales = _input_scales(job, origin, block)
    source = job.read_block(block)
    linears: dict[str, dict[str, Any]] = {}
    ranges, energies = {}, {}
    for group in quantized_groups(job, block):
        # a method that measures its own inputs reports of those
        inputs = (None, None) if rounded.notes else _gram(job, origin, block, group)
        for name in group.linears:
            ranges[name] = {
                "before": of_weight(source[f"{name}.weight"]),
                "after": of_weight(dequantize(codes[name], job.scheme.weight)),
            }
            with search_products(job.device):
                energies[name] = own_energies(
                    job.team, weights[f"{name}.weight"], codes[name], job.scheme.weight, *inputs
                )
            linears[name] = {
                # the host's work, which the device need not wait for
                "digest": Later(partial(codes_digest, codes[name], scales.get(name))),
                **rounded.notes.get(name, {}),
            }
            if name in scales:
                linears[name]["input_scale"] = scales[name].reshape(())
    errors = errors_of_all(job.team, energies)
    if scales:
        draft.save_tensors(INPUT_SCALES, {name: scale.clone() for name, scale in scales.items()})
    return {
        "linears": {name: errors[name] | report for name, report in linears.items()},
        "weights": described(ranges),
        "inputs": {} if rounded.notes else _inputs(job, origin, block),
    }


def block_codes(job: Job, origin: Origin, block: int) -> Mapping[str, QuantizedWeight]:
    """Codes and scales of a block's linears: from memory, or computed again from their inputs."""
    return rounded_block(job, origin, block).codes


def rounded_block(job: Job, origin: Origin, block: int) -> RoundedBlock:
    """A block after rounding, from memory, or computed again from its inputs."""

    def compute() -> RoundedBlock:
        tensors = transformed_block(job, block, origin.decision, origin.version)
        clips = rounding_ranges(job, origin.recipe_step.quant, block, tensors, origin.clipped)
        special = origin.recipe_step.quant.special
        if isinstance(special, GptqSpecial):
            assert origin.stream is not None
            streams = Streams(origin.stream, origin.floats or origin.stream)
            fed_back = partial(feed_back, job, special, streams, block, tensors, clips)
            return asked_once(job, fed_back, hopes=job.on_gpu)
        codes: dict[str, QuantizedWeight] = {}
        for group in quantized_groups(job, block):
            for linears in scaled_together(job, group.linears):
                weights = [tensors[f"{linear}.weight"] for linear in linears]
                clipped = [clips.get(linear) for linear in linears]
                rounded = round_group(weights, job.scheme.weight, clipped, refuse=False)
                codes |= dict(zip(linears, rounded, strict=True))
        if codes:
            job.doubts.add(
                torch.stack([found.scale.amax() for found in codes.values()]),
                lambda: RunError(f"block {block}: a weight to be rounded holds NaN or infinity"),
            )
        return RoundedBlock(codes, {})

    return job.memo.get("codes", quantize.key(job, origin, block=block), compute)


def block_input_scales(job: Job, origin: Origin, block: int) -> dict[str, Tensor]:
    """Static input scales, float32 (1,), of a block that was quantized; none where dynamic."""
    if not _static(job):
        return {}
    return dict(result_tensors(job, quantize.key(job, origin, block=block), INPUT_SCALES))


def _static(job: Job) -> bool:
    return job.scheme.activation is not None and not job.scheme.activation.dynamic


def codes_digest(quantized: QuantizedWeight, input_scale: Tensor | None = None) -> str:
    """Digest of codes, scales and zero points, whatever their layout on disk."""
    parts = [quantized.codes, quantized.scale, quantized.zero_point, input_scale]
    return "-".join(tensor_digest(part) for part in parts if part is not None)


def _input_scales(job: Job, origin: Origin, block: int) -> dict[str, Tensor]:
    """One static scale for the inputs that a group of linears shares."""
    if origin.stream is None or not _static(job):
        return {}
    statistics = block_statistics(job, origin.stream, block)
    transforms = block_transforms(job, origin.decision)
    tensors = version_block(job, origin.version, block)
    scales: dict[str, Tensor] = {}
    for group in quantized_groups(job, block):
        found = statistics[group.name]
        given = GroupInputs(block, group, tensors, found)
        problem = group_problem(job, origin.recipe_step.quant, given)
        scale = group_input_scale(problem, transforms.get(group.name) or no_transform(found))
        if scale is not None:
            scales |= dict.fromkeys(group.linears, scale)
    return scales


def _inputs(job: Job, origin: Origin, block: int) -> Mapping[str, Any] | Later:
    """How large the inputs of groups are, before and after the transforms; none collected: {}."""
    if origin.stream is None:
        return {}
    statistics = block_statistics(job, origin.stream, block)
    found = {group.name: statistics[group.name] for group in quantized_groups(job, block)}
    return described(of_inputs(found, block_transforms(job, origin.decision)))


def _gram(
    job: Job, origin: Origin, block: int, group: LinearGroup
) -> tuple[Tensor | None, Tensor | None]:
    """A Gram matrix, and what inputs are multiplied with after it; None where none were collected.

    Of the inputs as they were where nothing shifts them: a matrix less.
    """
    if origin.stream is None:
        return None, None
    found = block_statistics(job, origin.stream, block)[group.name]
    transform = block_transforms(job, origin.decision).get(group.name)
    if transform is not None and transform.shift is not None:
        return transformed_gram(found, transform), None
    return found.gram, None if transform is None else 1.0 / transform.scale
