"""Round a block's weights: codes and scales per linear, and how far they are from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from configs.schema import ResolvedStep
from quantizers.losses import relative_output_error, relative_weight_error
from quantizers.rounding import QuantizedWeight, dequantize, round_to_nearest
from tasks.engine.job import Job, scheme_lineage
from tasks.engine.source import tensor_digest
from tasks.engine.step import step
from tasks.engine.store import Draft
from tasks.engine.streams import Stream, require
from tasks.transform import block_statistics, transformed_linears


@dataclass(frozen=True)
class Origin:
    """Where a block's codes come from.

    Attributes:
        recipe_step: the recipe's step.
        stream: the hidden states that enter the block, where the method is calibrated.
        decision: key of the transform's decision, where there is one.
    """

    recipe_step: ResolvedStep
    stream: Stream | None
    decision: str | None


def _depends_on(job: Job, origin: Origin, block: int) -> dict[str, Any]:
    return {
        "method": str(origin.recipe_step.quant.method),
        "scheme": scheme_lineage(job),
        "linears": list(job.plan.blocks[block].quantized),
        "weights": job.block_digest(block),
        "decision": origin.decision,
        "stream": origin.stream.key if origin.stream else None,
    }


@step(depends_on=_depends_on, tags=("quantize",))
def quantize(job: Job, draft: Draft, origin: Origin, block: int) -> dict[str, Any]:
    """Round a block and report the error of each linear; the codes themselves stay in memory.

    The value holds, per linear, the relative error of its weight, that of its output where inputs
    were collected, and a digest of codes and scales that :mod:`tasks.verify` compares.
    """
    del draft
    weights = _weights(job, origin, block)
    codes = block_codes(job, origin, block, weights)
    grams = _grams(job, origin, block)
    linears = {}
    for name, quantized in codes.items():
        restored = dequantize(quantized, job.scheme.weight)
        report: dict[str, Any] = {
            "weight_error": relative_weight_error(weights[name], restored),
            "digest": codes_digest(quantized),
        }
        if name in grams:
            report["output_error"] = relative_output_error(weights[name], restored, grams[name])
        linears[name] = report
    return {"linears": linears}


def block_codes(
    job: Job, origin: Origin, block: int, weights: Mapping[str, Tensor] | None = None
) -> Mapping[str, QuantizedWeight]:
    """Codes and scales of a block's linears: from memory, or computed again from their inputs."""

    def compute() -> dict[str, QuantizedWeight]:
        rounded = weights if weights is not None else _weights(job, origin, block)
        return {name: round_to_nearest(w, job.scheme.weight) for name, w in rounded.items()}

    return job.memo.get("codes", quantize.key(job, origin, block=block), compute)


def codes_digest(quantized: QuantizedWeight) -> str:
    """Digest of codes, scales and zero points, whatever their layout on disk."""
    parts = [quantized.codes, quantized.scale, quantized.zero_point]
    return "-".join(tensor_digest(part) for part in parts if part is not None)


def _weights(job: Job, origin: Origin, block: int) -> dict[str, Tensor]:
    decision = require(job, origin.decision) if origin.decision else None
    return transformed_linears(job, origin.recipe_step, block, decision)


def _grams(job: Job, origin: Origin, block: int) -> dict[str, Tensor]:
    if origin.stream is None:
        return {}
    statistics = block_statistics(job, origin.stream, block)
    return {
        linear: statistics[group.name].gram
        for group in job.plan.architecture.groups
        for linear in group.linears
    }
