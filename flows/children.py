"""The children of a sweep: what each one is, and that all of them can be worked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from configs.sweep_schema import OverrideSet, Sweep, SweepModel, SweepRecipe, load_sweep
from flows.runner import Runner, check_runner, computing_with
from tasks.check import check, request_of
from tasks.engine.errors import InputError
from tasks.engine.job import Job
from tasks.engine.publication import work_identity
from tasks.engine.source import one_spelling


@dataclass(frozen=True)
class Child:
    """One recipe on one model with one set of overrides.

    Attributes:
        name: of its run and of its output folder.
        model: its model's name.
        recipe: its recipe's name.
        overrides: its own overrides, without those of the whole sweep.
        parameters: of the flow ``quantize``.
    """

    name: str
    model: str
    recipe: str
    overrides: tuple[str, ...]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """Children that can be worked at.

    Attributes:
        children: as they are worked at, one model after the other.
        identity: what makes two sweeps the same work.
        works: what makes the work of each child, by its name.
        jobs: one per model, whose weights' digests are to be known before children start.
    """

    children: tuple[Child, ...]
    identity: str
    works: Mapping[str, str]
    jobs: tuple[Job, ...]


def checked_sweep(
    name: str, output: str | None, common: Mapping[str, Any], runner: Runner
) -> tuple[Sweep, Checked]:
    """Read a sweep and check its children and how they are to run, before any work.

    Raises:
        InputError: what is wrong, in one line.
        RecipeError: the sweep's file is.
    """
    check_runner(runner)
    loaded = load_sweep(name)
    children = expand(loaded, common, output)
    with computing_with(runner.threads):
        checked = check_children(
            str(loaded.name), children, runner.checked_on, elsewhere=runner.elsewhere
        )
    return loaded, checked


def expand(sweep: Sweep, common: Mapping[str, Any], output: str | None = None) -> list[Child]:
    """Make the children of a sweep, one model after the other.

    Args:
        sweep: what to combine.
        common: parameters of the flow ``quantize`` that all children share; ``overrides`` among
            them come after those of the sweep and before a child's own.
        output: the folder of their outputs; by default the sweep's, or ``exports/NAME``.

    Raises:
        InputError: two children have one name, hence one output.
    """
    folder = one_spelling(output or sweep.output or f"exports/{sweep.name}")
    several = len(sweep.overrides) > 1
    children = [
        _child(sweep, common, folder, model, recipe, overrides, several)
        for model, recipe, overrides in product(sweep.models, sweep.recipes, sweep.overrides)
    ]
    seen: set[str] = set()
    for child in children:
        if child.name in seen:
            raise InputError(
                f"sweep {sweep.name}: two children would publish at {folder / child.name}; give "
                "their models, recipes or overrides names that differ"
            )
        seen.add(child.name)
    return children


def _child(
    sweep: Sweep,
    common: Mapping[str, Any],
    folder: Path,
    model: SweepModel,
    recipe: SweepRecipe,
    overrides: OverrideSet,
    several: bool,
) -> Child:
    parts = [model.label, recipe.label, overrides.label if several or overrides.name else ""]
    name = "-".join(part for part in parts if part)
    given = {
        # relative places are those of whoever asks: a worker may run elsewhere
        "recipe": _absolute(recipe.path),
        "model": _absolute(model.path),
        "output": str(folder / name),
        "overrides": [*sweep.set, *common.get("overrides", ()), *overrides.set],
        "name": name,
    }
    return Child(name, model.label, recipe.label, overrides.set, {**common, **given})


def _absolute(path: str) -> str:
    """A path that is there, made absolute; a shipped name or a hub id stays."""
    return str(one_spelling(path)) if Path(path).expanduser().exists() else path


def check_children(
    name: str, children: Sequence[Child], device: str | None = None, elsewhere: bool = False
) -> Checked:
    """Check all children as ``blockquant check`` does, before any work.

    Args:
        name: of the sweep.
        children: its children.
        device: to check on, where this machine lacks that of the workers.
        elsewhere: whether they may be computed on another processor than this one.

    Raises:
        InputError: what is wrong with which child, or two of them are the same work.
    """
    jobs: dict[str, Job] = {}
    known: dict[str, str] = {}
    works: dict[str, str] = {}
    for child in children:
        try:
            job, output = _check(child, device, elsewhere)
        except ValueError as error:
            raise InputError(f"child {child.name}: {error}") from error
        works[child.name] = work_identity(job, output)
        # whatever its output is
        work = work_identity(job, None)
        if (other := known.get(work)) is not None:
            raise InputError(
                f"sweep {name}: children {other} and {child.name} are the same work; remove one"
            )
        known[work] = child.name
        jobs.setdefault(str(job.source.path), job)
    whole = json.dumps([name, sorted(works.values())])
    identity = hashlib.sha256(whole.encode()).hexdigest()[:32]
    return Checked(tuple(children), identity, works, tuple(jobs.values()))


def _check(child: Child, device: str | None, elsewhere: bool) -> tuple[Job, Path | None]:
    given = {name: value for name, value in child.parameters.items() if name != "name"}
    # the memory that was asked for is another device's
    request = request_of(**given | ({"device": device, "memory": None} if device else {}))
    job, _ = check(request, elsewhere=elsewhere)
    return job, request.output
