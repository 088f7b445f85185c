"""One page that says all about a run: HTML that needs nothing beside it and fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

PAGE = "report.html"
# linears that are named
WORST = 10

# metrics by the names that a person reads, in this order; others follow under their own
_METRICS = {
    "reference_nll": "NLL, source",
    "nll": "NLL, this checkpoint",
    "nll_increase": "NLL increase",
    "perplexity": "perplexity",
    "kl": "KL to the source",
    "top1_agreement": "top-1 agreement",
    "tokens": "tokens",
}


def page(
    report: Mapping[str, Any],
    served: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    sampled: Mapping[str, Any] | None = None,
) -> str:
    """Write the page of a run; no place and no date, so the same work gives the same page.

    Args:
        report: what lies in the checkpoint as its report.
        served: what came of serving it: ``served`` (True, False or "failed"), and its figures or
            the ``reason``.
        pictures: PNG, by their file names.
        sampled: what :mod:`tasks.sample_text` gave.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(
        files("tasks.looks").joinpath("page.html").read_text(encoding="utf-8")
    )
    text = template.render(
        report=report,
        facts=_facts(report),
        metrics=_metrics(report["metrics"]),
        failed=served["served"] not in (True, False),
        served_line=served_line(served),
        served_numbers=_flat(served),
        samples=sampled["samples"] if sampled else [],
        tokens=sampled["tokens"] if sampled else 0,
        pictures=[(name, _data_uri(content)) for name, content in pictures.items()],
        worst=_worst(report["linears"]),
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
    )
    return text + "\n"


def served_line(served: Mapping[str, Any]) -> str:
    """Whether a checkpoint was served, and by what, or why not."""
    if served["served"] is True:
        return f"served by SGLang {served['sglang']}, with the NLL that was measured"
    return f"{'failed' if served['served'] else 'not served'}: {served['reason']}"


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    layout = "safetensors"
    if report["format"] is not None:
        layout = f"compressed-tensors, {report['format']}"
    facts = [
        ("source", report["source"]["name"]),
        ("source's digest", report["source"]["digest"]),
        ("scheme", report["scheme"]),
        ("method", report["method"]),
        ("format", layout),
        ("size", f"{report['bytes'] / 1e6:.1f} MB"),
        ("calibrated on", report["calibration"] or "nothing"),
        ("evaluated on", report["evaluation"]),
        ("not quantized", ", ".join(report["ignored"]) or "nothing but head and embedding"),
    ]
    if report["unserved"]:
        facts.append(("SGLang does not serve it", report["unserved"]))
    return facts


def _metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = [(label, metrics[name]) for name, label in _METRICS.items() if name in metrics]
    more = [(name, value) for name, value in metrics.items() if name not in _METRICS]
    return [(name, _number(value)) for name, value in [*named, *more]]


def _number(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, _number(value)))
    return found


def _worst(linears: Mapping[str, Mapping[str, Any]]) -> Sequence[Mapping[str, str]]:
    """Linears by the error of their outputs where it is known, else of their weights."""
    ordered = sorted(
        linears.items(),
        key=lambda item: (item[1].get("output_error") or 0.0, item[1]["weight_error"]),
        reverse=True,
    )
    return [
        {
            "name": name,
            "weight": f"{linear['weight_error']:.4f}",
            "output": f"{linear['output_error']:.4f}" if "output_error" in linear else "",
        }
        for name, linear in ordered[:WORST]
    ]


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
