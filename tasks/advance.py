"""Move the stream of hidden states past a block that is done."""

from __future__ import annotations

from typing import Any

from tasks.engine.draft import Draft
from tasks.engine.job import Job, activation_lineage
from tasks.engine.step import step
from tasks.engine.streams import (
    Stream,
    hidden_states,
    keep_boundary,
    pass_block,
    require_finite,
    windows_of_each,
)


def _depends_on(job: Job, stream: Stream, packed: str | None, block: int) -> dict[str, Any]:
    # a stream through unquantized blocks is the same whatever is quantized: recipes share it
    through: dict[str, Any] = (
        {"weights": stream.version.lineage(job, block), "config": dict(job.source.config)}
        if packed is None
        else {"packed": packed, "activations": activation_lineage(job)}
    )
    return {"stream": stream.key, **through}


@step(depends_on=_depends_on, code=("quantizers.activations",))
def advance(
    job: Job, draft: Draft, stream: Stream, packed: str | None, block: int
) -> dict[str, Any]:
    """Run the stream through a block: quantized, or as it was where packed is None."""
    del draft
    # nothing is decided of the block any more; what it had in memory is the pass's
    job.memo.forget("statistics", "codes", "transformed block")
    if packed is not None:
        job.memo.forget("source block", "version block")
    # what was kept of the block has left room for the next
    job.send_ahead(block + 1)
    hidden = pass_block(job, stream, hidden_states(job, stream), packed)
    mean_square = require_finite(job, hidden, block, windows_of_each(job, stream))
    after = stream.after(advance.key(job, stream, packed, block=block), packed)
    job.memo.put(after.kind, after.key, hidden)
    keep_boundary(job, after, hidden)
    return {"mean_square": mean_square}
