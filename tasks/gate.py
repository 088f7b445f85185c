"""Offer a published checkpoint to the registry, with its figures and what the recipe asks of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.gate_schema import Gate, usual_limits
from configs.schema import Quant
from configs.vocabulary import DataName
from tasks.engine.errors import one_line
from tasks.engine.gate import FAILED, NO, YES, Figures, Limits, Tolerances, as_values
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun
from tasks.engine.offer import Offer
from tasks.engine.output import content_of
from tasks.engine.precision import computing_dtype
from tasks.engine.registry import DIGEST_TAG, GATE, SOURCE_TAG
from tasks.engine.store import Entry
from tasks.engine.windows import TOKENS
from tasks.report import report_text
from tasks.smoke_test import largest_gap_of


def offer(
    job: Job,
    run: ToldRun,
    identity: str,
    report: Mapping[str, Any],
    location: str | None,
    evaluated_on: Entry,
    served: Mapping[str, Any],
    output: Path | None = None,
) -> None:
    """Tell of a published checkpoint, so that it is registered, and champion if the gate holds.

    Args:
        job: the run's job.
        run: the open run.
        identity: of the work.
        report: what lies in the checkpoint as its report.
        location: where it is published, None where it is not.
        evaluated_on: the evaluation's tokens.
        served: what came of serving it; after an error ``failed_serving``.
        output: the folder whose place it takes once it is champion, if it waits beside that.
    """
    if not job.recipe.gate.registry:
        run.set_tags({GATE: "not registered: gate.registry is false"})
    elif location is None or not job.recipe.save.save_sgl:
        run.set_tags({GATE: "not registered: no quantized checkpoint is published"})
    else:
        run.offer(offer_of(job, identity, report, location, evaluated_on, served, output))


def offer_of(
    job: Job,
    identity: str,
    report: Mapping[str, Any],
    location: str,
    evaluated_on: Entry,
    served: Mapping[str, Any],
    output: Path | None = None,
) -> Offer:
    """What the registry is told of a checkpoint; the arguments are those of ``offer``."""
    gate, quant = job.recipe.gate, job.steps[-1].quant
    gap = job.recipe.serving.max_nll_gap or largest_gap_of(job.scheme)
    tokens = evaluated_on.files[TOKENS].checksum
    text = _evaluation(job, report, tokens)
    return Offer(
        model=gate.model_name or model_name(job.source.name, str(report["scheme"])),
        content=content_of(identity, report_text(report)),
        identity=identity,
        location=location,
        facts={
            "scheme": str(report["scheme"]),
            "method": str(report["method"]),
            "bytes": str(report["bytes"]),
            "source": str(report["source"]["name"]),
            SOURCE_TAG: job.source.hub_id or str(job.source.path),
            DIGEST_TAG: str(report["source"]["digest"]),
            "evaluation": text,
        },
        figures=as_values(figures_of(report, served, text, tokens)),
        limits=as_values(limits_of(gate, quant, gap)),
        place="" if output is None or str(output) == location else str(output),
        named=gate.model_name is not None,
    )


def model_name(source: str, scheme: str) -> str:
    """Name of the registered model of a source in a scheme, as ``models:/NAME@champion`` has it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{source}-{scheme}").strip("-")


def figures_of(
    report: Mapping[str, Any], served: Mapping[str, Any], evaluation: str, windows: str
) -> Figures:
    """Figures of a checkpoint from its report and from what came of serving it."""
    metrics = report["metrics"]
    quality = {key: metrics.get(key) for key in ("nll_increase", "kl", "top1_agreement")}
    return Figures(
        **quality,
        **served_figures(served),
        unserved=report["unserved"],
        evaluation=evaluation,
        windows=windows,
    )


def served_figures(served: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that say what came of serving: fields of ``Figures``."""
    state = {True: YES, False: NO}.get(served["served"], FAILED)
    return {
        "served": state,
        "served_reason": str(served.get("reason", "")),
        "server_nll": served.get("nll"),
        "server_nll_gap": served.get("nll_gap"),
        "scored": served.get("tokens"),
    }


def failed_serving(error: Exception) -> dict[str, Any]:
    """What came of serving a checkpoint, where that failed."""
    found = getattr(error, "found", None) or {}
    return {**found, "served": FAILED, "reason": one_line(error)}


def limits_of(gate: Gate, quant: Quant, server_gap: float) -> Limits:
    """The recipe's limits, and the usual ones of its scheme where it gives none.

    Args:
        gate: the recipe's section.
        quant: the last step, whose scheme is exported.
        server_gap: by how much the smoke test lets a server's NLL differ, nats.
    """
    weight = quant.weight
    usual = usual_limits(8 if weight.is_float else int(weight.bit), weight.is_float)

    def given(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else value

    return Limits(
        max_nll_increase=given(gate.max_nll_increase, usual.nll_increase),
        max_kl=given(gate.max_kl, usual.kl),
        min_top1_agreement=given(gate.min_top1_agreement, usual.top1_agreement),
        max_server_nll_gap=given(gate.max_server_nll_gap, server_gap),
        require_served=gate.require_served,
        against_champion=Tolerances(**gate.against_champion.model_dump()),
    )


def _evaluation(job: Job, report: Mapping[str, Any], tokens: str) -> str:
    """What figures were measured on, alike where they may be compared.

    Text that a model writes itself is another one for other weights, all else has its tokens.
    """
    section = job.recipe.resolved_eval()
    own = section.name is DataName.SELF_GENERATED
    drawn = f"seed {section.seed}" if own else f"tokens {tokens[:12]}"
    dtype = str(computing_dtype(str(section.dtype), job.device)).removeprefix("torch.")
    return f"{report['evaluation']}, {drawn}, {dtype}"
