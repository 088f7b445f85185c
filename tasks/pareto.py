"""The plot of a sweep: size against KL divergence, with the children that no other one beats."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from tasks.sweep import Outcome, pareto_front, ranked

# per model; readable beside each other also for the colour-blind (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LONGEST_LABEL = 60


def pareto_plot(outcomes: Sequence[Outcome], title: str, file_format: str = "svg") -> bytes:
    """Draw size (MB) against KL divergence of the children that were measured.

    Points bear the children's ranks, which are named beside the plot; filled ones are the Pareto
    front of their model. The same outcomes give the same bytes.

    Args:
        outcomes: the children; those that failed, or whose KL is not finite, are left out.
        title: above the plot.
        file_format: ``svg`` or ``png``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    places = [(rank, o) for rank, o in enumerate(ranked(outcomes), 1) if math.isfinite(o.kl)]
    # the list of names decides how high the figure is
    height = max(4.5, 1.2 + 0.22 * len(places))
    # text stays text in an SVG, and its ids are those of every drawing of it
    with matplotlib.rc_context({"svg.hashsalt": "blockquant", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.5, height), layout="constrained")
        plot, names = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw(plot, places, pareto_front([o for _, o in places]))
        plot.set_title(title)
        _name(names, places)
        drawn = io.BytesIO()
        fixed = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(drawn, format=file_format, dpi=120, metadata=fixed)
    return drawn.getvalue()


def _draw(plot: Any, places: Sequence[tuple[int, Outcome]], front: Sequence[Outcome]) -> None:
    models = list(dict.fromkeys(o.model for _, o in places))
    for number, model in enumerate(models):
        colour = COLOURS[number % len(COLOURS)]
        line = [(o.size / 1e6, o.kl) for o in front if o.model == model]
        plot.step(*zip(*line, strict=True), where="post", color=colour, alpha=0.6, zorder=1)
        for rank, outcome in places:
            if outcome.model != model:
                continue
            best = outcome in front
            at = (outcome.size / 1e6, outcome.kl)
            face = colour if best else "white"
            plot.scatter(*at, s=190, facecolor=face, edgecolor=colour, zorder=2, marker="o")
            ink = "white" if best else "black"
            plot.annotate(str(rank), at, ha="center", va="center", size=8, color=ink, zorder=3)
        if len(models) > 1:
            plot.plot([], [], "o", color=colour, label=model)
    if places and all(o.kl > 0 for _, o in places):
        plot.set_yscale("log")
    if len(models) > 1:
        plot.legend(fontsize=8)
    plot.margins(0.12)
    plot.grid(alpha=0.3)
    plot.set_xlabel("size, MB")
    plot.set_ylabel("KL divergence to the source, nats per token")


def _name(names: Any, places: Sequence[tuple[int, Outcome]]) -> None:
    names.axis("off")
    lines = []
    for rank, outcome in places:
        name = outcome.name
        short = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 3]}..."
        lines.append(f"{rank:>2}  {short}")
    text = "\n".join(lines) or "no child was measured"
    names.text(0, 1, text, va="top", ha="left", size=8, family="monospace", parse_math=False)
