"""Ranks, the Pareto front against a brute-force one, the table and the plot of a sweep."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tasks.pareto import pareto_plot
from tasks.sweep import Outcome, pareto_front, ranked, sweep_rows


def done(name: str, kl: float, size: int, model: str = "m", cached: int = 1) -> Outcome:
    steps = [{"step": str(n), "cached": n < cached} for n in range(3)]
    result = {
        "metrics": {"kl": kl, "nll_increase": 0.1, "top1_agreement": 0.9},
        "bytes": size,
        "scheme": "W4A16",
        "steps": steps,
        "checkpoint": f"/out/{name}",
        "mlflow": {"run": f"run-{name}"},
    }
    return Outcome(name, model, "r", ("a.b=1",), result)


def failed(name: str) -> Outcome:
    return Outcome(name, "m", "r", reason="no luck")


SOME = [
    failed("f"),
    done("big", 0.01, 9),
    done("tie-big", 0.02, 5),
    done("tie-small", 0.02, 4),
    done("nan", math.nan, 1),
    failed("e"),
]


def test_children_are_ranked_by_kl_then_size_and_failed_ones_come_last() -> None:
    names = [o.name for o in ranked(SOME)]
    assert names == ["big", "tie-small", "tie-big", "nan", "f", "e"]


# few values, so that many tie
point = st.tuples(
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, math.nan, math.inf]),
    st.integers(1, 5),
    st.sampled_from(["one", "two"]),
)


@given(st.lists(point, max_size=12))
def test_the_front_is_that_of_brute_force(points: list[tuple[float, int, str]]) -> None:
    outcomes = [done(str(n), *values) for n, values in enumerate(points)]
    finite = [o for o in outcomes if math.isfinite(o.kl)]

    def beats(one: Outcome, other: Outcome) -> bool:
        no_worse = one.kl <= other.kl and one.size <= other.size
        return no_worse and (one.kl, one.size) != (other.kl, other.size)

    expected = {
        o.name for o in finite if not any(beats(p, o) for p in finite if p.model == o.model)
    }
    front = pareto_front([*outcomes, failed("f")])
    assert {o.name for o in front} == expected
    for model in ("one", "two"):
        sizes = [o.size for o in front if o.model == model]
        assert sizes == sorted(sizes)


def test_rows_of_the_table() -> None:
    best, *_, first_failed, _ = sweep_rows(SOME)
    assert best == {
        "rank": 1,
        "child": "big",
        "model": "m",
        "recipe": "r",
        "overrides": "a.b=1",
        "scheme": "W4A16",
        "kl": 0.01,
        "nll_increase": 0.1,
        "top1_agreement": 0.9,
        "bytes": 9,
        "pareto": True,
        "steps": 3,
        "found": 1,
        "checkpoint": "/out/big",
        "run": "run-big",
        "failed": None,
    }
    assert list(first_failed) == list(best)
    assert (first_failed["rank"], first_failed["failed"]) == (None, "no luck")


def texts(svg: bytes) -> list[str]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in found]


def test_the_plot_names_what_was_measured() -> None:
    outcomes = [*SOME, done("a-$name_with$", 0.3, 2_000_000, "other")]
    drawn = pareto_plot(outcomes, "sweep x: size against KL")
    assert drawn == pareto_plot(outcomes, "sweep x: size against KL")
    said = texts(drawn)
    assert {"sweep x: size against KL", "size, MB", "m", "other"} <= set(said)
    listed = [" ".join(line.split()) for line in said]
    for line in ("1 big", "2 tie-small", "3 tie-big", "4 a-$name_with$"):
        assert line in listed, listed
    assert not [line for line in said if "nan" in line or line in ("e", "f")]
    png = pareto_plot(outcomes, "sweep x", "png")
    assert png.startswith(b"\x89PNG") and png == pareto_plot(outcomes, "sweep x", "png")


def test_a_plot_of_nothing_says_so() -> None:
    assert "no child was measured" in texts(pareto_plot([failed("f")], "sweep x"))
