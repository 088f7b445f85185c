"""The page of a run: whole by itself, harmless whatever its texts say, and true to its numbers."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from typing import Any

import pytest

from tasks.looks.page import WORST, page

EVIL = "<script>alert('1')</script>\"&'><img src=x onerror=alert(1)>"
METRICS = {
    "nll": 2.51234567,
    "reference_nll": 2.5,
    "nll_increase": 0.01234567,
    "perplexity": 12.334,
    "kl": 0.0456,
    "top1_agreement": 0.875,
    "tokens": 1000,
}


def report(**changes: Any) -> dict[str, Any]:
    return {
        "scheme": "W4A16",
        "method": "Awq",
        "format": "pack-quantized",
        "recipe": {"quant": {"method": "Awq"}},
        "source": {"name": "river-1b", "digest": "abc"},
        "versions": {"blockquant": "1"},
        "bytes": 12_300_000,
        "ignored": [],
        "calibration": None,
        "evaluation": "text, 2 windows of 64 tokens",
        "metrics": METRICS,
        "unserved": None,
        "linears": {
            f"model.layers.{n}.mlp": {"weight_error": n / 100, "output_error": 1 - n / 100}
            for n in range(WORST + 5)
        },
        **changes,
    }


UNSERVED = {"served": False, "reason": "no GPU"}


class Parsed(HTMLParser):
    """Texts by the id of what they stand in, tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._table = ""
        self._open = False
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = str(dict(attrs)["id"])
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag in ("td", "th"):
            self.rows[self._table][-1].append("")
        self._open = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            self.rows[self._table][-1][-1] += data


def test_figures_stand_beside_their_names() -> None:
    found = Parsed(page(report(), UNSERVED, {}))
    metrics = dict(found.rows["metrics"])  # type: ignore[arg-type]
    assert metrics["KL to the source"] == "0.04560"
    assert metrics["NLL, this checkpoint"] == "2.51235"
    assert metrics["tokens"] == "1000"
    assert len(metrics) == len(METRICS)
    facts = dict(found.rows["facts"])  # type: ignore[arg-type]
    assert facts["size"] == "12.3 MB"
    assert facts["source"] == "river-1b"
    assert "not served: no GPU" in found.text
    assert "method: Awq" in found.text


def test_the_worst_linears_come_first() -> None:
    rows = Parsed(page(report(), UNSERVED, {})).rows["worst"][1:]
    assert [row[0] for row in rows] == [f"model.layers.{n}.mlp" for n in range(WORST)]
    assert rows[1][1:] == ["0.0100", "0.9900"]


def test_pictures_lie_in_the_page_and_nothing_is_fetched() -> None:
    drawn = {"errors.png": b"\x89PNG 1", "losses.png": b"\x89PNG 2"}
    found = Parsed(page(report(), UNSERVED, drawn))
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [image["alt"] for image in images] == list(drawn)
    for image, content in zip(images, drawn.values(), strict=True):
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == content
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "a", "object", "base"}
    policy = [a["content"] for tag, a in found.tags if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in found.tags:
        outside = [n for n in attributes if n in ("href", "src") and tag != "img"]
        assert not outside and not [n for n in attributes if n.startswith("on")]


@pytest.mark.parametrize("place", ["name", "sample", "reason", "recipe", "picture"])
def test_texts_stay_texts(place: str) -> None:
    hostile = report()
    served, drawn = dict(UNSERVED), {}
    sample = {"prompt": "a", "before": "b", "after": "c", "same": 0}
    if place == "name":
        hostile["source"] = {"name": EVIL, "digest": EVIL}
    if place == "sample":
        sample = {"prompt": EVIL, "before": EVIL, "after": EVIL, "same": 0}
    if place == "reason":
        served["reason"] = EVIL
    if place == "recipe":
        hostile["recipe"] = {"calib": {"name": EVIL}}
    if place == "picture":
        drawn = {EVIL: b"png"}
    harmless = Parsed(page(report(), UNSERVED, {"a.png": b"png"} if drawn else {}, sampled(sample)))
    found = Parsed(page(hostile, served, drawn, sampled(sample)))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    if place != "recipe":
        assert EVIL in found.text


def sampled(sample: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": 4, "samples": [sample]}


def test_samples_are_shown_side_by_side() -> None:
    sample = {"prompt": "The river", "before": " was dark", "after": " was cold", "same": 1}
    rows = Parsed(page(report(), UNSERVED, {}, sampled(sample))).rows["samples"]
    assert rows[1] == ["The river", " was dark", " was cold", "1 of 4"]


@pytest.mark.parametrize(
    ("served", "line"),
    [
        (
            {"served": True, "sglang": "0.5.15", "nll": 2.5, "speed": {"ttft": 1.5}},
            "served by SGLang 0.5.15",
        ),
        ({"served": "failed", "reason": "it died", "nll": 9.0}, "failed: it died"),
    ],
)
def test_what_came_of_serving(served: dict[str, Any], line: str) -> None:
    found = Parsed(page(report(), served, {}))
    assert line in found.text
    numbers = dict(found.rows["served-metrics"])  # type: ignore[arg-type]
    assert float(numbers["nll"]) == served["nll"]
    assert ("speed.ttft" in numbers) == ("speed" in served)


def test_a_model_that_was_not_quantized_has_a_page() -> None:
    text = page(report(format=None, linears={}, scheme="not quantized"), UNSERVED, {})
    assert "worst" not in Parsed(text).rows
    assert page(report(), UNSERVED, {}) == page(report(), UNSERVED, {})
