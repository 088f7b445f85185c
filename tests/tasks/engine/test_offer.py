"""What is offered to the registry, and whether it lies where it is said to."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tasks.engine.offer import Offer, in_place, lost
from tasks.engine.output import content_of
from tasks.engine.publication import REPORT


def put(folder: Path, report: str) -> None:
    folder.mkdir(parents=True)
    (folder / REPORT).write_text(report)


def offered(location: Path | str, place: Path | str = "") -> Offer:
    content = content_of("work", "ours")
    return Offer("tiny-W4A16", content, "work", str(location), {}, {}, {}, str(place))


def test_an_offer_is_plain_json() -> None:
    one = offered("/exports/a")
    assert Offer(**json.loads(json.dumps(asdict(one)))) == one
    assert one.digest != replace(one, limits={"max_kl": 0.2}).digest


@pytest.mark.parametrize("here", [True, False])
def test_what_lies_where_it_is_said_to_is_not_lost(tmp_path: Path, here: bool) -> None:
    put(tmp_path / "out", "ours")
    assert lost(offered(tmp_path / "out"), here) is None
    # one that waits still, and one that was moved before its message came again
    put(tmp_path / "other.1", "ours")
    put(tmp_path / "other", "another")
    assert lost(offered(tmp_path / "other.1", tmp_path / "other"), here) is None
    assert lost(offered(tmp_path / "out.1", tmp_path / "out"), here) is None


@pytest.mark.parametrize("location", ["/no/such/folder/out", "s3://bucket/out"])
def test_what_lies_on_another_machine_is_not_lost(location: str) -> None:
    assert lost(offered(location)) is None


@pytest.mark.parametrize("here", [True, False])
def test_what_was_replaced_is_lost(tmp_path: Path, here: bool) -> None:
    out = tmp_path / "out"
    put(out, "another")
    said = f"another checkpoint lies at {out} by now"
    assert lost(offered(out), here) == said
    # it was moved there, or removed while it waited
    assert lost(offered(tmp_path / "out.1", out), here) == said


def test_what_was_removed_is_lost_where_it_lay(tmp_path: Path) -> None:
    assert lost(offered(tmp_path / "out")) == f"{tmp_path / 'out'} is no longer there"
    assert lost(offered(tmp_path / "out"), here=False) is None


def test_one_that_waited_takes_its_place_once(tmp_path: Path) -> None:
    put(tmp_path / "out", "another")
    put(tmp_path / "out.1", "ours")
    waiting = offered(tmp_path / "out.1", tmp_path / "out")
    moved = in_place(waiting)
    assert (moved.location, moved.place) == (str(tmp_path / "out"), "")
    assert (tmp_path / "out" / REPORT).read_text() == "ours"
    assert in_place(waiting) == moved == in_place(moved)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
