"""The numbers that pictures show are those of the manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine.store import Entry
from tasks.looks.series import (
    by_pass,
    clip_curves,
    error_grid,
    loss_curves,
    range_curves,
    search_curves,
)
from tasks.register import error_rows


def entry(task: str, **value: Any) -> Entry:
    return Entry("0", task, Path("nowhere"), value, 0.0, {})


def test_the_grid_holds_each_error_once_at_its_place() -> None:
    errors = [{"a": 0.1, "b": 0.2}, {"b": 0.4}, {"a": 0.5, "b": 0.6}]
    blocks = [
        entry("quantize", linears={n: {"weight_error": e} for n, e in block.items()})
        for block in errors
    ]
    linears, grid = error_grid(error_rows(blocks), "weight_error")
    assert linears == ["a", "b"]
    assert grid == [[0.1, None, 0.5], [0.2, 0.4, 0.6]]
    assert error_grid(error_rows(blocks), "output_error")[1] == [[None] * 3] * 2
    assert error_grid([], "weight_error") == ([], [])


def test_curves_of_a_search_start_at_one_and_rise_in_x() -> None:
    trials = [
        {"version": "v1", "ratio": 0.0, "error": 4.0},
        {"version": "v1", "ratio": 0.5, "error": 2.0},
        # found while the best ratio was refined
        {"version": "v1", "ratio": 0.25, "error": 1.0},
        {"version": "v2", "ratio": 0.0, "error": 8.0},
        {"version": "v2", "ratio": 0.5, "error": 4.0},
    ]
    varied, panels = search_curves([{"search": {"mlp": trials}}, {"search": {"mlp": trials[3:]}}])
    assert varied == "ratio"
    first, second, third = panels["mlp"]
    assert (first.x, first.y) == ((0.0, 0.25, 0.5), (1.0, 0.25, 0.5))
    assert (second.name, second.y, second.place) == ("v2", (1.0, 0.5), 0.0)
    assert third.place == 1.0


def test_a_search_that_tried_nothing_has_no_curve() -> None:
    assert search_curves([{"search": {"mlp": []}}]) == ("", {})
    assert search_curves([]) == ("", {})


def test_thresholds_are_varied_too() -> None:
    tried = [{"threshold": 3.0, "error": 0.0}, {"threshold": 2.0, "error": 5.0}]
    varied, panels = search_curves([{"search": {"mlp": tried}}])
    # a first error of nothing divides nothing
    assert (varied, panels["mlp"][0].y) == ("threshold", (5.0, 0.0))


def test_clip_errors_are_told_against_the_whole_range() -> None:
    value = {"factors": [1.0, 0.9, 0.8], "errors": {"a": [2.0, 1.0, 4.0]}}
    (curve,) = clip_curves([value])["a"]
    assert (curve.x, curve.y) == ((0.8, 0.9, 1.0), (2.0, 0.5, 1.0))
    # a float's factors rise from 1
    value = {"factors": [1.0, 1.5], "errors": {"a": [2.0, 1.0]}}
    assert clip_curves([value])["a"][0].y == (1.0, 0.5)


def test_ranges_over_the_blocks() -> None:
    def both(number: float) -> dict[str, Any]:
        return {
            "before": {"absmax": number, "p50": 0, "p99": 2, "p99.9": 3},
            "after": {"absmax": number / 2, "p50": 0, "p99": 1, "p99.9": 2},
        }

    blocks = [
        entry("quantize", weights={"a": both(8), "b": both(1)}),
        entry("q", weights={"a": both(6)}),
    ]
    curves = {curve.name: curve for curve in range_curves(blocks, "weights")["a"]}
    assert curves["absmax before"].y == (8, 6)
    assert curves["absmax after"].y == (4, 3)
    assert curves["p99 before"].y == (2, 2)
    assert range_curves(blocks, "weights")["b"][0].x == (0.0,)


def test_losses_of_blocks_that_learned() -> None:
    panels = loss_curves([{"loss": [3.0, 1.0]}, {"loss": []}, {"loss": [2.0]}])
    assert [curve.y for curve in panels["loss"]] == [(3.0, 1.0), (2.0,)]
    assert loss_curves([{"loss": []}]) == {}


def test_each_step_of_a_recipe_has_its_own_pass() -> None:
    decided = [
        entry("rotate"),
        *(entry("transform", n=n) for n in range(2)),
        *(e for n in range(2) for e in (entry("transform", n=2 + n), entry("clip", n=n))),
    ]
    assert by_pass(decided, "transform", 2) == [[{"n": 0}, {"n": 1}], [{"n": 2}, {"n": 3}]]
    assert by_pass(decided, "clip", 2) == [[{"n": 0}, {"n": 1}]]
    assert by_pass(decided, "learn", 2) == []
