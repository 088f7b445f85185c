"""Statistics of a block's inputs, collected in one forward pass and kept in memory only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from quantizers.statistics import (
    InputStatistics,
    add_batch,
    completed,
    empty_statistics,
    largest_sum,
)
from tasks.engine.architectures import LinearGroup
from tasks.engine.decoder import InputHook, micro_batches, run_block
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.precision import search_products
from tasks.engine.residency import one_by_one
from tasks.engine.sharing import statistics_of_all
from tasks.engine.streams import (
    Stream,
    Streams,
    block_arguments,
    hidden_states,
    windows_of_each,
)
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


def _collect(job: Job, stream: Stream, block: int) -> Mapping[str, InputStatistics]:
    tensors = version_block(job, stream.version, block)
    groups = job.plan.architecture.groups
    if not job.lean:
        return observe(job, stream, block, tensors, groups)
    # a pass for each: one group's Gram matrix at a time is on the device
    passes = {g.name: partial(observe, job, stream, block, tensors, (g,)) for g in groups}
    return one_by_one(passes, job.device)


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
    inputs = _Inputs.of(job, stream)
    weights = {name: t.to(job.compute_dtype) for name, t in tensors.items()}
    # linears of a group share one input: the first of them sees it
    first = {group.linears[0]: group.name for group in groups}
    observed = {linear for group in groups for linear in group.linears}
    others = tuple(n for n in job.plan.blocks[block].quantized if n not in observed)
    collected: dict[str, InputStatistics] = {}
    missing: set[str] = set()

    def see(at: int, linear: str, x: Tensor) -> Tensor:
        if linear not in first:
            return x if on_input is None else on_input(linear, x)
        name = first[linear]
        missing.discard(name)
        collected[name] = _added(job, block, linear, collected.get(name), x, inputs, at)
        if not missing:
            raise _AllSeen
        return x

    module = job.decoder.blocks[block]
    for at, batch in enumerate(inputs.batches):
        arguments = block_arguments(job, batch.shape[0], batch.shape[1])[block]
        missing.update(first.values())
        with suppress(_AllSeen):
            seen = (*first, *others)
            run_block(module, weights, batch.to(job.device), arguments, seen, partial(see, at))
    return collected


def observe_beside(
    job: Job,
    streams: Streams,
    block: int,
    tensors: Mapping[str, Tensor],
    group: LinearGroup,
    before: Mapping[str, Tensor],
    on_input: InputHook | None = None,
) -> tuple[InputStatistics, Tensor]:
    """Observe for one group, and the gap to its inputs had nothing been rounded.

    Args:
        job: the run.
        streams: the hidden states that enter the block, and those that would.
        block: its number.
        tensors: of the block, as it is to be run.
        group: the one that is observed.
        before: tensors of the block before rounding.
        on_input: as observe takes it.

    Returns:
        statistics of its inputs X, and X^T (X_float - X) / T, (K, K) float32.
    """
    linear = group.linears[0]
    others = tuple(n for n in job.plan.blocks[block].quantized if n not in group.linears)
    rounded, floats = (
        {name: tensor.to(job.compute_dtype) for name, tensor in given.items()}
        for given in (tensors, before)
    )
    inputs = _Inputs.of(job, streams.quantized)
    columns = before[f"{linear}.weight"].shape[1]
    gap = torch.zeros(columns, columns, device=job.device)
    found: InputStatistics | None = None
    unrounded = micro_batches(hidden_states(job, streams.float), job.device)
    for at, batch in enumerate(inputs.batches):
        x = _input_of(job, block, rounded, batch, linear, others, on_input)
        wanted = _input_of(job, block, floats, unrounded[at], linear)
        found = _added(job, block, linear, found, x, inputs, at)
        rows = x.reshape(-1, columns).float()
        with search_products(job.device):
            gap.addmm_(rows.T, wanted.reshape(-1, columns).float() - rows)
    assert found is not None
    return found, job.team.summed_(gap).div_(found.tokens)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a block is fed by this process, and how much the others feed it.

    Attributes:
        batches: micro-batches of hidden states.
        keeps: numbers of the rows of each that are kept, on the device.
        windows: of each process.
        samples: rows that each process keeps.
        length: tokens of a window.
    """

    batches: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...]
    windows: list[int]
    samples: list[int]
    length: int

    @classmethod
    def of(cls, job: Job, stream: Stream) -> _Inputs:
        """Those of a stream."""
        hidden = hidden_states(job, stream)
        length = hidden.shape[1]
        batches = micro_batches(hidden, job.device)
        windows = windows_of_each(job, stream)
        keeps, samples = _kept_rows(job, batches, [count * length for count in windows])
        return cls(batches, keeps, windows, samples, length)


def _added(
    job: Job,
    block: int,
    linear: str,
    before: InputStatistics | None,
    x: Tensor,
    inputs: _Inputs,
    at: int,
) -> InputStatistics:
    """Statistics with micro-batch number ``at`` added, those before used up.

    With the last one, what the other processes saw is added too; whether all of it was finite is
    known by the end of the step.
    """
    before = before or empty_statistics(x.shape[-1], x.device)
    last, team = at + 1 == len(inputs.batches), job.team
    others = sum(inputs.windows[: team.rank]) * inputs.length
    # how inputs are rounded matters where they are
    draw = job.scheme.activation is not None
    # its products take the inputs as they are: bf16 factors, float32 sums
    products = search_products(job.device) if x.dtype == torch.bfloat16 else nullcontext()
    with record_function("statistics"), products:
        found = add_batch(
            before,
            x,
            keep=inputs.keeps[at],
            draw=draw,
            reuse=True,
            last=False,
            before=others,
        )
    if not last:
        return found
    if team.size > 1:
        found = statistics_of_all(team, found, inputs.windows, inputs.length, inputs.samples)
    else:
        found = completed(found)
    place = f"{job.plan.blocks[block].prefix}{linear}"
    job.doubts.add(
        largest_sum(found),
        lambda: RunError(f"block {block}: the inputs of {place} hold NaN or Inf"),
    )
    return found


def _input_of(
    job: Job,
    block: int,
    weights: Mapping[str, Tensor],
    batch: Tensor,
    linear: str,
    others: Sequence[str] = (),
    on_input: InputHook | None = None,
) -> Tensor:
    """What a linear of the block is given for one micro-batch, and ``on_input`` the others."""
    kept: list[Tensor] = []

    def keep(name: str, x: Tensor) -> Tensor:
        if name != linear:
            return x if on_input is None else on_input(name, x)
        kept.append(x)
        raise _AllSeen

    arguments = block_arguments(job, batch.shape[0], batch.shape[1])[block]
    module = job.decoder.blocks[block]
    with suppress(_AllSeen):
        run_block(module, weights, batch.to(job.device), arguments, (linear, *others), keep)
    return kept[0]


class _AllSeen(Exception):
    """What comes after the last input, the largest product of a block, is not needed."""


def _kept_rows(
    job: Job, batches: Sequence[Tensor], tokens: Sequence[int]
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Numbers of the rows of each micro-batch that are kept, on the device.

    And how many rows are kept of all ``tokens`` of each process.
    """

    def compute() -> tuple[tuple[Tensor, ...], list[int]]:
        sample = sampled_rows(sum(tokens))
        of_each = [len(part) for part in _inside(sample, 0, tokens)]
        sizes = [batch.shape[0] * batch.shape[1] for batch in batches]
        own = _inside(sample, sum(tokens[: job.team.rank]), sizes)
        return tuple(part.to(job.device) for part in own), of_each

    shape = f"{list(tokens)}: {[tuple(batch.shape[:2]) for batch in batches]}"
    return job.memo.get("kept rows", shape, compute)


def _inside(rows: Tensor, start: int, sizes: Sequence[int]) -> list[Tensor]:
    """Numbers of rows within each of some parts that follow one another, the first at ``start``."""
    ends = itertools.accumulate(sizes, initial=start)
    return [rows[(rows >= a) & (rows < b)] - a for a, b in itertools.pairwise(ends)]


def sampled_rows(tokens: int) -> Tensor:
    """Numbers of the rows that are kept of so many, rising; the same for every block."""
    draw = torch.Generator().manual_seed(SAMPLE_SEED)
    return torch.randperm(tokens, generator=draw)[:SAMPLE_ROWS].sort().values
