"""Runs that are parts of another one: nested whichever is opened first, and gone on with."""

from __future__ import annotations

from typing import Any

from tasks.engine.settings import Settings
from tasks.engine.tracking import NESTED_TAG, Point, Run, open_run


def opened(place: Settings, identity: str, parent: str | None = None, **more: Any) -> Run:
    return open_run(place, identity, identity, {}, {}, parent=parent, **more)


def parent_of(run: Run) -> str | None:
    found: str | None = run.client().get_run(run.id).data.tags.get(NESTED_TAG)
    return found


def test_a_part_is_nested_in_the_run_of_the_whole(place: Settings) -> None:
    whole = opened(place, "whole")
    part = opened(place, "part", "whole")
    assert parent_of(part) == whole.id
    assert parent_of(whole) is None


def test_parts_that_were_opened_first_are_adopted(place: Settings) -> None:
    part, other = opened(place, "part", "whole"), opened(place, "part", "other whole")
    assert parent_of(part) is None
    whole = opened(place, "whole")
    whole.adopt("whole")
    assert (parent_of(part), parent_of(other)) == (whole.id, None)


def test_the_same_work_alone_or_in_another_whole_is_a_run_of_its_own(place: Settings) -> None:
    one, other = opened(place, "one"), opened(place, "other")
    runs = [opened(place, "part", parent, even_finished=True) for parent in ("one", "other")]
    for run in runs:
        run.finish()
    alone = opened(place, "part")
    assert len({run.id for run in (*runs, alone)}) == 3
    assert [parent_of(run) for run in (*runs, alone)] == [one.id, other.id, None]
    again = opened(place, "part", "one", even_finished=True)
    assert again.id == runs[0].id


def test_values_that_did_not_change_are_told_once(place: Settings) -> None:
    run = opened(place, "whole")
    run.log_changed_points([Point("same", 1.0, 0, 1000), Point("other", 2.0, 0, 1000)])
    run.log_changed_points([Point("same", 1.0, 0, 2000), Point("other", 3.0, 0, 2000)])
    values = {
        name: [point.value for point in run.client().get_metric_history(run.id, name)]
        for name in ("same", "other")
    }
    assert values == {"same": [1.0], "other": [2.0, 3.0]}
