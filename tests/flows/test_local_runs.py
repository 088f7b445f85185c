"""Runs that died with their worker: which of those that were noted a Prefect API is told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Pending, Running, Scheduled, State

from flows.local_runs import LOST, end_lost, note


@flow
def nothing() -> None:
    """Do nothing."""


def run_in(states: list[State[Any]]) -> UUID:
    """A run that was in these states, the last one now."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(nothing)
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)
        return run.id


def state_of(run: UUID) -> tuple[str, str | None]:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
    assert state is not None
    return state.type.value, state.message


@pytest.mark.parametrize(
    ("states", "lost"),
    [
        ([Pending()], True),
        ([Pending(), Running()], True),
        ([Pending(), Running(), Completed()], False),
        # to be taken by whoever is there
        ([Scheduled()], False),
        # another worker took it since
        ([Pending(), Running(), Scheduled(), Pending(), Running()], False),
    ],
)
def test_what_was_under_way_crashed(
    services: dict[str, str], tmp_path: Path, states: list[State[Any]], lost: bool
) -> None:
    run = run_in(states)
    note(tmp_path, str(run), 0)
    expected = ("CRASHED", LOST) if lost else state_of(run)
    assert end_lost(services["PREFECT_API_URL"], tmp_path) == [str(run)] * lost
    assert state_of(run) == expected
    # once
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_was_deleted_is_forgotten(services: dict[str, str], tmp_path: Path) -> None:
    note(tmp_path, str(uuid4()), 0)
    assert end_lost(services["PREFECT_API_URL"], tmp_path) == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_without_notes_nobody_is_asked(tmp_path: Path) -> None:
    assert end_lost("http://127.0.0.1:1/api", tmp_path) == []


def test_a_note_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    note(tmp_path, str(uuid4()), 0)
