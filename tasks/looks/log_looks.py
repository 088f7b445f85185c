"""Keep the pictures of a run, and its page, in MLflow."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.engine.errors import one_line
from tasks.engine.journal import ToldRun
from tasks.engine.store import Entry
from tasks.looks.pictures import pictures
from tasks.register import error_rows

log = logging.getLogger("blockquant")

FOLDER = "looks"


def log_looks(run: ToldRun, blocks: Sequence[Entry], decided: Sequence[Entry], count: int) -> None:
    """Draw what was measured and keep it; what cannot be drawn is no reason to fail.

    Args:
        run: the open run.
        blocks: the quantize entry of each block.
        decided: the entries of transforms, clips and learning, block after block.
        count: how many blocks the model has.
    """
    try:
        drawn = pictures(error_rows(blocks), blocks, decided, count)
    except Exception as error:
        log.warning("no pictures of this run: %s", one_line(error))
        log.debug("not drawn", exc_info=error)
        return
    keep(run, drawn, FOLDER)


def keep(run: ToldRun, files: Mapping[str, bytes], folder: str | None = None) -> None:
    """Keep contents as artifacts under their names."""
    with tempfile.TemporaryDirectory(prefix="blockquant-") as place:
        for name, content in files.items():
            path = Path(place) / name
            path.write_bytes(content)
            run.log_file(path, folder)
