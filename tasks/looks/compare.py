"""Runs side by side: what of their recipes differs, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.engine.errors import InputError
from tasks.engine.settings import Settings
from tasks.engine.source import one_spelling
from tasks.engine.tracking import EXPERIMENT, answering, check_uri

# figures that are compared: those of one value each, not a curve over the blocks
_FIGURES = ("eval.", "served.", "export.", "lm_eval.", "seconds.")
# parameters that say where, not what
_PLACES = ("output", "save.save_path")
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class Tracked:
    """A run as MLflow keeps it.

    Attributes:
        id: MLflow's.
        name: the run's.
        status: RUNNING, FINISHED, FAILED.
        started_ms: when it began.
        parameters: the recipe's values, flat.
        metrics: the last value of each.
        tags: scheme, checkpoint, versions and more.
    """

    id: str
    name: str
    status: str
    started_ms: int
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """What differs, each as one value per run; None where a run has none."""

    runs: list[dict[str, str]]
    recipe: dict[str, list[str | None]]
    figures: dict[str, list[float | None]]

    def as_values(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        return asdict(self)


def compare(runs: Sequence[Tracked]) -> Comparison:
    """Compare runs: parameters that are not the same in all, and all figures."""
    names = sorted({name for run in runs for name in run.parameters if name not in _PLACES})
    found = {name: [run.parameters.get(name) for run in runs] for name in names}
    measured = sorted(
        {name for run in runs for name in run.metrics if name.startswith(_FIGURES)},
        key=lambda name: (_FIGURES.index(name.partition(".")[0] + "."), name),
    )
    return Comparison(
        [
            {
                "run": run.id,
                "name": run.name,
                "status": run.status,
                "scheme": run.tags.get("scheme", ""),
                "checkpoint": run.tags.get("checkpoint", ""),
            }
            for run in runs
        ],
        {name: values for name, values in found.items() if len(set(values)) > 1},
        {name: [run.metrics.get(name) for run in runs] for name in measured},
    )


def find_runs(settings: Settings, asked: Sequence[str]) -> list[Tracked]:
    """Find runs by their id, the beginning of it, their name, or the folder of their checkpoint.

    Of those with one output folder the newest is meant.

    Raises:
        InputError: there is none, or several are meant.
    """
    known = all_runs(settings)
    return [_find(known, each) for each in asked]


def all_runs(settings: Settings) -> list[Tracked]:
    """All runs of the experiment, the newest first; none where there is no database yet.

    Raises:
        InputError: MLflow cannot be asked there.
    """
    check_uri(settings.tracking_uri)
    local = settings.tracking_uri.removeprefix("sqlite:///")
    # to look is no reason to create one
    if local != settings.tracking_uri and not Path(local).exists():
        return []
    with answering(settings) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        found: list[Tracked] = []
        page = None
        while True:
            part = client.search_runs(
                [experiment.experiment_id], order_by=["attributes.start_time DESC"], page_token=page
            )
            found += [
                Tracked(
                    run.info.run_id,
                    run.info.run_name or "",
                    run.info.status,
                    run.info.start_time or 0,
                    dict(run.data.params),
                    dict(run.data.metrics),
                    dict(run.data.tags),
                )
                for run in part
            ]
            page = part.token
            if not page:
                return found


def _find(known: Sequence[Tracked], asked: str) -> Tracked:
    folder = str(one_spelling(asked))
    ways: list[Callable[[Tracked], bool]] = [
        lambda run: run.id == asked,
        lambda run: run.name == asked,
        lambda run: len(asked) >= SHORTEST_PREFIX and run.id.startswith(asked),
    ]
    for meant in ways:
        found = [run for run in known if meant(run)]
        if len(found) > 1:
            listed = ", ".join(run.id for run in found[:5])
            raise InputError(f"run {asked}: {len(found)} runs are meant ({listed}); give an id")
        if found:
            return found[0]
    published = [
        run for run in known if folder in (run.tags.get("checkpoint"), run.parameters.get("output"))
    ]
    if not published:
        raise InputError(
            f"run {asked}: no such run in MLflow; give its id, the beginning of it, its name, or "
            "the folder of its checkpoint"
        )
    return published[0]
