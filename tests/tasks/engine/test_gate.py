"""The gate's decisions: each limit, at it and beyond it, alone and against the champion."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tasks.engine.gate import (
    FAILED,
    NO,
    YES,
    Figures,
    Limits,
    Tolerances,
    _measured_alike,
    as_values,
    decide,
    figures_of,
    limits_of,
)

GOOD = Figures(
    nll_increase=0.03,
    kl=0.04,
    top1_agreement=0.875,
    served=YES,
    server_nll=3.5,
    server_nll_gap=0.002,
    evaluation="books",
    windows="abc",
    scored=100,
)
LIMITS = Limits(
    max_nll_increase=0.05,
    max_kl=0.0625,
    min_top1_agreement=0.75,
    max_server_nll_gap=0.005,
    require_served=False,
    against_champion=Tolerances(0.25, 0.0, 0.125, 0.5, same_evaluation=True),
)


def refusals(decision) -> list[str]:
    return [reason.line for reason in decision.reasons if not reason.holds]


def test_what_holds_all_limits_is_champion():
    decision = decide(GOOD, LIMITS)
    assert decision.accepted and decision.summary == "champion"
    assert [reason.line for reason in decision.reasons] == [
        "NLL increase 0.03 is at most 0.05",
        "KL 0.04 is at most 0.0625",
        "top-1 agreement 0.875 is at least 0.75",
        "the server's NLL gap 0.002 is at most 0.005",
        "there is no champion to compare with",
    ]


@pytest.mark.parametrize(
    ("key", "limit", "worse"),
    [
        ("nll_increase", 0.05, 1),
        ("kl", 0.0625, 1),
        ("top1_agreement", 0.75, -1),
        ("server_nll_gap", 0.005, 1),
        ("server_nll_gap", -0.005, -1),
    ],
)
def test_a_figure_at_its_limit_holds_and_one_beyond_does_not(key, limit, worse):
    assert decide(replace(GOOD, **{key: limit}), LIMITS).accepted
    beyond = math.nextafter(limit, worse * math.inf)
    decision = decide(replace(GOOD, **{key: beyond}), LIMITS)
    assert not decision.accepted
    (line,) = refusals(decision)
    # the two differ in the line too
    assert repr(abs(beyond)) in line and repr(abs(limit)) in line


@pytest.mark.parametrize("key", ["nll_increase", "kl", "top1_agreement", "server_nll_gap"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_figure_that_is_missing_or_no_number_never_holds(key, value):
    decision = decide(replace(GOOD, **{key: value}), LIMITS)
    assert not decision.accepted
    (line,) = refusals(decision)
    assert "is not known" in line and line in decision.summary


def test_nothing_measured_is_refused():
    assert len(refusals(decide(Figures(), LIMITS))) == 3


@pytest.mark.parametrize(
    ("changes", "required", "accepted", "said"),
    [
        ({"served": NO, "served_reason": "no GPU"}, False, True, "not served (it need not be)"),
        ({"served": NO, "served_reason": "no GPU"}, True, False, "require_served asks for it"),
        ({"served": YES}, True, True, "the server's NLL gap 0.002 is at most"),
        ({"served": FAILED, "served_reason": "it died"}, False, False, "as measured: it died"),
        ({"unserved": "a size"}, False, False, "SGLang cannot serve it: a size"),
    ],
)
def test_serving(changes, required, accepted, said):
    decision = decide(replace(GOOD, **changes), replace(LIMITS, require_served=required))
    assert decision.accepted is accepted
    assert any(said in reason.line and reason.holds is accepted for reason in decision.reasons)


@pytest.mark.parametrize(
    ("key", "champion", "tolerated", "worse"),
    [
        ("nll_increase", -0.21875, 0.03125, 1),
        ("kl", 0.03125, 0.03125, 1),
        ("top1_agreement", 1.0, 0.875, -1),
        ("server_nll", 3.0, 3.5, 1),
    ],
)
def test_a_figure_may_be_worse_than_the_champions_as_far_as_is_tolerated(
    key, champion, tolerated, worse
):
    present = replace(GOOD, **{key: champion})
    assert decide(replace(GOOD, **{key: tolerated}), LIMITS, present).accepted
    beyond = math.nextafter(tolerated, worse * math.inf)
    (line,) = refusals(decide(replace(GOOD, **{key: beyond}), LIMITS, present, "version 7"))
    assert "version 7" in line


def test_as_good_as_the_champion_is_enough():
    strict = replace(LIMITS, against_champion=Tolerances(0, 0, 0, 0, same_evaluation=True))
    assert decide(GOOD, strict, GOOD).accepted


@pytest.mark.parametrize("key", ["nll_increase", "kl", "top1_agreement"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_a_champion_without_figures_is_not_replaced(key, value):
    decision = decide(GOOD, LIMITS, replace(GOOD, **{key: value}))
    assert len(refusals(decision)) == 1 and "to compare with" in refusals(decision)[0]


def test_figures_of_other_text_are_not_compared():
    other = replace(GOOD, evaluation="news")
    (line,) = refusals(decide(GOOD, LIMITS, other))
    assert "evaluated on news, this on books" in line
    anyway = replace(LIMITS.against_champion, same_evaluation=False)
    assert decide(GOOD, replace(LIMITS, against_champion=anyway), other).accepted


@pytest.mark.parametrize(
    ("own", "champions", "alike"),
    [
        ("books, tokens 1, float32", "books, tokens 1, float32", True),
        ("books, tokens 1, float32", "books, tokens 1, bfloat16", False),
        # of a version that did not name it
        ("books, tokens 1, float32", "books, tokens 1, auto", True),
        ("books, tokens 1, float32", "books, tokens 2, auto", False),
        ("books, tokens 1, float32", None, False),
    ],
)
def test_figures_of_two_dtypes_are_not_compared(
    own: str, champions: str | None, alike: bool
) -> None:
    assert _measured_alike(own, champions) is alike
    assert _measured_alike(champions, own) is alike


@pytest.mark.parametrize(
    "changes", [{"windows": "x"}, {"scored": 9}, {"served": NO, "server_nll": None}]
)
def test_a_servers_nll_is_compared_on_the_same_windows_only(changes):
    better = replace(GOOD, server_nll=1.0)
    assert not decide(GOOD, LIMITS, better).accepted
    assert decide(GOOD, LIMITS, replace(better, **changes)).accepted


def test_what_is_kept_reads_as_it_was():
    assert figures_of(as_values(GOOD)) == GOOD
    assert limits_of(as_values(LIMITS)) == LIMITS
