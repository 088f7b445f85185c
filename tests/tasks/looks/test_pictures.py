"""Pictures: what is drawn is what was given, and the same bytes each time."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy
import pytest
from matplotlib.image import imread

from tasks.looks.pictures import error_map, lines, pictures, png
from tasks.looks.series import Curve

ROWS = [
    {"block": block, "linear": name, "weight_error": error, "output_error": None}
    for block, name, error in ((0, "q", 0.1), (0, "up", 0.3), (1, "q", 0.2), (2, "q", 0.5))
]


def test_the_heat_map_shows_the_errors_at_their_places() -> None:
    figure = error_map(ROWS)
    assert figure is not None
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown is not None
    expected = [[0.1, 0.2, 0.5], [0.3, math.nan, math.nan]]
    numpy.testing.assert_array_equal(numpy.ma.filled(shown, math.nan), expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "up"]
    # one kind of error only: the map and its scale
    assert len(figure.axes) == 2


def test_both_kinds_of_errors_have_a_map() -> None:
    rows = [row | {"output_error": 2 * row["weight_error"]} for row in ROWS]
    figure = error_map(rows)
    assert figure is not None
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in maps] == ["weight error", "output error"]
    assert float(maps[1].images[0].get_array()[0, 2]) == 1.0  # type: ignore[index]


def test_curves_are_drawn_as_given_and_the_lowest_is_marked() -> None:
    curve = Curve("", 0.5, (0.0, 0.5, 1.0), (1.0, 0.4, 3.0))
    figure = lines("search", {"mlp": [curve]}, "ratio", "error", marked=True, top=2.0)
    assert figure is not None
    line, dot = figure.axes[0].lines
    assert [*line.get_xdata()] == [0.0, 0.5, 1.0]  # type: ignore[misc]
    assert [*line.get_ydata()] == [1.0, 0.4, 3.0]  # type: ignore[misc]
    assert ([*dot.get_xdata()], [*dot.get_ydata()]) == ([0.5], [0.4])  # type: ignore[misc]
    assert figure.axes[0].get_ylim()[1] == 2.0


@pytest.mark.parametrize("smallest", [0.0, 1e-9])
def test_zero_is_not_drawn_on_a_logarithm(smallest: float) -> None:
    figure = lines("l", {"loss": [Curve("", 0, (0, 1), (2, smallest))]}, "epoch", "loss", log=True)
    assert figure is not None
    assert figure.axes[0].get_yscale() == ("log" if smallest else "linear")
    assert png(figure)


def test_nothing_to_draw() -> None:
    assert error_map([]) is None
    assert lines("l", {}, "x", "y") is None
    assert pictures([], [], [], 0) == {}


def test_the_same_bytes_twice_and_no_word_of_the_library() -> None:
    one, other = (pictures(ROWS, [], [], 3) for _ in range(2))
    assert one == other
    assert list(one) == ["errors.png"]
    assert b"atplotlib" not in one["errors.png"]
    image: Any = imread(io.BytesIO(one["errors.png"]))
    assert image.shape[0] > 100 < image.shape[1]
    assert len(numpy.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10
