"""Collect a block's input statistics in one forward pass and decide its transform from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from configs.fields import effective
from configs.schema import ResolvedStep
from configs.vocabulary import Method
from quantizers import identity
from quantizers.errors import NonFiniteError
from quantizers.statistics import InputStatistics, add_batch, empty_statistics
from tasks.engine.decoder import micro_batches, run_block
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.store import Draft, Entry, load_tensors
from tasks.engine.streams import Stream, block_arguments, hidden_states

DECISION = "decision.safetensors"
# methods that change weights before they are rounded
DECIDES = {Method.IDENTITY: identity.decide}
APPLIES = {Method.IDENTITY: identity.apply}


def _depends_on(job: Job, recipe_step: ResolvedStep, stream: Stream, block: int) -> dict[str, Any]:
    return {
        "method": str(recipe_step.quant.method),
        "special": effective(recipe_step.quant.special),
        "stream": stream.key,
        "weights": job.block_digest(block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, tags=("search",))
def transform(
    job: Job, draft: Draft, recipe_step: ResolvedStep, stream: Stream, block: int
) -> dict[str, Any]:
    """Decide a block's transform: per group of linears, float32 scales (K,)."""
    collected = block_statistics(job, stream, block)
    decide = DECIDES[recipe_step.quant.method]
    decision = decide(collected, source_linears(job, block))
    draft.save_tensors(DECISION, decision)
    return {
        "tokens": next(iter(collected.values())).tokens,
        "absmax": {name: float(found.absmax.max()) for name, found in collected.items()},
    }


def source_linears(job: Job, block: int) -> dict[str, Tensor]:
    """The block's quantizable weights (N, K) as stored, by the names of their linears."""
    tensors = job.read_block(block)
    return {linear: tensors[f"{linear}.weight"] for linear in job.plan.blocks[block].quantized}


def transformed_linears(
    job: Job, recipe_step: ResolvedStep, block: int, decision: Entry | None
) -> dict[str, Tensor]:
    """The block's quantizable weights after the transform that was decided."""
    weights = source_linears(job, block)
    if decision is None:
        return weights
    apply = APPLIES[recipe_step.quant.method]
    return apply(weights, load_tensors(decision.file(DECISION), job.device))


def block_statistics(job: Job, stream: Stream, block: int) -> Mapping[str, InputStatistics]:
    """Statistics of the inputs of each group of linears, kept in memory only.

    Raises:
        RunError: an input holds NaN or Inf; names block and linear.
    """
    return job.memo.get("statistics", f"{stream.key} {block}", lambda: _collect(job, stream, block))


def _collect(job: Job, stream: Stream, block: int) -> dict[str, InputStatistics]:
    hidden = hidden_states(job, stream)
    weights = {name: t.to(job.compute_dtype) for name, t in job.read_block(block).items()}
    # linears of a group share one input: the first of them sees it
    first = {group.linears[0]: group.name for group in job.plan.architecture.groups}
    collected: dict[str, InputStatistics] = {}

    def see(linear: str, x: Tensor) -> Tensor:
        name = first[linear]
        before = collected.get(name) or empty_statistics(x.shape[-1], x.device)
        try:
            collected[name] = add_batch(before, x)
        except NonFiniteError as error:
            place = f"{job.plan.blocks[block].prefix}{linear}"
            raise RunError(f"block {block}: the inputs of {place} hold NaN or Inf") from error
        return x

    for batch in micro_batches(hidden, job.device):
        arguments = block_arguments(job, batch.shape[0], batch.shape[1])[block]
        run_block(
            job.decoder.blocks[block], weights, batch.to(job.device), arguments, tuple(first), see
        )
    return collected
