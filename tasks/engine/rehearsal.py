"""Having a GPU load what it will compute with and on, before the first block waits for it.

Libraries load each kernel, and compile some, when it is first asked for: seconds of a first block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from configs.schema import ResolvedStep
from configs.special_keys import AwqSpecial, GptqSpecial
from quantizers.channel_transform import ChannelTransform, scale_columns, transformed_gram_blocks
from quantizers.clipping import range_factors, search_clip_curve
from quantizers.gptq import factorize, gptq
from quantizers.output_error import GroupProblem, output_errors
from quantizers.rounding import QuantizedWeight, dequantize, round_group
from quantizers.rounding_losses import rounding_energies
from quantizers.scales import weight_scales
from quantizers.schemes import Granularity
from quantizers.statistics import InputStatistics, add_batch, completed, empty_statistics
from tasks.engine.decoder import run_block
from tasks.engine.export_format import compress, restore
from tasks.engine.job import Job
from tasks.engine.precision import search_products
from tasks.engine.ranges import largest_of_all, of_weight
from tasks.engine.streams import keep_embedding
from tasks.engine.transfer import launched_on
from tasks.engine.version import SOURCE

# kernels are made for sizes that sixteen divides, whatever those are
ROWS = 64


def rehearse(job: Job) -> None:
    """Do once what the steps of a job do, with zeros; nothing is kept.

    Threads share it, so that several kernels are compiled at once where none was before.

    Raises:
        Exception: of any kind, which is to be met where the work itself meets it.
    """
    block = job.plan.blocks[0]
    widths = sorted({job.source.tensors[n].shape[1] for n in block.full(block.weights)})
    # sets up what compiles, for all threads
    largest_of_all([_weight(job, widths[0], job.dtype)])
    parts = [partial(_rounded, job, widths, kind) for kind in (job.dtype, torch.float32)]
    calibrated = [step for step in job.steps if step.calib is not None]
    if calibrated:
        # transformers changes torch's default dtype while it builds a model, for all threads
        parts.append(partial(_passed, job, calibrated[0], job.decoder.blocks[0]))
        parts.append(partial(_searched, job, calibrated, widths[0]))
    with search_products(job.device), ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(_launched, job.device, part) for part in parts]:
            done.result()


def fetch_first(job: Job) -> None:
    """Read what the first block takes: its tensors and the embedding; kept until it is asked for.

    Raises:
        Exception: of any kind, which is to be met where the work itself meets it.
    """
    # alone with a block of their own, others begin with another one
    if job.team.size > 1 and not job.recipe.calibrated:
        return
    job.read_block(0)
    if job.steps[0].calib is not None:
        keep_embedding(job, SOURCE)


def _passed(job: Job, step: ResolvedStep, block: nn.Module) -> None:
    """A window through a block."""
    assert step.calib is not None
    kind, place = job.compute_dtype, job.device
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    weights = {n: torch.zeros(shape, dtype=kind, device=place) for n, shape in shapes.items()}
    tokens = torch.zeros(1, step.calib.seq_len, dtype=torch.int64, device=place)
    width = int(job.source.config["hidden_size"])
    embedding = torch.zeros(1, width, dtype=kind, device=place)
    hidden, arguments = job.decoder.embed(embedding, tokens)
    run_block(block, weights, hidden, arguments[0])


def _launched(device: str, part: Callable[[], None]) -> None:
    """Do a part in a thread of its own."""
    with launched_on(device):
        part()


def _weight(job: Job, columns: int, dtype: torch.dtype) -> Tensor:
    """One to round, of zeros but for one entry."""
    weight = torch.zeros(ROWS, columns, dtype=dtype, device=job.device)
    weight[0, 0] = 1.0
    return weight


def _searched(job: Job, steps: Sequence[ResolvedStep], columns: int) -> None:
    """What is found out about a weight before it is rounded, GPTQ's rounding, and the report."""
    inputs = torch.eye(columns, device=job.device, dtype=job.compute_dtype)[None]
    statistics = completed(add_batch(empty_statistics(columns, job.device), inputs, last=False))
    ones = torch.ones(ROWS, columns, dtype=job.dtype, device=job.device)
    for step in steps:
        _searched_by(job, step, ones, statistics)
    for kind in (job.dtype, torch.float32):
        _reported(job, _weight(job, columns, kind), statistics.gram)


def _searched_by(job: Job, step: ResolvedStep, weight: Tensor, statistics: InputStatistics) -> None:
    """What one step of a recipe does of it."""
    special, scheme = step.quant.special, job.scheme.weight
    columns = weight.shape[1]
    transform = ChannelTransform(torch.ones(columns, device=job.device))
    if isinstance(special, AwqSpecial) and special.trans:
        problem = GroupProblem([weight], statistics, scheme, job.scheme.activation)
        output_errors(problem, [transform, transform])
    if isinstance(special, AwqSpecial) and special.weight_clip:
        gram = statistics.gram
        if scheme.granularity is Granularity.GROUP:
            gram = transformed_gram_blocks(statistics, transform, scheme.width(columns))
        steps, shrink = special.clip_steps, special.clip_shrink
        factors = range_factors(scheme.number_format, steps, shrink).to(job.device)
        search_clip_curve(scale_columns(weight, transform), gram, scheme, factors)
    if isinstance(special, GptqSpecial):
        gram, order = statistics.gram_mean(), special.actorder
        factor = factorize(gram, percdamp=special.percdamp, actorder=order)
        if factor is not None:
            found = weight_scales(weight, scheme)
            gptq(weight, factor, scheme, found, block_size=special.blocksize)


def _rounded(job: Job, widths: Sequence[int], dtype: torch.dtype) -> None:
    """Rounding, its report, packing, and the way back."""
    scheme = job.scheme.weight
    for columns in widths:
        codes = _reported(job, _weight(job, columns, dtype), None)
        of_weight(dequantize(codes, scheme))
        packed = compress(codes, job.scheme, check=False)
        restore(packed, job.scheme).to(job.compute_dtype)


def _reported(job: Job, weight: Tensor, gram: Tensor | None) -> QuantizedWeight:
    """Rounding and its report."""
    codes: QuantizedWeight
    (codes,) = round_group([weight], job.scheme.weight, [None], refuse=False)
    rounding_energies(weight, codes, job.scheme.weight, gram=gram)
    return codes
