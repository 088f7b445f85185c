"""What a person sees of the blocks that are done."""

from __future__ import annotations

import logging

import pytest
from rich.progress import Progress

from flows.progress import Bar, LogLines


def test_lines_count_the_blocks_of_all_passes(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines()
    with caplog.at_level(logging.INFO, logger="blockquant"):
        for blocks in (3, 1):
            lines.plan(blocks)
            for _ in range(blocks):
                lines.end("quantize", cached=True)
                lines.block_done()
    assert caplog.messages == [
        "block 1 of 3 done (1 cache hits)",
        "block 2 of 3 done (2 cache hits)",
        "block 3 of 3 done (3 cache hits)",
        # another run of this process
        "block 1 of 1 done (1 cache hits)",
    ]


def test_a_bar_ends_when_all_passes_have() -> None:
    progress = Progress(disable=True)
    bar = Bar(progress)
    bar.plan(4)
    for done in range(4):
        assert not progress.finished
        bar.block_done()
        assert progress.tasks[0].completed == done + 1
    assert progress.finished
