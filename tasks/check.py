"""Check that every promise of a run can be kept, before any work and leaving nothing behind."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.schema import Recipe
from configs.schemes import export_problems, not_implemented
from configs.vocabulary import DataName, Method
from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.decoder import MICRO_BATCH_TOKENS, STREAM_BYTES
from tasks.engine.errors import InputError
from tasks.engine.export_format import export_dtype
from tasks.engine.generate import BATCH
from tasks.engine.hub import fetched, is_hub_id, look_up
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.plan import require_fit, require_sizes
from tasks.engine.publication import REPORT, begun, work_identity
from tasks.engine.settings import settings
from tasks.engine.source import Source, free_bytes, open_source
from tasks.engine.store import Store
from tasks.engine.streams import KEPT_BOUNDARIES
from tasks.engine.tracking import check_uri
from tasks.engine.windows import check_section
from tasks.publish import staging_folder

# what Python, torch, transformers, MLflow and Prefect hold before any tensor
LIBRARY_BYTES = 900 * 2**20
START_SECONDS = 12.0
DISK_BYTES_PER_SECOND = 1e9
# launching the operations of one block for one token: as on two CPU cores; a guess for a GPU
BLOCK_CALL_SECONDS = {"cpu": 0.002, "cuda": 0.0005}
# an attention score, and it in float32 before and after the softmax: most, of bf16 on a CPU
SCORE_BYTES = 2 + 4 + 4
# bytes of a name and of a path, as Linux has them; below a path are files of ours
LONGEST_NAME = 255
LONGEST_PATH = 4095 - 2 * 256


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line or by a deployment."""

    recipe: Recipe
    model: str | None
    output: Path | None
    store: Path
    device: str = "cpu"
    memory: int | None = None
    keep_incompatible: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a run will cost: bytes and seconds."""

    export_bytes: int
    store_bytes: int
    peak_memory_bytes: int
    device_bytes: int
    seconds: float


def output_folder(recipe: Recipe, name: str, model: str | None, output: str | None) -> Path:
    """Return the folder to publish, absolute.

    Args:
        recipe: the recipe, whose ``save.save_path`` serves where no output is given.
        name: the recipe's file or name.
        model: the model, where it is not the recipe's.
        output: what was asked for; by default named after model and recipe, where one stands.
    """
    named = output or recipe.save.save_path
    if named is None:
        source = Path(model or recipe.model.path or "model").expanduser().absolute()
        named = f"{Path(os.path.normpath(source)).name}-{Path(name).stem}"
    return Path(named).expanduser().absolute()


def check(request: Request, download: bool = False) -> tuple[Job, Prediction]:
    """Check a request as a whole.

    Args:
        request: what was asked for.
        download: whether a hub model's weights are downloaded once all else is right; its headers
            are enough to check.

    Returns:
        The job to run, and what it will cost.

    Raises:
        InputError: one line: what is wrong, where, and how to mend it.
    """
    _check_recipe(request.recipe)
    _check_places(request)
    check_uri(settings().tracking_uri)
    device = check_device(request.device)
    source = _open_model(request)
    _check_overwritten(request, source)
    if "quantization_config" in source.config:
        raise InputError(
            f"model {source.path}: is quantized already; give the checkpoint before quantization"
        )
    _check_rotation(request.recipe, architecture_of(source.config))
    require_sizes(source)
    job = Job(
        request.recipe,
        source,
        Store(request.store),
        Memo(),
        device,
        request.memory or _available_memory(device),
        request.keep_incompatible,
    )
    asked = str(request.recipe.model.torch_dtype)
    if asked not in ("auto", str(job.dtype).removeprefix("torch.")):
        raise InputError(
            f"model.torch_dtype: {asked}, but the checkpoint is {job.dtype}; write auto"
        )
    require_fit(job.source, job.plan, job.decoder)
    output = request.output
    if output is not None and begun(request.store, output) != work_identity(job, output):
        _refuse_existing(request)
    for step in job.steps:
        if step.calib is not None:
            check_section(source, step.calib)
    check_section(source, job.evaluation)
    prediction = predict(job)
    _check_room(job, request, prediction)
    named = _named_model(request)
    if download and is_hub_id(named):
        job = replace(job, source=fetched(source, named))
    return job, prediction


def _named_model(request: Request) -> str:
    named = request.model or request.recipe.model.path
    if not named:
        raise InputError("model: none given; use --model FOLDER or set model.path in the recipe")
    return named


def _open_model(request: Request) -> Source:
    named, digests = _named_model(request), request.store / "digests"
    return look_up(named, digests) if is_hub_id(named) else open_source(Path(named), digests)


def check_device(device: str) -> str:
    """Return the device's full name.

    Raises:
        InputError: not a device, or not on this machine.
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device; use cpu, cuda or cuda:N") from error
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported; use cpu, cuda or cuda:N")
    if where.type == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    if (where.index or 0) >= count:
        raise InputError(f"--device {device}: this machine has {count} CUDA devices; use cpu")
    return f"cuda:{where.index or 0}"


def _check_recipe(recipe: Recipe) -> None:
    steps = recipe.resolved_steps()
    problems = [*not_implemented(recipe), *export_problems(recipe)]
    if problems:
        raise InputError(problems[0])
    rotations = [n for n, step in enumerate(steps) if step.quant.method is Method.QUAROT]
    if any(rotations):
        raise InputError(
            f"steps.{max(rotations)}.quant.method: a rotation turns the whole model before "
            "anything else is decided; make it the first step, once"
        )
    if not recipe.save.save_sgl:
        raise InputError("save.save_sgl: false is not built yet; remove it to export for SGLang")


def _check_rotation(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse to rotate a stream to which norms add: their weights belong to its channels."""
    steps = recipe.resolved_steps()
    rotations = [n for n, step in enumerate(steps) if step.quant.method is Method.QUAROT]
    if not rotations or not architecture.output_norms:
        return
    place = "quant" if recipe.quant is not None else f"steps.{rotations[0]}.quant"
    mend = "" if recipe.quant is not None else "remove the step, or "
    raise InputError(
        f"{place}.method: {Method.QUAROT} rotates the residual stream, but "
        f"{architecture.model_type} has norms on what is added to it "
        f"({', '.join(architecture.output_norms)}), which a rotation cannot pass; "
        f"{mend}take {Method.GPTQ} or {Method.AWQ} alone"
    )


def _check_places(request: Request) -> None:
    _check_names("store", request.store, request.store)
    _check_writable("store", request.store, request.store)
    output = request.output
    if output is None:
        return
    _check_names("output", output, staging_folder(output))
    if output.is_symlink():
        raise InputError(
            f"--output {output}: is a symbolic link; give the folder that it leads to, or another"
        )
    if begun(request.store, output) is None:
        _refuse_existing(request)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; give a folder's name")
    _check_writable("output", output, output.absolute().parent)


def _refuse_existing(request: Request) -> None:
    output = request.output
    if output is not None and output.exists() and not request.overwrite:
        raise InputError(f"--output {output}: exists already; give another or use --overwrite")


def _check_names(option: str, place: Path, written: Path) -> None:
    """Refuse names that no disk takes; ``written`` is the longest that ``place`` leads to."""
    longest = max(len(os.fsencode(name)) for name in written.parts)
    if longest > LONGEST_NAME or len(os.fsencode(written)) > LONGEST_PATH:
        raise InputError(f"--{option} {place}: is too long a name; give a shorter one")


def _check_writable(option: str, place: Path, folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--{option} {place}: {folder} cannot be written to; give another folder")


def _check_overwritten(request: Request, source: Source) -> None:
    """Refuse an output whose replacement would take away what the run reads, or another's work."""
    if request.output is None or not request.output.exists():
        return
    output = request.output.resolve()
    for what, place in (("model", source.path), ("store", request.store)):
        if place.resolve().is_relative_to(output):
            raise InputError(
                f"--output {request.output}: replacing it would remove the {what} {place}; "
                "give another folder"
            )
    if any(output.iterdir()) and not (output / REPORT).is_file():
        raise InputError(
            f"--output {request.output}: is no export of blockquant (no {REPORT} in it) and is not "
            "replaced; give another folder, or empty it"
        )


def predict(job: Job) -> Prediction:
    """Predict the size of the export, the peak of memory and the time of a run."""
    export = _export_bytes(job)
    sizes = job.source.tensors
    numbers = {name: info.size // info.dtype.itemsize for name, info in sizes.items()}
    blocks = [sum(numbers[n] for n in b.full(b.tensors)) for b in job.plan.blocks]
    embedding = numbers[job.plan.architecture.embedding]
    width = job.compute_dtype.itemsize
    stream = _calibration_tokens(job) * int(job.source.config["hidden_size"]) * width
    # two models are evaluated side by side, on a CPU in float32
    evaluated = 4 if job.device == "cpu" else width
    evaluation = _evaluation_tokens(job) * int(job.source.config["hidden_size"]) * 2 * evaluated
    columns = max(
        (sizes[name].shape[1] for b in job.plan.blocks for name in b.full(b.weights)), default=0
    )
    # one block as read, in the compute dtype and restored; the head; a Gram matrix in float32
    device = 3 * max(blocks) * width + embedding * width + (4 * columns * columns if stream else 0)
    device += _score_bytes(job)
    peak = LIBRARY_BYTES + 2 * stream + min(evaluation, 2 * STREAM_BYTES)
    peak += device if job.device == "cpu" else 0
    forward = 2.0 * sum(blocks) * (2 * _calibration_tokens(job) + 2 * _evaluation_tokens(job))
    forward += 2.0 * 2 * embedding * _evaluation_tokens(job)
    read = sum(info.size for info in sizes.values())
    seconds = START_SECONDS + forward / _throughput(job.device)
    seconds += (3 * read + export) / DISK_BYTES_PER_SECOND
    seconds += _sampling_seconds(job, sum(numbers.values()))
    if job.device != "cpu" and _sampled(job):
        # sampling text needs the whole model on the device
        device = max(device, read)
    boundaries = (KEPT_BOUNDARIES + 1) * stream
    return Prediction(export, export + boundaries, int(peak), device, seconds)


def _score_bytes(job: Job) -> int:
    """Attention scores of a micro-batch, where attention is not torch's own, which holds none."""
    if job.plan.architecture.attention == "sdpa":
        return 0
    config: Any = job.decoder.model.config
    calibration = [step.calib.seq_len for step in job.steps if step.calib is not None]
    longest = max([*calibration, job.evaluation.seq_len])
    tokens = max(MICRO_BATCH_TOKENS[torch.device(job.device).type], longest)
    return tokens * longest * int(config.num_attention_heads) * SCORE_BYTES


def _sampled(job: Job) -> list[tuple[int, int]]:
    """Windows and their length of the texts that the model writes itself."""
    calibration = [s.calib for s in job.steps if s.calib is not None]
    asked = [(c.name, c.n_samples, c.seq_len) for c in calibration]
    asked.append((job.evaluation.name, job.evaluation.windows or 0, job.evaluation.seq_len))
    return [(n, length) for name, n, length in asked if name is DataName.SELF_GENERATED]


def _sampling_seconds(job: Job, parameters: int) -> float:
    """Time of sampling: each token of a batch is a pass through the whole model."""
    kind = torch.device(job.device).type
    seconds = 0.0
    for windows, length in _sampled(job):
        batches = -(-windows // BATCH)
        per_step = batches * len(job.plan.blocks) * BLOCK_CALL_SECONDS[kind]
        per_step += 2.0 * parameters * windows / _throughput(job.device)
        seconds += length * per_step
    return seconds


def _calibration_tokens(job: Job) -> int:
    return sum(
        step.calib.n_samples * step.calib.seq_len for step in job.steps if step.calib is not None
    )


def _evaluation_tokens(job: Job) -> int:
    # where all windows are asked for, a text of the size of WikiText-2's test set is assumed
    return (job.evaluation.windows or 150) * job.evaluation.seq_len


def _export_bytes(job: Job) -> int:
    width = export_dtype(job.dtype).itemsize
    total = 0
    for block in job.plan.blocks:
        for name in block.tensors:
            info = job.source.tensors[block.prefix + name]
            if name in block.weights:
                rows, columns = info.shape
                expected = job.scheme.expected(rows, columns).values()
                total += sum(_count(shape) * dtype.itemsize for dtype, shape in expected)
            else:
                total += _count(info.shape) * width
    return total + sum(_count(job.source.tensors[n].shape) * width for n in job.plan.outside)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _throughput(device: str, size: int = 512) -> float:
    """Floating point operations per second of a small matrix product, measured."""
    left = torch.ones(size, size, device=device)
    torch.mm(left, left)
    start = time.perf_counter()
    for _ in range(4):
        result = torch.mm(left, left)
    _ = float(result[0, 0])
    return 4 * 2 * size**3 / max(time.perf_counter() - start, 1e-6)


def _available_memory(device: str) -> int:
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def _check_room(job: Job, request: Request, prediction: Prediction) -> None:
    total = psutil.virtual_memory().total
    if prediction.peak_memory_bytes > total:
        raise InputError(
            f"memory: the run needs about {prediction.peak_memory_bytes / 1e9:.1f} GB, this "
            f"machine has {total / 1e9:.1f}; use fewer calibration tokens"
        )
    allowed = job.memory if job.device != "cpu" else request.memory
    if allowed is not None and prediction.device_bytes > allowed:
        what, mend = "one block and the head take", "allow as much"
        if job.device != "cpu" and _sampled(job):
            what, mend = "the model, which writes its own text, takes", "name a text file instead"
        raise InputError(
            f"--memory: {what} about {prediction.device_bytes / 1e6:.1f} MB on {request.device}, "
            f"but {allowed / 1e6:.1f} are free or allowed; {mend}"
        )
    _check_disk("store", request.store, prediction.store_bytes)
    if request.output is not None:
        _check_disk("output", request.output.absolute().parent, prediction.export_bytes)


def _check_disk(option: str, place: Path, needed: int) -> None:
    free = free_bytes(place)
    if free < needed:
        raise InputError(
            f"--{option} {place}: the export takes {needed / 1e6:.1f} MB, but "
            f"{free / 1e6:.1f} MB are free; free some or give another folder"
        )


def describe(job: Job, prediction: Prediction) -> dict[str, Any]:
    """What `blockquant check` prints."""
    return {
        "model": str(job.source.path),
        "architecture": job.plan.architecture.model_type,
        "blocks": len(job.plan.blocks),
        "linears": sum(len(block.quantized) for block in job.plan.blocks),
        "ignored": list(job.plan.ignored),
        "format": job.scheme.format,
        "export_bytes": prediction.export_bytes,
        "store_bytes": prediction.store_bytes,
        "peak_memory_bytes": prediction.peak_memory_bytes,
        "device_bytes": prediction.device_bytes,
        "seconds": round(prediction.seconds, 1),
    }
