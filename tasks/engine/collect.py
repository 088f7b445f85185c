"""Statistics of a block's inputs, collected in one forward pass and kept in memory only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from quantizers.errors import NonFiniteError
from quantizers.statistics import InputStatistics, add_batch, empty_statistics
from tasks.engine.architectures import LinearGroup
from tasks.engine.decoder import InputHook, micro_batches, run_block
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.precision import search_products
from tasks.engine.streams import Stream, block_arguments, hidden_states
from tasks.engine.version import version_block

# rows of inputs that are kept to see how they are rounded, drawn with this seed
SAMPLE_ROWS = 512
SAMPLE_SEED = 0


def block_statistics(job: Job, stream: Stream, block: int) -> Mapping[str, InputStatistics]:
    """Statistics of the inputs of each group of linears, by the group's name.

    Raises:
        RunError: an input holds NaN or Inf; names block and linear.
    """
    return job.memo.get("statistics", f"{stream.key} {block}", lambda: _collect(job, stream, block))


def _collect(job: Job, stream: Stream, block: int) -> dict[str, InputStatistics]:
    tensors = version_block(job, stream.version, block)
    return observe(job, stream, block, tensors, job.plan.architecture.groups)


def observe(
    job: Job,
    stream: Stream,
    block: int,
    tensors: Mapping[str, Tensor],
    groups: Sequence[LinearGroup],
    on_input: InputHook | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of groups, in a pass that ends where the last of them is known.

    Args:
        job: the run.
        stream: the hidden states that enter the block.
        block: its number.
        tensors: of the block, as it is to be run.
        groups: those that are observed.
        on_input: what becomes of the inputs of the linears of all other groups.
    """
    hidden = hidden_states(job, stream)
    weights = {name: t.to(job.compute_dtype) for name, t in tensors.items()}
    # how inputs are rounded matters where they are
    draw = job.scheme.activation is not None
    sample = sampled_rows(hidden.shape[0] * hidden.shape[1])
    # linears of a group share one input: the first of them sees it
    first = {group.linears[0]: group.name for group in groups}
    observed = {linear for group in groups for linear in group.linears}
    others = tuple(n for n in job.plan.blocks[block].quantized if n not in observed)
    collected: dict[str, InputStatistics] = {}
    missing: set[str] = set()

    def see(linear: str, x: Tensor) -> Tensor:
        if linear not in first:
            return x if on_input is None else on_input(linear, x)
        name = first[linear]
        missing.discard(name)
        before = collected.get(name) or empty_statistics(x.shape[-1], x.device)
        inside = (sample >= before.tokens) & (sample < before.tokens + x.shape[:-1].numel())
        keep = (sample[inside] - before.tokens).to(x.device)
        try:
            # its products take the inputs as they are: bf16 factors, float32 sums
            with search_products(job.device) if x.dtype == torch.bfloat16 else nullcontext():
                collected[name] = add_batch(before, x, keep=keep, draw=draw)
        except NonFiniteError as error:
            place = f"{job.plan.blocks[block].prefix}{linear}"
            raise RunError(f"block {block}: the inputs of {place} hold NaN or Inf") from error
        if not missing:
            raise _AllSeen
        return x

    module = job.decoder.blocks[block]
    for batch in micro_batches(hidden, job.device):
        arguments = block_arguments(job, batch.shape[0], batch.shape[1])[block]
        missing.update(first.values())
        with suppress(_AllSeen):
            run_block(module, weights, batch.to(job.device), arguments, (*first, *others), see)
    return collected


class _AllSeen(Exception):
    """What comes after the last input, the largest product of a block, is not needed."""


def sampled_rows(tokens: int) -> Tensor:
    """Numbers of the rows that are kept of so many, rising; the same for every block."""
    draw = torch.Generator().manual_seed(SAMPLE_SEED)
    return torch.randperm(tokens, generator=draw)[:SAMPLE_ROWS].sort().values
