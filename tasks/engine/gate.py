"""The gate before ``champion``: figures, limits and the present champion's figures give a decision.

Nothing here asks a server: the same figures give the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

YES, NO, FAILED = "yes", "no", "failed"


@dataclass(frozen=True)
class Figures:
    """What is known of a checkpoint; None where it was not measured.

    Attributes:
        nll_increase: mean, over the source's, nats.
        kl: mean KL from the source's predictions, nats.
        top1_agreement: share of tokens that both find likeliest.
        served: ``yes``, ``no`` or ``failed``.
        served_reason: why not.
        server_nll: mean over the served windows, nats.
        server_nll_gap: that less what was measured on them, nats.
        unserved: why SGLang cannot serve the export at all, None where it can.
        evaluation: what was evaluated on, in words.
        windows: checksum of the tokens that were evaluated on.
        scored: how many predictions of them a server scored.
    """

    nll_increase: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    served: str = NO
    served_reason: str = ""
    server_nll: float | None = None
    server_nll_gap: float | None = None
    unserved: str | None = None
    evaluation: str = ""
    windows: str = ""
    scored: int | None = None


@dataclass(frozen=True)
class Tolerances:
    """By how much a figure may be worse than the champion's."""

    nll_increase: float
    kl: float
    top1_agreement: float
    server_nll: float
    same_evaluation: bool


@dataclass(frozen=True)
class Limits:
    """What a champion holds."""

    max_nll_increase: float
    max_kl: float
    min_top1_agreement: float
    max_server_nll_gap: float
    require_served: bool
    against_champion: Tolerances


@dataclass(frozen=True)
class Reason:
    """One thing that was looked at: whether it holds, and a line with its figure and its limit."""

    holds: bool
    line: str


@dataclass(frozen=True)
class Decision:
    """Whether a checkpoint may be the champion, and why."""

    accepted: bool
    reasons: tuple[Reason, ...]

    @property
    def summary(self) -> str:
        """One line: ``champion``, or ``refused`` and what does not hold."""
        if self.accepted:
            return "champion"
        return "refused: " + "; ".join(r.line for r in self.reasons if not r.holds)

    def refused(self, line: str) -> Decision:
        """The same refused, for one reason more."""
        return Decision(False, (*self.reasons, Reason(False, line)))


def figures_of(values: Mapping[str, Any]) -> Figures:
    """Figures as they were kept.

    Raises:
        TypeError: these are no figures.
    """
    return Figures(**values)


def limits_of(values: Mapping[str, Any]) -> Limits:
    """Limits as they were kept."""
    return Limits(**{**values, "against_champion": Tolerances(**values["against_champion"])})


def as_values(kept: Figures | Limits | Decision) -> dict[str, Any]:
    """Plain values of what is kept as JSON."""
    return asdict(kept)


def decide(
    figures: Figures,
    limits: Limits,
    champion: Figures | None = None,
    against: str = "the champion",
    alone: str = "there is no champion to compare with",
) -> Decision:
    """Decide whether a checkpoint may be the champion.

    A figure that is missing or not finite never holds; one that equals its limit does.

    Args:
        figures: those of the checkpoint.
        limits: what it must hold.
        champion: figures of the present champion, None where there is none.
        against: what that is called in the reasons.
        alone: why there is none.
    """
    reasons = [*_absolute(figures, limits), *_served(figures, limits)]
    if champion is None:
        reasons.append(Reason(True, alone))
    else:
        reasons += _compared(figures, limits.against_champion, champion, against)
    return Decision(all(reason.holds for reason in reasons), tuple(reasons))


def _absolute(figures: Figures, limits: Limits) -> Iterator[Reason]:
    yield _at_most("NLL increase", figures.nll_increase, limits.max_nll_increase)
    yield _at_most("KL", figures.kl, limits.max_kl)
    yield _at_least("top-1 agreement", figures.top1_agreement, limits.min_top1_agreement)


def _served(figures: Figures, limits: Limits) -> Iterator[Reason]:
    if figures.unserved:
        yield Reason(False, f"SGLang cannot serve it: {figures.unserved}")
    elif figures.served == FAILED:
        yield Reason(False, f"it was not served as measured: {figures.served_reason}")
    elif figures.served == NO:
        why = figures.served_reason or "no reason given"
        asked = "gate.require_served asks for it" if limits.require_served else "it need not be"
        yield Reason(not limits.require_served, f"not served ({asked}): {why}")
    else:
        gap = figures.server_nll_gap
        size = None if gap is None else abs(gap)
        yield _at_most("the server's NLL gap", size, limits.max_server_nll_gap)


def _measured_alike(one: str | None, other: str | None) -> bool:
    # versions of before say "auto" where they did not name their dtype
    parts = [("" if text is None else text).rpartition(", ") for text in (one, other)]
    known = {dtype for _, _, dtype in parts} - {"auto"}
    return one == other or (parts[0][0] == parts[1][0] != "" and len(known) == 1)


def _compared(
    figures: Figures, tolerances: Tolerances, champion: Figures, against: str
) -> Iterator[Reason]:
    if not _measured_alike(figures.evaluation, champion.evaluation):
        yield Reason(
            not tolerances.same_evaluation,
            f"{against} was evaluated on {champion.evaluation or 'what is not known'}, this on "
            f"{figures.evaluation or 'what is not known'}; "
            "measure on that, or accept it with gate.against_champion.same_evaluation=false",
        )
    for name, key, better in (
        ("NLL increase", "nll_increase", -1),
        ("KL", "kl", -1),
        ("top-1 agreement", "top1_agreement", 1),
    ):
        bound = getattr(champion, key)
        if bound is None or not math.isfinite(bound):
            yield Reason(False, f"{against} has no {name} to compare with")
            continue
        allowed = bound - better * getattr(tolerances, key)
        test = _at_least if better > 0 else _at_most
        yield test(name, getattr(figures, key), allowed, f" ({against} and what is tolerated)")
    # a server's NLL is that of its windows, so only the same ones compare
    same = (figures.windows, figures.scored) == (champion.windows, champion.scored)
    if same and figures.served == champion.served == YES and champion.server_nll is not None:
        allowed = champion.server_nll + tolerances.server_nll
        named = f" ({against} and what is tolerated)"
        yield _at_most("the server's NLL", figures.server_nll, allowed, named)


def _at_most(name: str, figure: float | None, limit: float, of: str = "") -> Reason:
    if figure is None or not math.isfinite(figure):
        return Reason(False, f"{name} is not known ({figure}), at most {limit:.6g}{of} is asked")
    holds = figure <= limit
    verdict = "is at most" if holds else "is more than"
    return Reason(holds, f"{name} {_shown(figure, limit)} {verdict} {_shown(limit, figure)}{of}")


def _at_least(name: str, figure: float | None, limit: float, of: str = "") -> Reason:
    if figure is None or not math.isfinite(figure):
        return Reason(False, f"{name} is not known ({figure}), at least {limit:.6g}{of} is asked")
    holds = figure >= limit
    verdict = "is at least" if holds else "is less than"
    return Reason(holds, f"{name} {_shown(figure, limit)} {verdict} {_shown(limit, figure)}{of}")


def _shown(value: float, beside: float) -> str:
    """Six digits, or all where those would not tell it from what it stands beside."""
    short = f"{value:.6g}"
    return repr(value) if value != beside and short == f"{beside:.6g}" else short
