"""Runs side by side."""

from __future__ import annotations

from tasks.looks.compare import Tracked, compare


def tracked(number: int, parameters: dict[str, str], metrics: dict[str, float]) -> Tracked:
    tags = {"scheme": "W4A16", "checkpoint": f"/out/{number}"}
    return Tracked(f"id-{number}", "name", "FINISHED", number, parameters, metrics, tags)


def test_only_what_differs_of_the_recipe_and_every_figure() -> None:
    found = compare(
        [
            tracked(0, {"a": "1", "b": "2", "output": "x"}, {"eval.kl": 0.5, "seconds.pack": 1.0}),
            tracked(1, {"a": "1", "b": "3", "output": "y"}, {"eval.kl": 0.5, "export.bytes": 9.0}),
            tracked(2, {"a": "1", "c": "4"}, {"weight_error.mean": 0.1, "loss.block-0": 2.0}),
        ]
    )
    assert found.recipe == {"b": ["2", "3", None], "c": [None, None, "4"]}
    assert list(found.figures) == ["eval.kl", "export.bytes", "seconds.pack"]
    assert found.figures["eval.kl"] == [0.5, 0.5, None]
    assert [run["checkpoint"] for run in found.runs] == ["/out/0", "/out/1", "/out/2"]


def test_equal_runs_differ_in_nothing() -> None:
    found = compare([tracked(n, {"a": "1"}, {}) for n in range(2)])
    assert (found.recipe, found.figures) == ({}, {})
