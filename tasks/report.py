"""The report that lies in a checkpoint: what it was made of, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schemes import scheme_name
from tasks.engine.job import Job
from tasks.engine.store import Entry


def make_report(
    job: Job,
    blocks: Sequence[Entry],
    exported: Entry,
    verified: Entry,
    evaluated: Entry,
    sets: Mapping[str, Entry],
) -> dict[str, Any]:
    """Everything that belongs to the checkpoint; no place, no time: those differ by run.

    Args:
        job: the run.
        blocks: the quantize entry of each block.
        exported: the export's entry.
        verified: what was verified.
        evaluated: what was measured.
        sets: ``evaluation`` and, where the method reads one, ``calibration``.
    """
    linears = {
        plan.prefix + name: linear
        for plan, entry in zip(job.plan.blocks, blocks, strict=True)
        for name, linear in entry.value["linears"].items()
    }
    return {
        "scheme": scheme_name(job.steps[-1].quant),
        "method": " then ".join(str(step.quant.method) for step in job.steps),
        "format": job.scheme.format,
        "recipe": _without_places(job.recipe.canonical()),
        "source": {
            "name": job.source.name,
            "digest": job.source.digest(job.source.tensors),
        },
        "versions": {"blockquant": version("blockquant"), **job.fingerprint},
        "bytes": exported.value["bytes"],
        "ignored": list(job.plan.ignored),
        "calibration": _described(sets["calibration"]) if "calibration" in sets else None,
        "evaluation": _described(sets["evaluation"]),
        "evaluation_tokens": sets["evaluation"].key,
        "metrics": evaluated.value,
        "verification": verified.value,
        "linears": linears,
    }


def _described(entry: Entry) -> str:
    value = entry.value
    return f"{value['name']}, {value['windows']} windows of {value['window']} tokens"


def _without_places(value: Any) -> Any:
    """Keep the names of files, not the folders they lay in on this machine."""
    if isinstance(value, dict):
        return {
            k: Path(v).name if k == "path" and isinstance(v, str) else _without_places(v)
            for k, v in value.items()
        }
    return [_without_places(v) for v in value] if isinstance(value, list) else value
