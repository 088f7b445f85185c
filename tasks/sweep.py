"""What came of a sweep: its children ranked, and those that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of one child of a sweep.

    Attributes:
        name: the child's.
        model: its model's name, of which its KL divergence is.
        recipe: its recipe.
        overrides: over the recipe.
        result: what the flow gave; None where it failed.
        reason: why it failed, in one line.
    """

    name: str
    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    result: Mapping[str, Any] | None = None
    reason: str | None = None

    @property
    def kl(self) -> float:
        """KL divergence to the source model, in nats per token; infinite where there is none."""
        kl = math.nan if self.result is None else float(self.result["metrics"]["kl"])
        return kl if math.isfinite(kl) else math.inf

    @property
    def size(self) -> int:
        """Bytes of the checkpoint; 0 where it failed."""
        return 0 if self.result is None else int(self.result["bytes"])

    @property
    def found(self) -> int:
        """How many of its steps were found in the store."""
        return 0 if self.result is None else sum(s["cached"] for s in self.result["steps"])

    @property
    def steps(self) -> int:
        """How many steps it had."""
        return 0 if self.result is None else len(self.result["steps"])


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Order children by KL divergence, then by size; those that failed come last, as they came."""
    done = [o for o in outcomes if o.result is not None]
    failed = [o for o in outcomes if o.result is None]
    return [*sorted(done, key=lambda o: (o.kl, o.size, o.name)), *failed]


def pareto_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Children that no other of their model beats: none is at most as big and at most as far off.

    Of children with the same size and the same KL all belong to it. Divergences from different
    models are not compared, so each model has a front of its own.

    Returns:
        The front, by model in order of appearance, then from the smallest checkpoint on.
    """
    front: list[Outcome] = []
    done = [o for o in outcomes if o.result is not None and math.isfinite(o.kl)]
    for model in dict.fromkeys(o.model for o in done):
        best: Outcome | None = None
        for outcome in sorted((o for o in done if o.model == model), key=lambda o: (o.size, o.kl)):
            same = best is not None and (outcome.size, outcome.kl) == (best.size, best.kl)
            if best is None or outcome.kl < best.kl or same:
                front.append(outcome)
                best = outcome
    return front


def sweep_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per child, the best first: what it measured, or why it failed."""
    front = {o.name for o in pareto_front(outcomes)}
    rows = []
    for rank, outcome in enumerate(ranked(outcomes), 1):
        result = outcome.result or {}
        metrics = result.get("metrics", {})
        rows.append(
            {
                "rank": None if outcome.result is None else rank,
                "child": outcome.name,
                "model": outcome.model,
                "recipe": outcome.recipe,
                "overrides": " ".join(outcome.overrides),
                "scheme": result.get("scheme"),
                "kl": metrics.get("kl"),
                "nll_increase": metrics.get("nll_increase"),
                "top1_agreement": metrics.get("top1_agreement"),
                "bytes": result.get("bytes"),
                "pareto": outcome.name in front,
                "steps": outcome.steps,
                "found": outcome.found,
                "checkpoint": result.get("checkpoint"),
                "run": (result.get("mlflow") or {}).get("run"),
                "failed": outcome.reason,
            }
        )
    return rows
