"""What a run will cost: bytes on disk and in memory, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from configs.schema import Quant
from configs.special_keys import GptqSpecial, OmniQuantSpecial
from configs.vocabulary import DataName
from tasks.engine.export_format import export_dtype
from tasks.engine.footprint import evaluation_tokens, least_bytes, stages, stream_bytes, waiting
from tasks.engine.generate import BATCH
from tasks.engine.job import Job
from tasks.engine.streams import KEPT_BOUNDARIES

# what Python, torch, transformers, MLflow and Prefect hold before any tensor, 520 MiB, and what the
# allocator keeps of memory that is free again; beside a GPU a guess, with what its driver takes
LIBRARY_BYTES = {"cpu": 640 * 2**20, "cuda": 900 * 2**20}
START_SECONDS = 12.0
DISK_BYTES_PER_SECOND = 1e9
# launching the operations of one block for one token: as on two CPU cores; a guess for a GPU
BLOCK_CALL_SECONDS = {"cpu": 0.002, "cuda": 0.0005}


@dataclass(frozen=True)
class Prediction:
    """What a run will cost: bytes and seconds.

    Attributes:
        export_bytes: of what is published.
        store_bytes: of what the store grows by.
        peak_memory_bytes: of the process.
        device_bytes: on the device.
        least_bytes: on the device, where all that can waits on the host.
        stages: bytes that each stage holds where it computes, by its name.
        timed: reckons the seconds.
    """

    export_bytes: int
    store_bytes: int
    peak_memory_bytes: int
    device_bytes: int
    least_bytes: int
    stages: Mapping[str, int]
    timed: Callable[[], float]

    @property
    def seconds(self) -> float:
        """From start to end; the device is timed for it, which a GPU takes a moment to begin."""
        return self.timed()


def predict(job: Job) -> Prediction:
    """Predict the size of the export, the peak of memory and the time of a run."""
    by_stage = stages(job)
    held = max(by_stage.values())
    on_cpu = job.device == "cpu"
    read = sum(info.size for info in job.source.tensors.values())
    device, least = held, least_bytes(job)
    # what a GPU has no room for waits on the host
    libraries = LIBRARY_BYTES[torch.device(job.device).type]
    # each process of a team has its own; hidden states are theirs together
    peak = job.team.size * (libraries + on_cpu * held) + (0 if on_cpu else waiting(job))
    if not on_cpu and sampled(job):
        # sampling text needs the whole model on the device
        device, least = max(device, read), max(least, read)
    made, published = _export_bytes(job)
    boundaries = (KEPT_BOUNDARIES + 1) * stream_bytes(job)
    return Prediction(
        published, made + boundaries, peak, device, least, by_stage, partial(_seconds, job, made)
    )


def _seconds(job: Job, made: int) -> float:
    """Time of a run that makes so many bytes."""
    numbers = {n: info.size // info.dtype.itemsize for n, info in job.source.tensors.items()}
    blocks = [sum(numbers[n] for n in b.full(b.tensors)) for b in job.plan.blocks]
    embedding = numbers[job.plan.architecture.embedding]
    read = sum(info.size for info in job.source.tensors.values())
    calibrated = sum(tokens * _passes(quant) for quant, tokens in _calibrations(job))
    forward = 2.0 * sum(blocks) * (calibrated + 2 * evaluation_tokens(job))
    forward += 2.0 * 2 * embedding * evaluation_tokens(job)
    seconds = START_SECONDS + forward / _throughput(job.device)
    seconds += (3 * read + made) / DISK_BYTES_PER_SECOND
    seconds += _sampling_seconds(job, sum(numbers.values()))
    return seconds


def sampled(job: Job) -> list[tuple[int, int]]:
    """Windows and their length of the texts that the model writes itself."""
    calibration = [s.calib for s in job.steps if s.calib is not None]
    asked = [(c.name, c.n_samples, c.seq_len) for c in calibration]
    asked.append((job.evaluation.name, job.evaluation.windows or 0, job.evaluation.seq_len))
    return [(n, length) for name, n, length in asked if name is DataName.SELF_GENERATED]


def _sampling_seconds(job: Job, parameters: int) -> float:
    """Time of sampling: each token of a batch is a pass through the whole model."""
    kind = torch.device(job.device).type
    seconds = 0.0
    for windows, length in sampled(job):
        batches = -(-windows // BATCH)
        per_step = batches * len(job.plan.blocks) * BLOCK_CALL_SECONDS[kind]
        per_step += 2.0 * parameters * windows / _throughput(job.device)
        seconds += length * per_step
    return seconds


def _calibrations(job: Job) -> list[tuple[Quant, int]]:
    """The steps that read text, each with its tokens."""
    return [
        (step.quant, step.calib.n_samples * step.calib.seq_len)
        for step in job.steps
        if step.calib is not None
    ]


def _passes(quant: Quant) -> float:
    """How many times a step's tokens pass through a block: observed, then passed on."""
    special = quant.special
    if isinstance(special, GptqSpecial) and special.true_sequential:
        # a pass up to each of four groups of linears, about two and a half of whole ones
        return 3.5
    if isinstance(special, OmniQuantSpecial):
        # a backward pass is two forward ones; before the first epoch and after each it is measured
        learned = (1 + special.epochs) * (2 if special.aug_loss else 1) + 2 * special.epochs
        return 4 + learned
    return 2


def _export_bytes(job: Job) -> tuple[int, int]:
    """Bytes of the checkpoints that are made, and of those of them that are published."""
    width = export_dtype(job.dtype).itemsize
    quantized = before = 0
    for block in job.plan.blocks:
        for name in block.tensors:
            info = job.source.tensors[block.prefix + name]
            before += _count(info.shape) * width
            if name in block.weights:
                rows, columns = info.shape
                expected = job.scheme.expected(rows, columns).values()
                quantized += sum(_count(shape) * dtype.itemsize for dtype, shape in expected)
            else:
                quantized += _count(info.shape) * width
    outside = sum(_count(job.source.tensors[n].shape) * width for n in job.plan.outside)
    if job.plan.tied and job.recipe.rotated:
        # a rotated head is no longer the embedding
        outside += _count(job.source.tensors[job.plan.architecture.embedding].shape) * width
    save = job.recipe.save
    # both are linked to one file of what is outside
    made = outside + quantized * job.quantizes + before * save.save_trans
    quantized, before = quantized + outside, before + outside
    return made, quantized * save.save_sgl + before * save.save_trans


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _throughput(device: str) -> float:
    """Floating point operations per second of a small matrix product, measured."""
    size = 512
    left = torch.ones(size, size, device=device)
    torch.mm(left, left)
    start = time.perf_counter()
    for _ in range(4):
        result = torch.mm(left, left)
    _ = float(result[0, 0])
    return 4 * 2 * size**3 / max(time.perf_counter() - start, 1e-6)
