"""Check that every promise of a run can be kept, before any work and leaving nothing behind."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.loading import load_recipe
from configs.schema import Recipe
from configs.schemes import export_problems, not_implemented
from configs.special_keys import OmniQuantSpecial
from configs.vocabulary import Method
from tasks.calibration_set import calibration_set
from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.encoding import require_tokenizer
from tasks.engine.errors import InputError
from tasks.engine.hub import fetched, is_hub_id, look_up
from tasks.engine.job import Job
from tasks.engine.kernel_limits import require_parallel
from tasks.engine.memo import Memo
from tasks.engine.places import (
    check_apart,
    check_disk,
    check_output,
    check_replaced,
    check_store,
)
from tasks.engine.plan import require_fit, require_sizes
from tasks.engine.prediction import Prediction, predict, sampled
from tasks.engine.publication import begun, published_by, under_way, work_identity
from tasks.engine.settings import settings
from tasks.engine.source import Source, one_spelling, open_source
from tasks.engine.step import Step
from tasks.engine.store import Entry, Store
from tasks.engine.task_list import require_tasks
from tasks.engine.team import Team
from tasks.engine.tracking import check_uri
from tasks.engine.windows import check_section
from tasks.evaluation_set import evaluation_set
from tasks.load_model import load_model
from tasks.report import require_same_means
from tasks.upload import check_upload

log = logging.getLogger("blockquant")


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
    upload: str | None = None


def request_of(
    recipe: str,
    *,
    model: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
    store: str | None = None,
    **more: Any,
) -> Request:
    """The request that a flow's parameters make: the recipe read, output and store found.

    What else there is of a Request goes into it as it was given.
    """
    loaded = load_recipe(recipe, overrides)
    folder = output_folder(loaded, recipe, model, output)
    place = settings(Path(store) if store else None)
    return Request(loaded, model, folder, place.store, **more)


def output_folder(recipe: Recipe, name: str, model: str | None, output: str | None) -> Path | None:
    """Return the folder to publish, absolute; None where the recipe publishes nothing.

    Args:
        recipe: the recipe, whose ``save.save_path`` serves where no output is given.
        name: the recipe's file or name.
        model: the model, where it is not the recipe's.
        output: what was asked for; by default named after model and recipe, where one stands.
    """
    if not recipe.save.save_sgl and not recipe.save.save_trans:
        return None
    named = output or recipe.save.save_path
    if named is None:
        source = one_spelling(model or recipe.model.path or "model")
        named = f"{Path(os.path.normpath(source)).name}-{Path(name).stem}"
    return one_spelling(named)


def check(
    request: Request, download: bool = False, elsewhere: bool = False, room: bool = True
) -> tuple[Job, Prediction]:
    """Check a request as a whole.

    Args:
        request: what was asked for.
        download: whether a hub model's weights are downloaded once all else is right; its headers
            are enough to check.
        elsewhere: whether the work may be done on another processor than this one.
        room: whether memory and disks are to have room for the work, which may be done already.

    Returns:
        The job to run, and what it will cost.

    Raises:
        InputError: one line: what is wrong, where, and how to mend it.
    """
    _check_recipe(request.recipe)
    _check_serving(request.recipe)
    _check_places(request)
    check_upload(request.upload)
    check_uri(settings().tracking_uri)
    devices = check_devices(request)
    source = _open_model(request)
    if request.output is not None:
        check_apart(request.output, source.path)
        check_replaced(request.output, {"model": source.path, "store": request.store})
    if "quantization_config" in source.config:
        raise InputError(
            f"model {source.path}: is quantized already; give the checkpoint before quantization"
        )
    _check_rotation(request.recipe, architecture_of(source.config))
    require_sizes(source)
    require_tokenizer(source)
    if request.recipe.save.save_sgl:
        gpus = request.recipe.serving.tensor_parallel
        require_parallel(source.config, gpus, "serving.tensor_parallel")
    job = _job(request, source, devices)
    _check_dtype(job)
    # a description in the store was made of these very headers, and they fitted
    if _found(load_model, job) is None:
        require_fit(job.source, job.plan, job.decoder)
    _check_published(job, request, elsewhere)
    for step in job.steps:
        if step.calib is not None:
            check_section(source, step.calib, partial(_found, calibration_set, job, step.calib))
    check_section(source, job.evaluation, partial(_found, evaluation_set, job, job.evaluation))
    require_tasks(job.evaluation.lm_eval)
    if job.quantizes and job.unserved:
        log.warning(job.unserved)
    prediction = predict(job)
    if room:
        _check_room(job, request, prediction)
    named = _named_model(request)
    if download and is_hub_id(named):
        job = replace(job, source=fetched(source, named))
    return job, prediction


def checked_job(request: Request) -> Job:
    """The job of a request that :func:`check` found right, in another process."""
    return _job(request, _open_model(request), check_devices(request))


def _job(request: Request, source: Source, devices: tuple[str, ...]) -> Job:
    return Job(
        request.recipe,
        source,
        Store(request.store),
        Memo(),
        devices[0],
        request.memory or min(_available_memory(each) for each in devices),
        request.keep_incompatible,
        team=Team(size=len(devices), device=devices[0]),
    )


def _found(step: Step[...], job: Job, *args: Any) -> Entry | None:
    """What a step made before of the same, None where it did not."""
    return job.store.get(step.key(job, *args))


def _check_serving(recipe: Recipe) -> None:
    python = recipe.serving.python
    if python is not None and shutil.which(python) is None:
        raise InputError(
            f"serving.python: {python} is no program; give the interpreter of an environment that "
            "has SGLang"
        )


def _named_model(request: Request) -> str:
    named = request.model or request.recipe.model.path
    if not named:
        raise InputError("model: none given; use --model FOLDER or set model.path in the recipe")
    return named


def _open_model(request: Request) -> Source:
    named, digests = _named_model(request), request.store / "digests"
    return look_up(named, digests) if is_hub_id(named) else open_source(Path(named), digests)


def _check_dtype(job: Job) -> None:
    asked = str(job.recipe.model.torch_dtype)
    if asked not in ("auto", str(job.dtype).removeprefix("torch.")):
        raise InputError(
            f"model.torch_dtype: {asked}, but the checkpoint is {job.dtype}; write auto"
        )


_DEVICES = "cpu, cuda or cuda:N, or several with commas between"


def check_device(device: str) -> str:
    """Return the device's full name.

    Raises:
        InputError: not a device, or not on this machine.
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device; use {_DEVICES}") from error
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported; use {_DEVICES}")
    if where.type == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    if (where.index or 0) >= count:
        raise InputError(f"--device {device}: this machine has {count} CUDA devices; use cpu")
    return f"cuda:{where.index or 0}"


def check_devices(request: Request) -> tuple[str, ...]:
    """Return the full names of the devices that a request names, with commas between.

    Raises:
        InputError: one is none, or they cannot compute together, or not this recipe.
    """
    devices = tuple(check_device(name.strip()) for name in request.device.split(","))
    if len(devices) == 1:
        return devices
    place = f"--device {request.device}"
    if len({torch.device(device).type for device in devices}) > 1:
        raise InputError(f"{place}: a CPU and a GPU; give devices of one kind")
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise InputError(f"{place}: names a GPU twice; give each once")
    if len(names := {torch.cuda.get_device_name(gpu) for gpu in gpus}) > 1:
        raise InputError(f"{place}: are {' and '.join(sorted(names))}; give GPUs of one model")
    steps = request.recipe.resolved_steps()
    if any(isinstance(step.quant.special, OmniQuantSpecial) for step in steps):
        raise InputError(f"{place}: OmniQuant learns on one device; give one")
    for calib in (step.calib for step in steps if step.calib is not None):
        if calib.n_samples < len(devices):
            raise InputError(
                f"{place}: {calib.place}.n_samples is {calib.n_samples}, less than a sample for "
                "each; use more"
            )
    return devices


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


def _check_rotation(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse to rotate a stream to which norms add, or whose head a server does not read."""
    steps = recipe.resolved_steps()
    rotations = [n for n, step in enumerate(steps) if step.quant.method is Method.QUAROT]
    if not rotations:
        return
    if architecture.output_norms:
        reason = (
            f"has norms on what is added to it ({', '.join(architecture.output_norms)}), which a "
            "rotation cannot pass"
        )
    elif architecture.head_is_embedding:
        reason = "is served with its embedding as its head, which a rotated model has apart"
    else:
        return
    place = "quant" if recipe.quant is not None else f"steps.{rotations[0]}.quant"
    mend = "" if recipe.quant is not None else "remove the step, or "
    raise InputError(
        f"{place}.method: {Method.QUAROT} rotates the residual stream, but "
        f"{architecture.model_type} {reason}; {mend}take {Method.GPTQ} or {Method.AWQ} alone"
    )


def _check_places(request: Request) -> None:
    check_store(request.store)
    if request.output is None:
        return
    check_output(request.output)
    if begun(request.store, request.output) is None:
        _refuse_existing(request)


def _check_published(job: Job, request: Request, elsewhere: bool) -> None:
    """Refuse an output of other work, or of this very work by other means, unless replaced."""
    output = request.output
    if output is None:
        return
    if not published_by(job, output):
        _refuse_existing(request)
    if not (elsewhere or request.overwrite):
        require_same_means(job, output)


def _refuse_existing(request: Request) -> None:
    output = request.output
    if output is not None and output.exists() and not request.overwrite:
        raise InputError(f"--output {output}: exists already; give another or use --overwrite")


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
    if allowed is not None and prediction.least_bytes > allowed:
        what, mend = "one block and the head take", "allow as much"
        if job.device != "cpu" and sampled(job):
            what, mend = "the model, which writes its own text, takes", "name a text file instead"
        raise InputError(
            f"--memory: {what} about {prediction.least_bytes / 1e6:.1f} MB on {request.device}, "
            f"but {allowed / 1e6:.1f} are free or allowed; {mend}"
        )
    needed = [("store", request.store, prediction.store_bytes)]
    if request.output is not None:
        needed.append(("output", request.output.parent, prediction.export_bytes))
    for option, place, size in needed:
        try:
            check_disk(option, place, size)
        except InputError as error:
            if not under_way(request.store, work_identity(job, request.output)):
                raise
            # what it made before is found, and takes no room again
            log.warning("%s; it goes on, for a part is done", error)


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
        "stages": dict(prediction.stages),
        "seconds": round(prediction.seconds, 1),
    }
