"""Tell the MLflow run everything that was measured, and close it with where the checkpoint lies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.engine.journal import ToldRun
from tasks.engine.publication import REPORT
from tasks.engine.store import Entry
from tasks.engine.tracking import Point, Run
from tasks.report import report_text
from tasks.task_scores import score_metrics


def block_points(block: int, entry: Entry) -> list[Point]:
    """Metric points of a quantized block: the errors of its linears and their means."""
    time_ms = int(entry.created * 1000)
    points = []
    for kind in ("weight_error", "output_error"):
        errors = {
            name: linear[kind] for name, linear in entry.value["linears"].items() if kind in linear
        }
        points += [Point(f"{kind}.{n}", e, block, time_ms) for n, e in sorted(errors.items())]
        if errors:
            mean = sum(errors.values()) / len(errors)
            points.append(Point(f"{kind}.mean", mean, block, time_ms))
    return points


def loss_points(block: int, entry: Entry) -> list[Point]:
    """Metric points of a block that was learned: its loss in every epoch, a curve of its own."""
    time_ms = int(entry.created * 1000)
    return [
        Point(f"loss.block-{block}", loss, epoch, time_ms)
        for epoch, loss in enumerate(entry.value["loss"])
    ]


def error_rows(blocks: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row per quantized linear of the model."""
    return [
        {
            "block": number,
            "linear": name,
            "weight_error": linear["weight_error"],
            "output_error": linear.get("output_error"),
        }
        for number, entry in enumerate(blocks)
        for name, linear in entry.value["linears"].items()
    ]


def log_measured(
    run: ToldRun,
    report: Mapping[str, Any],
    blocks: Sequence[Entry],
    decided: Sequence[Entry],
    sets: Mapping[str, Entry],
    seconds: Mapping[str, float],
) -> None:
    """Send final metrics, tables, the report, decisions and tokens, before anything is served.

    Args:
        run: the open run.
        report: what lies in the checkpoint as its report.
        blocks: the quantize entry of each block.
        decided: the entries of transforms and clips, block after block.
        sets: calibration and evaluation sets by their role.
        seconds: time of each kind of step in this process.
    """
    evaluated_ms = max(int(entry.created * 1000) for entry in [*blocks, *sets.values()])
    numbers = sorted(_numbers(report["metrics"]).items())
    points = [Point(f"eval.{n}", float(v), 0, evaluated_ms) for n, v in numbers]
    points.append(Point("export.bytes", float(report["bytes"]), 0, evaluated_ms))
    with run.together():
        run.log_points(points)
        # times differ when a run goes on after a kill: the first stay
        timed = [Point(f"seconds.{n}", s, 0, evaluated_ms) for n, s in sorted(seconds.items())]
        run.log_first_points(timed)
        run.log_table(error_rows(blocks), "errors.json")
        _log_decisions(run, [*decided, *blocks])
        run.log_text(report_text(report), REPORT)
        for role, entry in sets.items():
            run.log_file(entry.file("tokens.safetensors"), role)
            run.log_input(str(entry.value["name"]), entry.key, entry.value, role)


def register(
    run: ToldRun,
    report: Mapping[str, Any],
    location: str | None,
    served: Mapping[str, Any],
    log: Path | None = None,
) -> None:
    """Say where the checkpoint lies and what came of serving it, keep the log, finish the run.

    Args:
        run: the open run.
        report: what lies in the checkpoint as its report.
        location: the published folder, None for a run that only measures.
        served: what came of serving it: ``served``, and its figures or the ``reason``.
        log: the run's log file.
    """
    run.log_attempt(served_points(served, int(time.time() * 1000)))
    if log is not None and log.is_file():
        run.log_file(log)
    run.set_tags(
        {
            "checkpoint": location or "not published",
            "source.digest": str(report["source"]["digest"]),
            "scheme": str(report["scheme"]),
        }
    )
    run.finish()


def log_scores(run: ToldRun, scored: Entry | None, reason: str) -> None:
    """Send scores of tasks, or the reason why there are none."""
    if scored is None:
        run.set_tags({"lm_eval": reason})
        return
    time_ms = int(scored.created * 1000)
    found = sorted(score_metrics(scored.value).items())
    run.log_points([Point(name, value, 0, time_ms) for name, value in found])


def served_points(served: Mapping[str, Any], time_ms: int) -> list[Point]:
    """Metric points of what came of serving a checkpoint."""
    return [Point(f"served.{n}", float(v), 0, time_ms) for n, v in sorted(_numbers(served).items())]


def served_tags(served: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say whether a checkpoint was served, and by what, or why not."""
    if not served["served"]:
        return {"served": "no", "served.reason": str(served["reason"]), "served.by": ""}
    return {"served": "yes", "served.reason": "", "served.by": f"SGLang {served['sglang']}"}


def tell_failure(run: ToldRun | Run, error: Exception) -> None:
    """Tell a run that its checkpoint was not served as measured, with what figures there are."""
    found = getattr(error, "found", None) or {}
    run.log_attempt(served_points(found, int(time.time() * 1000)))
    by = f"SGLang {found['sglang']}" if "sglang" in found else ""
    run.set_tags({"served": "failed", "served.reason": str(error), "served.by": by})


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers among values and among those of mappings in them, whose names get a point between."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def _log_decisions(run: ToldRun, entries: Sequence[Entry]) -> None:
    """Keep each block's scales, clip factors and input scales, and what the searches tried."""
    searches: dict[str, list[Any]] = {}
    for entry in entries:
        of_its_kind = searches.setdefault(entry.task, [])
        for name in sorted(entry.files):
            run.log_file(entry.file(name), f"decisions/{entry.task}/block-{len(of_its_kind)}")
        of_its_kind.append(entry.value)
    tried = {task: values for task, values in searches.items() if task != "quantize"}
    if tried:
        run.log_json(tried, "searches.json")
