"""Pictures of what was measured: the same bytes for the same numbers, on no display."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.engine.store import Entry
from tasks.looks.series import (
    Panels,
    by_pass,
    clip_curves,
    error_grid,
    loss_curves,
    range_curves,
    search_curves,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
COLUMNS = 4
# of curves that are called by name; others are coloured by their block
STYLES: dict[str, dict[str, Any]] = {
    "absmax before": {"color": "#9a9a9a", "linestyle": "-"},
    "absmax after": {"color": "#b2182b", "linestyle": "-"},
    "p99 before": {"color": "#9a9a9a", "linestyle": "--"},
    "p99 after": {"color": "#b2182b", "linestyle": "--"},
}
# the second of two versions of a search
_DASHED = {"v1": "--"}


def pictures(
    rows: Sequence[Mapping[str, Any]], blocks: Sequence[Entry], decided: Sequence[Entry], count: int
) -> dict[str, bytes]:
    """All pictures of a run as PNG, by their file names; those without numbers are left out.

    Args:
        rows: one per quantized linear, with its errors.
        blocks: the quantize entry of each block.
        decided: the entries of transforms, clips and learning.
        count: how many blocks there are.
    """
    drawn: dict[str, Figure | None] = {
        "errors.png": error_map(rows),
        "weight-ranges.png": lines(
            "weights", range_curves(blocks, "weights"), "block", "magnitude", legend=True
        ),
        "input-ranges.png": lines(
            "inputs of linears",
            range_curves(blocks, "inputs"),
            "block",
            "magnitude",
            legend=True,
            log=True,
        ),
    }
    for number, values in enumerate(by_pass(decided, "transform", count)):
        varied, panels = search_curves(values)
        drawn[_named("scale-search", number)] = lines(
            "search of channel scales", panels, varied, "error, first = 1", marked=True, top=2.0
        )
    for number, values in enumerate(by_pass(decided, "clip", count)):
        drawn[_named("clip-search", number)] = lines(
            "search of clip factors",
            clip_curves(values),
            "factor on the range",
            "error, whole range = 1",
            marked=True,
            top=2.0,
        )
    for number, values in enumerate(by_pass(decided, "learn", count)):
        drawn[_named("losses", number)] = lines(
            "learning", loss_curves(values), "epoch", "loss", log=True
        )
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}


def _named(name: str, number: int) -> str:
    return f"{name}.png" if number == 0 else f"{name}-{number + 1}.png"


def error_map(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A heat map of the error per linear and block, one for each kind of error that there is."""
    kinds = [
        kind
        for kind in ("weight_error", "output_error")
        if any(row[kind] is not None for row in rows)
    ]
    if not kinds:
        return None
    from matplotlib.ticker import MaxNLocator

    linears, grid = error_grid(rows, kinds[0])
    width = min(16.0, 3.2 + 0.32 * len(grid[0]))
    figure = _figure(max(width, 5.0), len(kinds) * (1.1 + 0.26 * len(linears)))
    for number, kind in enumerate(kinds):
        _, grid = error_grid(rows, kind)
        axes = figure.add_subplot(len(kinds), 1, number + 1)
        shown = [[math.nan if e is None else e for e in line] for line in grid]
        image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(linears)), linears, fontsize=8)
        axes.set_xlabel("block", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.set_title(kind.replace("_", " "), fontsize=9, loc="left")
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    return figure


def lines(
    title: str,
    panels: Panels,
    x_label: str,
    y_label: str,
    *,
    legend: bool = False,
    log: bool = False,
    marked: bool = False,
    top: float | None = None,
) -> Figure | None:
    """Small panels of curves, side by side; None where there is no curve.

    Args:
        title: of the picture.
        panels: by their names, which stand above them.
        x_label: of all panels.
        y_label: of all panels.
        legend: whether curves are called by name; else their colour says the block.
        log: whether the y axis is logarithmic.
        marked: whether the lowest point of each curve has a dot.
        top: where the y axis ends at the latest.
    """
    if not any(panels.values()):
        return None
    from matplotlib.ticker import LogFormatter, MaxNLocator

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(5.0, 2.6 * columns), 2.3 * rows + 0.5)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for number, (name, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(name, fontsize=8, loc="left")
        _draw(axes, curves, marked)
        axes.set_xlabel(x_label, fontsize=8)
        if number % columns == 0:
            axes.set_ylabel(y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(True, linewidth=0.3)
        if x_label in ("block", "epoch"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        heights = [y for curve in curves for y in curve.y]
        if log and min(heights) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.tick_params(which="minor", labelsize=6)
        if top is not None:
            axes.set_ylim(0.98 * min(heights), min(top, 1.02 * max(heights)))
        if legend and number == 0:
            axes.legend(fontsize=6)
    if not legend and len(next(iter(panels.values()))) > 1:
        _say_colours(figure)
    return figure


def _draw(axes: Axes, curves: Sequence[Any], marked: bool) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for curve in curves:
        style: dict[str, Any] = STYLES.get(curve.name) or {
            # the end of the map is too bright on white
            "color": colours(0.9 * curve.place),
            "linestyle": _DASHED.get(curve.name, "-"),
        }
        lone: dict[str, Any] = {"marker": "o", "markersize": 3} if len(curve.x) == 1 else {}
        axes.plot(curve.x, curve.y, linewidth=1.1, label=curve.name, **style, **lone)
        if marked:
            lowest = min(range(len(curve.y)), key=lambda place: curve.y[place])
            axes.plot([curve.x[lowest]], [curve.y[lowest]], "o", markersize=3, color=style["color"])


def _say_colours(figure: Figure) -> None:
    figure.text(
        0.99, 0.985, "a curve per block: the first dark, the last light", fontsize=7,
        ha="right", va="top",
    )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    # else it warns of a folder that it cannot write to, on a person's terminal
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """A figure as PNG, without the version of what drew it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
