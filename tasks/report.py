"""The report that lies in a checkpoint: what it was made of, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schemes import scheme_name
from tasks.engine.encoding import files_digest
from tasks.engine.errors import InputError
from tasks.engine.job import Job
from tasks.engine.publication import REPORT
from tasks.engine.source import CONFIG
from tasks.engine.store import Entry
from tasks.export import COMPANIONS


@dataclass(frozen=True)
class Product:
    """A checkpoint in the store, verified and measured.

    Attributes:
        exported: the export's entry.
        verified: what was verified.
        evaluated: what was measured.
    """

    exported: Entry
    verified: Entry
    evaluated: Entry


def make_report(
    job: Job,
    blocks: Sequence[Entry],
    products: Mapping[str, Product],
    sets: Mapping[str, Entry],
) -> dict[str, Any]:
    """Everything that belongs to the checkpoint; no place, no time: those differ by run.

    Args:
        job: the run.
        blocks: the quantize entry of each block; none where nothing was quantized.
        products: by their folders; the first of them is what the report is about.
        sets: ``evaluation`` and those that were calibrated on.
    """
    linears = {
        plan.prefix + name: linear
        for plan, entry in zip(job.plan.blocks, blocks, strict=bool(blocks))
        for name, linear in entry.value["linears"].items()
    }
    (_, main), *others = products.items()
    calibration = [_described(sets[role]) for role in sorted(sets) if role != "evaluation"]
    return {
        "scheme": scheme_name(job.steps[-1].quant) if job.quantizes else "not quantized",
        "method": " then ".join(str(step.quant.method) for step in job.steps),
        "format": job.scheme.format if job.quantizes else None,
        "recipe": without_places(job.recipe.canonical()),
        "source": {"name": job.source.name, **source_digests(job)},
        "texts": job.texts,
        "versions": means_of(job),
        "bytes": main.exported.value["bytes"],
        "ignored": list(job.plan.ignored),
        "calibration": "; ".join(calibration) or None,
        "evaluation": _described(sets["evaluation"]),
        "evaluation_tokens": sets["evaluation"].key,
        "metrics": main.evaluated.value,
        "verification": main.verified.value,
        "tensor_parallel": job.recipe.serving.tensor_parallel,
        "unserved": job.unserved if job.quantizes else None,
        "linears": linears,
        **{
            folder: {
                "bytes": other.exported.value["bytes"],
                "metrics": other.evaluated.value,
                "verification": other.verified.value,
            }
            for folder, other in others
        },
    }


def means_of(job: Job) -> dict[str, str]:
    """What a checkpoint is made by: versions, and what else decides its last bits."""
    return {"blockquant": version("blockquant"), **job.fingerprint}


def require_same_means(job: Job, output: Path) -> None:
    """Refuse an output of this very work that was made by other means, before all is computed.

    Raises:
        InputError: it was.
    """
    try:
        before = json.loads((output / REPORT).read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        # nothing is there, or it is no report: publishing compares the bytes
        return
    now = means_of(job)
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        told = "; ".join(f"{name}: {before.get(name)}, now {now[name]}" for name in other)
        threads = ", take the same threads (--cores of a sweep)" if other == ["device"] else ""
        raise InputError(
            f"--output {output}: exists already, and was made by other means ({told}); give "
            f"another{threads} or use --overwrite"
        )


def source_digests(job: Job) -> dict[str, str]:
    """What a source is: ``digest`` of its tensors, ``files`` of its config, tokenizer and such."""
    return {
        "digest": job.source.digest(job.source.tensors),
        "files": files_digest(job.source, (CONFIG, *COMPANIONS)),
    }


def report_text(report: Mapping[str, Any]) -> str:
    """A report as it is written, the same everywhere."""
    return json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _described(entry: Entry) -> str:
    value = entry.value
    return f"{value['name']}, {value['windows']} windows of {value['window']} tokens"


def without_places(value: Any) -> Any:
    """Return a recipe with the names of its files, without the folders they lie in here."""
    if isinstance(value, dict):
        return {
            k: Path(v).name if k == "path" and isinstance(v, str) else without_places(v)
            for k, v in value.items()
        }
    return [without_places(v) for v in value] if isinstance(value, list) else value
