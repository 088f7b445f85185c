"""What changed since a checkpoint was published: its report against what would be made now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.engine.errors import InputError
from tasks.engine.job import Job
from tasks.engine.output import waiting_beside
from tasks.engine.publication import REPORT, begun
from tasks.engine.served_windows import WINDOWS, read_windows
from tasks.engine.source import CONFIG
from tasks.publish import QUANTIZED, TRANSFORMED
from tasks.report import source_digests, without_places


def news(job: Job, output: Path) -> str | None:
    """Why a checkpoint is to be made again, None where the published one is of the same work.

    Compared are the source's digests, the recipe and its files of text, the code's version, which
    linears are left out, and what the recipe publishes with what lies in the folder; not the
    machine, whose last bits may differ, nor a hub's data sets.
    """
    if not output.is_dir():
        return "nothing is published yet"
    if begun(job.store.root, output) is not None:
        return "the last publication was not ended"
    try:
        published = json.loads((output / REPORT).read_text(encoding="utf-8"))
        recipe, source = published["recipe"], dict(published["source"])
        digest, texts = source["digest"], published.get("texts")
        code, ignored = published["versions"]["blockquant"], published["ignored"]
        predicted = int(published["metrics"]["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{REPORT} of the published checkpoint cannot be read"
    known = source_digests(job)
    if digest != known["digest"]:
        return "the source model's digest is new"
    # a report of before does not say it, nor which texts
    if source.get("files") != known["files"]:
        return "the source model's config or tokenizer is new"
    now = without_places(job.recipe.canonical())
    if recipe != json.loads(json.dumps(now)):
        return f"the recipe is new ({', '.join(_differing(recipe, now))})"
    if texts != job.texts:
        return "a text that the recipe names is new"
    if code != version("blockquant"):
        return f"blockquant {version('blockquant')} is new, it was {code}"
    if (differs := _lies_otherwise(job, output)) is not None:
        return differs
    if ignored != list(job.plan.ignored):
        return "other linears are left out"
    if (gpus := published.get("tensor_parallel")) != job.recipe.serving.tensor_parallel:
        return f"serving.tensor_parallel is new, it was {gpus}"
    return _other_windows(job, output, predicted // (job.evaluation.seq_len - 1))


def _lies_otherwise(job: Job, output: Path) -> str | None:
    """Which key of ``save`` asks for another checkpoint than lies in the folder, None if none."""
    save = job.recipe.save
    asked = {"save_sgl": (QUANTIZED, save.save_sgl), "save_trans": (TRANSFORMED, save.save_trans)}
    for key, (folder, wanted) in asked.items():
        if (output / folder / CONFIG).is_file() is not wanted:
            return f"save.{key} is new"
    return None


def _other_windows(job: Job, output: Path, evaluated: int) -> str | None:
    """How windows to be published, of those ``evaluated``, differ from what lies in the folder."""
    asked = min(job.recipe.serving.windows, evaluated) if job.recipe.save.save_sgl else 0
    try:
        found = len(read_windows(output).nll) if (output / WINDOWS).exists() else 0
    except InputError:
        return f"{WINDOWS} of the published checkpoint cannot be read"
    if found != asked:
        return f"{asked} evaluation windows are to be published, {found} are there"
    return None


def waiting(job: Job, output: Path) -> Path | None:
    """The checkpoint of the same work that the gate refused and that lies beside the output."""
    if begun(job.store.root, output) is not None:
        return None
    return next((one for one in waiting_beside(output) if news(job, one) is None), None)


def _differing(before: Any, now: Mapping[str, Any]) -> list[str]:
    """Names of the sections that differ."""
    known = before if isinstance(before, dict) else {}
    written = json.loads(json.dumps(now))
    return [n for n in sorted({*known, *written}) if known.get(n) != written.get(n)]
