"""One of two processes that sum tensors: ``python -m tests.tasks.engine.team_of_two``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from flows.shift import meet
from tasks.engine import team
from tasks.engine.team import Team

SIZE, ENTRIES = 2, 1000


def share(rank: int) -> torch.Tensor:
    """What a process has: numbers of all sizes, whose sums are rounded."""
    draw = torch.Generator().manual_seed(rank)
    sizes = torch.randint(-30, 30, (ENTRIES,), generator=draw)
    return torch.randn(ENTRIES, generator=draw) * torch.exp2(sizes)


def main() -> None:
    rank = int(sys.argv[1])
    meet(rank, ["cpu"] * SIZE, sys.argv[2])
    # several exchanges, the last of them shorter
    team.EXCHANGED_BYTES = 1200
    mine = share(rank).reshape(10, 100)
    found = Team(rank, SIZE).summed_(mine)
    assert found is mine
    expected = share(0) + share(1)
    assert torch.equal(found.reshape(-1), expected)
    sizes = (share(0).double() + share(1).double() - expected.double()).abs()
    assert bool((sizes > 0).any()), "no sum was rounded"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
