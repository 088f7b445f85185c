"""What processes exchange; two and three real ones, over loopback."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tasks.engine.sharing import errors_of, splits
from tasks.engine.team import ALONE, Team
from tests.tasks.engine import team_of_three, team_of_two
from tests.tasks.engine.team_of_three import SCHEME

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.parametrize("team", [team_of_two, team_of_three])
def test_processes_have_what_one_would(team: ModuleType, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", team.__name__, str(rank), str(tmp_path / "meeting")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(team.SIZE)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * team.SIZE, "\n".join(said)


@pytest.mark.parametrize("things", [0, 1, 4, 11])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_whole_and_differ_by_one_at_most(things: int, size: int) -> None:
    owned = [list(range(things))[Team(rank, size).own(things)] for rank in range(size)]
    assert list(itertools.chain(*owned)) == list(range(things))
    assert [len(part) for part in owned] == Team(0, size).counts(things)
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_one_alone_exchanges_nothing() -> None:
    own = torch.arange(6.0).reshape(3, 2)
    assert ALONE.joined(own, [3]) is own
    assert ALONE.summed_(own) is own
    assert not splits(ALONE, SCHEME, 10)
    assert splits(Team(0, 2), SCHEME, 10) and not splits(Team(0, 2), SCHEME, 1)
    assert errors_of(ALONE).__name__ == "output_errors"
