"""What each stage of a run holds at once, in bytes: on a CPU beside the libraries, or on a GPU.

Stages follow one another and leave only hidden states behind, so a run's peak is that of its
largest stage; beside a GPU, what is outside of the blocks passes through the host's meanwhile.
Files that are mapped into memory are not counted: they can be dropped at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from configs.schema import ResolvedStep
from configs.special_keys import AwqSpecial, GptqSpecial, OmniQuantSpecial
from configs.vocabulary import Method, TransVersion
from quantizers.output_error import DEVICE_ENTRIES
from quantizers.rounding_losses import PART_ENTRIES
from quantizers.schemes import Granularity
from tasks.engine.decoder import HEAD_ROWS, MICRO_BATCH_TOKENS, STREAM_BYTES
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import quantized_groups
from tasks.engine.job import Job
from tasks.engine.precision import computing_dtype

FLOAT = 4
DOUBLE = 8
# models up to this size in float32 are also loaded whole by transformers when they are verified
WHOLE_MODEL_BYTES = 512 * 2**20
# an attention score, and it in float32 before and after the softmax: most, of bf16 on a CPU
SCORE_BYTES = 2 + 4 + 4
# of a score that has a gradient, on a GPU: it after the softmax, kept; it before, or both gradients
KEPT_SCORE_BYTES = 4
GRADIENT_SCORE_BYTES = 4 + 4
# of one scale that is tried, with the range it comes from
SCALE_BYTES = 8 * FLOAT
# of a linear's input: what the block computes around it, its norm, its gate, its residual
AROUND = 3


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's largest block, and of what lies around it.

    Attributes:
        block: entries of all tensors of a block.
        group: entries of the weights of the linears that share one input, at most.
        linear: entries of one weight, at most.
        grams: entries of the Gram matrices of all groups.
        widest: entries of the largest one.
        inner: channels of the widest input of a linear.
        hidden: channels of the hidden states.
        head: entries of the embedding.
        vocabulary: tokens of it.
        width: bytes of an entry that is computed with.
    """

    block: int
    group: int
    linear: int
    grams: int
    widest: int
    inner: int
    hidden: int
    head: int
    vocabulary: int
    width: int


def sizes_of(job: Job) -> Sizes:
    """Measure a model by the shapes that its files give."""
    tensors = job.source.tensors
    entries = {name: torch.Size(info.shape).numel() for name, info in tensors.items()}
    groups, grams, linears, columns = [0], [0], [0], [0]
    for number, block in enumerate(job.plan.blocks):
        inputs = []
        for group in quantized_groups(job, number):
            names = [f"{block.prefix}{linear}.weight" for linear in group.linears]
            groups.append(sum(entries[name] for name in names))
            linears.extend(entries[name] for name in names)
            inputs.append(int(tensors[names[0]].shape[1]))
        columns.extend(inputs)
        grams.append(sum(width * width for width in inputs))
    embedding = job.plan.architecture.embedding
    return Sizes(
        block=max(sum(entries[n] for n in b.full(b.tensors)) for b in job.plan.blocks),
        group=max(groups),
        linear=max(linears),
        grams=max(grams),
        widest=max(columns) ** 2,
        inner=max(columns),
        hidden=int(job.source.config["hidden_size"]),
        head=entries[embedding],
        vocabulary=int(tensors[embedding].shape[0]),
        width=job.compute_dtype.itemsize,
    )


def stages(job: Job) -> dict[str, int]:
    """Bytes that each stage of a run holds at most, by its name."""
    sizes = sizes_of(job)
    found: dict[str, int] = {}
    for step in job.steps:
        for name, size in _of_step(job, step, sizes).items():
            found[name] = max(size, found.get(name, 0))
    if job.device != "cpu":
        # a GPU has copies of what a CPU maps: the block as stored, and as it is exported
        stored = job.source.tensors
        copied = max(sum(stored[n].size for n in b.full(b.tensors)) for b in job.plan.blocks)
        found = {name: size + copied for name, size in found.items()}
        if "advance" in found:
            # that copy is the next block then, and what is exported is still copied to the host
            found["advance"] += sizes.block * job.scheme.weight.number_format.bits // 8
    return found | {"verify": _verify(job, sizes), "evaluate": _evaluate(job, sizes)}


def _of_step(job: Job, step: ResolvedStep, sizes: Sizes) -> dict[str, int]:
    """What the stages of one step of a recipe hold, the hidden states that wait included."""
    quant, special = step.quant, step.quant.special
    # what a step before has rotated or transformed
    before = FLOAT * sizes.block if len(job.steps) > 1 else 0
    codes = sizes.block
    if quant.method is Method.QUAROT:
        # a rotated head is no longer the embedding; what comes last rounds what it rotated
        return {
            "outside": 2 * export_dtype(job.dtype).itemsize * sizes.head,
            "quantize": FLOAT * sizes.block + codes + FLOAT * 2 * sizes.group,
        }
    if step.calib is None:
        return {"quantize": before + codes + FLOAT * 2 * sizes.group}
    stream = _stream(job, step)
    if job.stream_place(stream) != job.device:
        stream = 0
    length, windows = step.calib.seq_len, max(job.team.counts(step.calib.n_samples))
    batch = sizes.width * _activations(job, length, windows, sizes)
    batch += _score_bytes(job, length, windows)
    pass_ = batch + sizes.width * sizes.block
    # what is stored as it is computed with is on a GPU once
    as_stored = job.device != "cpu" and job.dtype == job.compute_dtype and not before
    observed = batch if as_stored else pass_
    grams, gram = FLOAT * sizes.grams, FLOAT * sizes.widest
    changed = before + FLOAT * sizes.block
    # all linears of a group are rounded at once where they share a scale
    alone = job.scheme.weight.granularity is not Granularity.TENSOR
    together = sizes.linear if alone else 2 * sizes.group
    part = 4 * min(sizes.linear, PART_ENTRIES[torch.device(job.device).type])
    found = {
        "observe": stream + before + observed + grams,
        "advance": 2 * stream + before + pass_,
        "transform": stream + before + grams + _search_bytes(job, step, sizes),
        # codes, one linear before and after it is rounded, and a part of both, multiplied
        "quantize": stream + before + grams + codes + FLOAT * (together + sizes.linear + part),
    }
    if isinstance(special, GptqSpecial):
        # the matrix, its mean, and in float64 it and its factor, beside the linears done so far
        factor = 2 * gram + 2 * DOUBLE * sizes.widest + FLOAT * sizes.linear
        others = 0 if special.true_sequential else grams
        found["quantize"] = stream + changed + codes + factor + others
    if isinstance(special, OmniQuantSpecial):
        # targets and the stream before rounding; a graph holds what each operation was given
        graph = 3 * pass_ + _learned_score_bytes(job, special, length, windows)
        found["learn"] = 4 * stream + before + 6 * FLOAT * sizes.block + graph
    return found


def _search_bytes(job: Job, step: ResolvedStep, sizes: Sizes) -> int:
    """What a search of scales holds: the weights of a group, the Gram matrix of its inputs."""
    special = step.quant.special
    # before the search: all weights of the group, and how large they are
    weighed = isinstance(special, AwqSpecial) and special.trans_version is not TransVersion.V2
    before = 2 * FLOAT * sizes.group * weighed
    if job.device == "cpu" or job.scheme.activation is not None:
        return max(before, FLOAT * (sizes.widest + sizes.group))
    # both in bfloat16; what a part of the weights loses under some scales, and the scales of all
    ratios = getattr(special, "ratios", 1)
    part = min(sizes.group, DEVICE_ENTRIES)
    scales = ratios * SCALE_BYTES * part // job.scheme.weight.width(sizes.inner)
    return max(before, 2 * (sizes.widest + sizes.group + DEVICE_ENTRIES) + scales)


def least_bytes(job: Job) -> int:
    """What a device has to hold where all else waits on the host: a block, the head, one matrix."""
    sizes = sizes_of(job)
    gram = FLOAT * sizes.widest if job.recipe.calibrated else 0
    # a micro-batch stays as it is: the order of its sums decides bytes
    length = job.evaluation.seq_len
    texts = [(length, evaluation_tokens(job) // length)]
    texts += [(s.calib.seq_len, s.calib.n_samples) for s in job.steps if s.calib is not None]
    scores = [_score_bytes(job, *text) for text in texts]
    return sizes.width * (3 * sizes.block + sizes.head) + gram + max(scores)


def _together(job: Job, length: int, windows: int) -> int:
    """Tokens of a micro-batch."""
    most = max(MICRO_BATCH_TOKENS[torch.device(job.device).type], length)
    return min(most, length * windows)


def _activations(job: Job, length: int, windows: int, sizes: Sizes) -> int:
    """Entries of what a block computes of one micro-batch."""
    return _together(job, length, windows) * AROUND * (sizes.inner + sizes.hidden)


def _score_bytes(job: Job, length: int, windows: int) -> int:
    """Attention scores of a micro-batch, where attention is not torch's own, which holds none."""
    if job.plan.architecture.attention == "sdpa":
        return 0
    return _scores(job, length, windows) * SCORE_BYTES


def _learned_score_bytes(job: Job, special: OmniQuantSpecial, length: int, windows: int) -> int:
    """Attention scores where gradients pass them: beside a GPU, torch's own holds them, too."""
    if job.device == "cpu" or job.plan.architecture.attention != "sdpa":
        return 0
    # the outputs for both inputs are compared with one target
    sides = 2 if special.aug_loss else 1
    each = sides * KEPT_SCORE_BYTES + GRADIENT_SCORE_BYTES
    return _scores(job, length, windows) * each


def _scores(job: Job, length: int, windows: int) -> int:
    """How many attention scores a micro-batch has."""
    config: Any = job.decoder.model.config
    return _together(job, length, windows) * length * int(config.num_attention_heads)


def _verify(job: Job, sizes: Sizes) -> int:
    """A block, read back and as it was; a small model whole, on the host."""
    infos = job.source.tensors.values()
    whole = FLOAT * sum(torch.Size(info.shape).numel() for info in infos)
    if job.device != "cpu" or whole > WHOLE_MODEL_BYTES:
        whole = 0
    return 2 * sizes.width * sizes.block + whole


def _evaluate(job: Job, sizes: Sizes) -> int:
    """Two models in turn, their heads side by side."""
    width = _evaluation_width(job)
    length = job.evaluation.seq_len
    rows = min(HEAD_ROWS, length)
    heads = 2 * width * sizes.head + 4 * FLOAT * rows * sizes.vocabulary
    windows = evaluation_tokens(job) // length
    block = width * (sizes.block + _activations(job, length, windows, sizes))
    block += _score_bytes(job, length, windows)
    return heads + block + _evaluated(job)


def waiting(job: Job) -> int:
    """Hidden states that wait on the host, beside a GPU that has no room for them."""
    learned = any(isinstance(step.quant.special, OmniQuantSpecial) for step in job.steps)
    return (4 if learned else 2) * stream_bytes(job)


def stream_bytes(job: Job) -> int:
    """Hidden states of the largest calibration set."""
    sets = [step.calib for step in job.steps if step.calib is not None]
    return max([0, *(calib.n_samples * _window_bytes(job, calib.seq_len) for calib in sets)])


def _stream(job: Job, step: ResolvedStep) -> int:
    """Hidden states of this process's share of a step's calibration windows."""
    if step.calib is None:
        return 0
    return max(job.team.counts(step.calib.n_samples)) * _window_bytes(job, step.calib.seq_len)


def _window_bytes(job: Job, length: int) -> int:
    return length * int(job.source.config["hidden_size"]) * job.compute_dtype.itemsize


def _evaluated(job: Job) -> int:
    """Last hidden states of both models that are evaluated, and those of one a block before."""
    both = evaluation_tokens(job) * int(job.source.config["hidden_size"]) * 2
    both *= _evaluation_width(job)
    return min(both, STREAM_BYTES) * 3 // 2


def _evaluation_width(job: Job) -> int:
    """Bytes of a number of what is evaluated with."""
    return computing_dtype(str(job.evaluation.dtype), job.device).itemsize


def evaluation_tokens(job: Job) -> int:
    """Tokens that are evaluated; of all windows of a text, those of one like WikiText-2's test."""
    return (job.evaluation.windows or 150) * job.evaluation.seq_len
