"""What pictures show, as plain numbers: nothing here draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.engine.store import Entry

# what searches vary: the key in a trial, and how it is called
_VARIED = {"ratio": "ratio", "threshold": "threshold"}


@dataclass(frozen=True)
class Curve:
    """One curve of a panel.

    Attributes:
        name: what it is; curves of one name look alike.
        place: where it stands among its like, 0 to 1: its block's number, mostly.
        x: rising.
        y: as many.
    """

    name: str
    place: float
    x: tuple[float, ...]
    y: tuple[float, ...]


Panels = Mapping[str, Sequence[Curve]]


def error_grid(
    rows: Sequence[Mapping[str, Any]], kind: str
) -> tuple[list[str], list[list[float | None]]]:
    """Names of linears, and per linear the error in each block; None where it has none.

    Args:
        rows: one per linear of the model, as :func:`tasks.register.error_rows` gives them.
        kind: ``weight_error`` or ``output_error``.
    """
    errors = {(row["linear"], row["block"]): row[kind] for row in rows}
    linears = list(dict.fromkeys(row["linear"] for row in rows))
    blocks = range(1 + max((row["block"] for row in rows), default=-1))
    return linears, [[errors.get((linear, block)) for block in blocks] for linear in linears]


def search_curves(values: Sequence[Mapping[str, Any]]) -> tuple[str, Panels]:
    """What transforms' searches tried: what was varied, and per group a curve for each block.

    Errors are those of the search divided by the first one, where nothing is scaled yet.

    Args:
        values: of the transform's entries, block after block.
    """
    panels: dict[str, list[Curve]] = defaultdict(list)
    varied = ""
    for block, value in enumerate(values):
        for group, trials in value["search"].items():
            for version in dict.fromkeys(trial.get("version", "") for trial in trials):
                tried = [trial for trial in trials if trial.get("version", "") == version]
                key = next(key for key in _VARIED if key in tried[0])
                varied = _VARIED[key]
                points = sorted((trial[key], trial["error"]) for trial in tried)
                first = tried[0]["error"] or 1.0
                panels[group].append(
                    Curve(
                        version,
                        _share(block, len(values)),
                        tuple(x for x, _ in points),
                        tuple(y / first for _, y in points),
                    )
                )
    return varied, panels


def clip_curves(values: Sequence[Mapping[str, Any]]) -> Panels:
    """Output errors over clip factors, divided by that of the whole range: per linear and block."""
    panels: dict[str, list[Curve]] = defaultdict(list)
    for block, value in enumerate(values):
        for linear, errors in value["errors"].items():
            points = sorted(zip(value["factors"], errors, strict=True))
            # the first factor is 1: those of integers fall from it, those of floats rise
            whole = errors[0] or 1.0
            panels[linear].append(
                Curve(
                    "",
                    _share(block, len(values)),
                    tuple(x for x, _ in points),
                    tuple(y / whole for _, y in points),
                )
            )
    return panels


def range_curves(blocks: Sequence[Entry], what: str) -> Panels:
    """How large things are over the blocks, before and after: per linear or group.

    Args:
        blocks: the quantize entry of each block.
        what: ``weights`` or ``inputs``.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for block, entry in enumerate(blocks):
        for name, both in entry.value[what].items():
            for when in ("before", "after"):
                for measure in ("absmax", "p99"):
                    found[name][f"{measure} {when}"].append((block, both[when][measure]))
    return {
        name: [
            Curve(label, 0.0, tuple(float(x) for x, _ in points), tuple(y for _, y in points))
            for label, points in curves.items()
        ]
        for name, curves in found.items()
    }


def loss_curves(values: Sequence[Mapping[str, Any]]) -> Panels:
    """Losses of learning over its epochs, a curve for each block that learned."""
    curves = [
        Curve("", _share(block, len(values)), tuple(map(float, range(len(losses)))), tuple(losses))
        for block, losses in enumerate(value["loss"] for value in values)
        if losses
    ]
    return {"loss": curves} if curves else {}


def by_pass(decided: Sequence[Entry], task: str, blocks: int) -> list[list[Mapping[str, Any]]]:
    """Values of a kind of decision, one list over all blocks for each step that took it."""
    values: list[Mapping[str, Any]] = [entry.value for entry in decided if entry.task == task]
    return [values[start : start + blocks] for start in range(0, len(values), max(blocks, 1))]


def _share(number: int, count: int) -> float:
    return number / max(count - 1, 1)
