"""What changed since a checkpoint was published: its report against what would be made now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.engine.job import Job
from tasks.engine.output import waiting_beside
from tasks.engine.publication import REPORT, begun
from tasks.report import source_digests, without_places


def news(job: Job, output: Path) -> str | None:
    """Why a checkpoint is to be made again, None where the published one is of the same work.

    Compared are the source's digests, the recipe and its files of text, the code's version and
    which linears are left out; not the machine, whose last bits may differ, nor a hub's data sets.
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
    if ignored != list(job.plan.ignored):
        return "other linears are left out"
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
